"""What the demonstration shows of one picture: classes, spikes, gate and energy, computed from a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor

from timm_gac.data.pictures import PictureError, create_picture_transform, read_picture
from timm_gac.energy import EnergyMeter, EnergyReport
from timm_gac.hub import load_model
from timm_gac.hub.dataset import DIGITS
from timm_gac.hub.facts import Facts, gather
from timm_gac.inference.record import record_spikes
from timm_gac.models.ann_resnet import refuse_ann

MAX_FILE_BYTES = 20 << 20
MAX_PIXELS = 25_000_000  # 75 MB in memory, and only while it is prepared


@dataclass(frozen=True)
class Analysis:
    """What one picture does in the network.

    Attributes:
        prepared: The picture as the network sees it, (H, W, C) in [0, 1].
        steps: Logits of each time step, (T, classes).
        spikes: Output of each neuron layer, (T, C, H, W), in the order of the forward pass.
        gate: Gate of the encoder, mean over channels, (T, H, W); None with direct coding.
        report: What its convolutions and linear layers computed.
    """

    prepared: Tensor
    steps: Tensor
    spikes: dict[str, Tensor]
    gate: Tensor | None
    report: EnergyReport

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities after 1 to T time steps, (T, classes): softmax of the mean logits so far."""
        count = torch.arange(1, len(self.steps) + 1, dtype=self.steps.dtype)
        return (self.steps.cumsum(0) / count[:, None]).softmax(1)

    @property
    def rates(self) -> dict[str, float]:
        """Firing rate of each neuron layer: spikes per neuron and time step."""
        return {name: (spikes != 0).float().mean().item() for name, spikes in self.spikes.items()}

    @property
    def energy(self) -> dict[str, float]:
        """Microjoules of this picture: ``strict`` and as the ``paper`` counts, and of the same layers as an ``ann``."""
        totals = self.report.totals()
        return {name: 1000 * totals[name]["energy_mj"] for name in ("strict", "paper", "ann")}


class Network:
    """A model folder, ready to analyse pictures on the CPU.

    Args:
        folder: Model folder.

    Raises:
        ValueError: It is no model folder of timm_gac, or that of an ANN.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: Any = load_model(folder)
        refuse_ann(self.model, "a page that shows spikes")
        self.facts: Facts = gather(folder, folder)
        self.config = timm.data.resolve_data_config(pretrained_cfg=self.model.pretrained_cfg)
        self._transform = create_picture_transform(self.model.pretrained_cfg)
        self._lock = Lock()

    @cached_property
    def labels(self) -> list[str]:
        """A name for each class."""
        if self.facts.label_names:
            return [name.replace("_", " ") for name in self.facts.label_names]
        kind = "digit" if self.facts.dataset == DIGITS else "class"
        return [f"{kind} {index}" for index in range(self.facts.num_classes)]

    def prepare(self, picture: Image.Image) -> Tensor:
        """A picture as the network's input, (1, C, H, W), prepared as `timm-gac predict` does.

        For networks of one channel, dark ink on a light ground is inverted: they were trained on light digits.
        """
        channels = self.config["input_size"][0]
        if channels not in (1, 3):
            raise ValueError(f"expected a network for grey or colour pictures, got one for {channels} channels")
        pixels = self._transform(read_picture(picture, channels))[None]
        if channels == 1:
            border = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], -1)
            pixels = -pixels if border.mean() > 0 else pixels
        return pixels

    @torch.no_grad()
    def analyse(self, pixels: Tensor) -> Analysis:
        """Run a picture through the network and record what happens in it; one visitor's after the other.

        Args:
            pixels: Of `prepare`.
        """
        mean, std = (torch.tensor(self.config[key])[:, None, None] for key in ("mean", "std"))
        meter = EnergyMeter(self.model)
        with self._lock, meter, record_spikes(self.model) as recording:
            steps = self.model.forward_steps(pixels)[0]
        gate = None if recording.gate is None else recording.gate[0].mean(1)
        spikes = {
            name: tensor.unflatten(0, (self.facts.num_steps, -1))[:, 0]
            for name, tensor in recording.spikes.items()
            if name != "encoder"  # its spikes are gated: real values
        }
        prepared = (pixels[0] * std + mean).clamp(0, 1).permute(1, 2, 0)
        return Analysis(prepared=prepared, steps=steps, spikes=spikes, gate=gate, report=meter.report())


def open_picture(file: Path) -> Image.Image:
    """A picture file that anybody may have sent, upright and in memory.

    Raises:
        ValueError: The file is too large, no picture, damaged, or has too many pixels.
    """
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"Please choose a picture of at most {MAX_FILE_BYTES >> 20} MB; this one has {size >> 20} MB.")
    try:
        with Image.open(file) as picture:  # reads its head alone
            width, height = picture.size
    except Image.UnidentifiedImageError as error:
        raise ValueError("This file is not a picture. Please choose a PNG, JPEG or WebP file.") from error
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"This picture is damaged and cannot be read ({type(error).__name__}).") from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"Please choose a picture of at most {MAX_PIXELS // 1_000_000} megapixels; this one has "
            f"{width} x {height} pixels."
        )
    try:
        return read_picture(file)
    except PictureError as error:
        raise ValueError("This picture is damaged, or of a kind that cannot be read.") from error
