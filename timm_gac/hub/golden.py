"""Golden tensors: an input and the weights' output for it, stored beside the weights and checked after download."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runtime.files import write_bytes
from .config import MAX_VALUES, read_config, short
from .folder import WEIGHTS, load_model
from .remote import GOLDEN

IMAGES = 4
MAX_IMAGES = 16
# Both sides run in float64 on a CPU, where sums in another order differ by some 1e-15 of their size: a membrane would
# have to lie that close to its threshold for a spike to change. A changed weight changes spikes.
TOLERANCE = 1e-6
WEIGHTS_SHA = "weights_sha256"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_FOREIGN = f"{GOLDEN} belongs to another model"


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
    output = _outputs(model.double(), images.double())
    if not bool(output.isfinite().all()):
        raise ValueError(f"expected finite logits of the network in {str(folder)!r}, got others: train it again")
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
    model = load_model(folder)
    images, output, digest = _read_golden(folder / GOLDEN, config, model)
    single = _outputs(model, images.float())
    present = _outputs(model.double(), images.double())
    if present.shape != output.shape:
        raise ValueError(f"expected logits {tuple(present.shape)}, got {tuple(output.shape)}: {_FOREIGN}")
    return Verification(
        images=len(images),
        difference=(present - output.double()).abs().max().item(),
        same_weights=digest == sha256(folder / WEIGHTS),
        same_classes=torch.equal(single.argmax(1), present.argmax(1)),
        class_logits=output.shape[1],
    )


def _outputs(model: Any, images: Tensor) -> Tensor:
    """Outputs ``(N, ...)`` for images ``(N, C, H, W)``, one image at a time to save memory, flattened to two axes."""
    return torch.cat([model(image[None]).flatten(1) for image in images])


def _read_golden(file: Path, config: dict[str, Any], model: Any) -> tuple[Tensor, Tensor, str | None]:
    """Golden images and output, and the checksum of the weights; the shapes are checked before a tensor is read.

    Raises:
        ValueError: The file is damaged, or belongs to another model.
    """
    _, height, width = config.get("pretrained_cfg", {}).get("input_size", model.pretrained_cfg["input_size"])
    expected = [model.in_chans, height, width]
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in ("input", "output")}
            found = {name: list(part.get_shape()) for name, part in slices.items()}
            types = {part.get_dtype() for part in slices.values()}
            if found["input"][1:] != expected or not 1 <= found["input"][0] <= MAX_IMAGES or not types <= _DTYPES:
                raise ValueError(
                    f"expected golden images (N, {', '.join(map(str, expected))}), N from 1 to {MAX_IMAGES}, got "
                    f"{short(found['input'])} of {', '.join(sorted(types))}: {_FOREIGN}"
                )
            size = found["output"]
            if size[:1] != found["input"][:1] or len(size) < 2 or math.prod(size) > MAX_VALUES:
                raise ValueError(f"expected logits of {found['input'][0]} images, got {short(size)}: {_FOREIGN}")
            images, output = tensors.get_tensor("input"), tensors.get_tensor("output").flatten(1)
            return images, output, (tensors.metadata() or {}).get(WEIGHTS_SHA)
    except (SafetensorError, OSError, LookupError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"expected input and output in {GOLDEN}, got {detail}: download it again") from error


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
