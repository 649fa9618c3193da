"""What an exported file is checked with: images, and how its answers differ from the network's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..runtime.dtypes import float32_as
from ..runtime.finite import check_finite

_NOISE = 8  # images of noise that a file is checked on where none are given
_BATCH = 32  # images a call
_ROUNDING = 1e-3  # float32 alone moves logits of some tens by 1e-5; more comes of spikes that it flips
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class ExportReport:
    """How the answers of a file that was read back differ from those of the network.

    Attributes:
        path: The file.
        contents: What it holds and who can run it, in words.
        images: Images compared.
        largest_difference: Of the logits.
        flips: Images whose best class differs (with ``per_step`` at some step).
        exact: Whether the format promises the network's answers to the bit; else sums may have another order.
    """

    path: Path
    contents: str
    images: int
    largest_difference: float
    flips: int
    exact: bool = False

    def __str__(self) -> str:
        """Two lines."""
        why = ""
        if not self.exact and _ROUNDING < self.largest_difference < math.inf:
            why = " (sums in another order: where rounding flips a spike, logits move)"
        return (
            f"{self.path}: {self.contents}\nread back: logits differ by up to {self.largest_difference:.2g}{why}, "
            f"{self.flips} of {self.images} answers differ"
        )


def check_new(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file unasked.

    Raises:
        ValueError: The file is there and ``overwrite`` is not set, it is a folder, or its folder is a file.
    """
    if path.is_dir():
        raise ValueError(f"expected a file, got the folder {str(path)!r}: name a file in it")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"expected a folder for {path.name!r}, got the file {str(folder)!r}: choose another")
    if path.exists() and not overwrite:
        raise ValueError(f"expected a new file, got {str(path)!r}, which is there: choose another, or overwrite=True")


def check_network(model: Any) -> None:
    """Refuse what is no network of this package, one in a wrapper, and one that is not finite or holds no values.

    Raises:
        ValueError: It is one of these.
    """
    inner = next((name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
    kind = type(model).__name__
    if inner is not None:
        raise ValueError(f"expected the network itself, got it inside {kind}: give its .{inner}")
    if not isinstance(model, nn.Module) or not hasattr(model, "forward_steps"):
        raise ValueError(f"expected a spiking network of this package, got {kind}: see timm-gac models")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("expected a network with weights, got one on the device 'meta': create it on the CPU")
    check_finite(model, "to export")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function outside the caller's autocast: a file computes in the dtype of the network's weights."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def check_batch_size(batch_size: Any) -> None:
    """Refuse a batch size that is no number of images.

    Raises:
        ValueError: It is neither None nor an integer of at least 1.
    """
    if batch_size is None:
        return
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"expected batch_size as an integer >= 1, got {batch_size!r}: give None for any")


def example_images(model: Any, images: Tensor | None, frames: bool) -> Tensor:
    """Images to trace and to check a network with, on its device and in its dtype.

    Args:
        model: The network.
        images: ``(B, C, H, W)``, or frames ``(B, T, C, H, W)``; noise of the size in its pretrained_cfg if None.
        frames: Whether noise is to be event frames.

    Raises:
        ValueError: It is no network of this package, the images have other channels, or there are none and the network
            does not say their size.
    """
    check_network(model)
    if images is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if size is None:
            raise ValueError("expected a network with a pretrained_cfg, got one without an input size: give images")
        shape = (_NOISE, *((model.num_steps,) if frames else ()), *with_channels(model, size))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    elif frames and getattr(images, "ndim", 5) != 5:
        raise ValueError(
            f"expected frames (B, T, C, H, W) with frames=True, got {tuple(images.shape)}: leave one of the two out"
        )
    check_images(model, images)
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)


def check_images(model: Any, images: Tensor) -> None:
    """Refuse images that a network does not take, or none.

    Raises:
        ValueError: There are none, or they have another number of axes or channels.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"expected images as a torch.Tensor, got {type(images).__name__}: convert them")
    if images.ndim == 0 or not len(images):
        raise ValueError("expected at least 1 image, got none: give some, or None for noise")
    channels = getattr(model, "in_chans", None)
    if images.ndim not in (4, 5) or channels not in (None, images.shape[-3]):
        raise ValueError(
            f"expected images (B, {channels}, H, W) or frames (B, T, {channels}, H, W), got {tuple(images.shape)}: "
            "give those that the network takes"
        )


def with_channels(model: Any, size: Sequence[int]) -> tuple[int, ...]:
    """An input size ``(C, H, W)`` with the network's channels: ``create_model(in_chans=1)`` leaves the cfg's at 3."""
    return (getattr(model, "in_chans", size[0]), *size[1:])


def cycled(images: Tensor, count: int) -> Tensor:
    """The first ``count`` of the images, which are repeated where there are fewer."""
    return images.repeat(-(-count // len(images)), *[1] * (images.ndim - 1))[:count]


@float32_as("ieee")
@torch.no_grad()
def compare(
    path: Path,
    contents: str,
    network: nn.Module,
    images: Tensor,
    run: Callable[[Tensor], Tensor],
    batch_size: int | None,
    exact: bool = False,
) -> ExportReport:
    """Compare a file's answers with a network's.

    Args:
        path: The file.
        contents: What it holds, in words.
        network: Images to logits ``(B, classes)``, or of each step ``(B, T, classes)``.
        images: All of them.
        run: What the file computes.
        batch_size: All that it takes; None for any.
        exact: Whether its format promises the same answers to the bit.
    """
    difference, flips = 0.0, 0
    for some in images.split(batch_size or _BATCH):
        given = some if batch_size is None else cycled(some, batch_size)
        expected, found = (y[: len(some)].cpu().double() for y in (network(given), run(given)))
        # A NaN in one of the two is a difference like no other; NaN in both, as of images with NaN, is none.
        both = (expected == found) | (expected.isnan() & found.isnan())
        apart = (expected - found).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(both, 0.0)
        difference = max(difference, float(apart.max()))
        differs = expected.argmax(-1) != found.argmax(-1)
        flips += int(differs.flatten(1).any(1).sum() if differs.ndim > 1 else differs.sum())
    return ExportReport(path, contents, len(images), difference, flips, exact)


def description(model: Any, label_names: tuple[str, ...]) -> dict[str, Any]:
    """What a reader of a file needs to know beside it: how images are normalised, and what the classes are called."""
    from .. import __version__

    cfg = getattr(model, "pretrained_cfg", None) or {}
    known = {name: cfg[name] for name in ("architecture", "input_size", "mean", "std") if cfg.get(name) is not None}
    if "input_size" in known:
        known["input_size"] = with_channels(model, known["input_size"])
    labels = {"label_names": list(label_names)} if label_names else {}
    return {"producer": f"timm_gac {__version__}", "num_steps": model.num_steps, **known, **labels}
