"""The smallest model benchmark, and a network with weights for it."""

from __future__ import annotations

import timm
import torch
from torch import nn

from timm_gac.bench import check as bench_check
from timm_gac.bench.model import ModelBenchConfig

TINY = ModelBenchConfig(
    model="test_gac_msresnet",
    modes=("train", "infer"),
    precisions=("float32",),
    num_steps=(2,),
    providers=("timm_gac", "loop", "convolutions"),
    train_batch=4,
    infer_batch=3,
    image_size=8,
    steps=3,
    commit="abc1234",
    device="cpu",
)


def prepared(name: str, size: int, **kwargs: object) -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model(name, **kwargs)
    images = torch.randn(4, 3, size, size)
    bench_check.prepare_weights(model, images)
    return model, images
