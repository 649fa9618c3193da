"""Small networks whose neurons fire, and images for them."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from timm_gac.hub import calibrate

T = 3


def images(batch: int, *frames: int) -> Tensor:
    return torch.randn(batch, *frames, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def network(**kwargs: object) -> nn.Module:
    """A network whose neurons fire."""
    model = timm.create_model("test_gac_msresnet", **dict(num_classes=7, num_steps=T) | kwargs)
    calibrate(model, [images(8)])
    return model


def small_network() -> nn.Module:
    """Two steps and one block, for exporters take long: a stem, both kinds of stride and of padding, a shortcut."""
    return network(num_steps=2, layers=(0, 1, 0))
