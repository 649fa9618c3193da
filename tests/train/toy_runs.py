"""What tests of small training runs share: their options, and the weights that they leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from timm_gac.train import checkpoints
from timm_gac.train.loop import RunOptions


def options(out: Path, **changes: object) -> RunOptions:
    """Options of a run on a CPU that logs and saves every few steps."""
    return replace(RunOptions(out=out, cpu=True, log_steps=2, checkpoint_steps=3), **changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
