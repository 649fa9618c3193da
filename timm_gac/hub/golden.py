"""Golden tensors: an input and the weights' output for it, stored beside the weights and checked after download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..runtime.files import write_bytes
from .folder import WEIGHTS, load_model, read_config
from .remote import GOLDEN

IMAGES = 4
# Both sides run in float64 on a CPU, where sums in another order differ by some 1e-15 of their size: a membrane would
# have to lie that close to its threshold for a spike to change. A changed weight changes spikes.
TOLERANCE = 1e-6
WEIGHTS_SHA = "weights_sha256"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        images: Number of golden images.
        difference: Largest absolute difference between golden and present logits, both in float64.
        same_weights: The weights file is byte for byte the one of the golden output.
        same_classes: float32 puts each image into the class that float64 does.
        class_logits: Number of logits an image.
    """

    images: int
    difference: float
    same_weights: bool
    same_classes: bool
    class_logits: int

    @property
    def passed(self) -> bool:
        """Same weights and, within the tolerance of 1e-6, same logits."""
        return self.same_weights and self.difference <= TOLERANCE


def golden_images(shape: tuple[int, int, int], count: int = IMAGES, seed: int = 0) -> Tensor:
    """Smooth random images ``(count, C, H, W)`` around 0 with the contrast of normalised photographs, in float32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], *(min(4, size) for size in shape[1:]), generator=generator)
    fine = torch.randn(count, *shape, generator=generator)
    return 1.2 * F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False) + 0.3 * fine


@torch.no_grad()
def write_golden(folder: Path, out: Path | None = None) -> Path:
    """Write golden.safetensors: ``input`` in float32, ``output`` in float64, and the SHA-256 of the weights file.

    Args:
        folder: Model folder.
        out: Folder to write to; the model folder if not given.

    Returns:
        The file.

    Raises:
        ValueError: The folder is no model folder; or its network gives the same logits for every image, as untrained
            ones do whose neurons are silent: such an output would prove nothing.
    """
    model = load_model(folder)
    cfg: Any = model.pretrained_cfg
    images = golden_images(tuple(cfg["input_size"]))
    output = model.double()(images.double())
    if torch.allclose(output[:1].expand_as(output), output, rtol=0, atol=TOLERANCE):
        raise ValueError(
            f"expected a network whose logits depend on the image, got one in {str(folder)!r} that gives the same for "
            "all: train it first"
        )
    file = (out or folder) / GOLDEN
    content = save({"input": images, "output": output.contiguous()}, {WEIGHTS_SHA: sha256(folder / WEIGHTS)})
    write_bytes(file, content)
    return file


@torch.no_grad()
def verify(folder: Path) -> Verification:
    """Rebuild the model of a folder and compare its logits with the golden ones kept there.

    Raises:
        ValueError: The folder is no model folder, or it holds no golden tensors, damaged ones, or ones that do not fit
            the model.
    """
    config = read_config(folder)
    if not (folder / GOLDEN).is_file():
        raise ValueError(f"expected {GOLDEN} in {str(folder)!r}, got none: it was not published by `timm-gac push`")
    try:
        with safe_open(folder / GOLDEN, "pt") as file:
            images, output = file.get_tensor("input"), file.get_tensor("output")
            digest = (file.metadata() or {}).get(WEIGHTS_SHA)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected input and output in {GOLDEN}, got {error}: download it again") from error
    model = load_model(folder)
    _check_shapes(images, output, model, config["num_classes"])
    single = model(images.float())
    present = model.double()(images.double())
    return Verification(
        images=len(images),
        difference=(present - output.double()).abs().max().item(),
        same_weights=digest == sha256(folder / WEIGHTS),
        same_classes=torch.equal(single.argmax(1), present.argmax(1)),
        class_logits=output.shape[1],
    )


def _check_shapes(images: Tensor, output: Tensor, model: nn.Module, num_classes: int) -> None:
    channels = model.in_chans
    if images.ndim != 4 or not len(images) or images.shape[1] != channels or output.shape != (len(images), num_classes):
        raise ValueError(
            f"expected golden images (N, {channels}, H, W) and logits (N, {num_classes}), got {tuple(images.shape)} "
            f"and {tuple(output.shape)}: {GOLDEN} belongs to another model"
        )


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
