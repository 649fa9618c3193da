"""Options of ``timm-gac demo``, which need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .sources import check_positive


@dataclass(frozen=True)
class DemoConfig:
    """What `run_demo` does.

    Args:
        out: Folder for the model, the spike raster and the result.
        overwrite: Write to ``out`` even if it holds files that the demo did not make.
        epochs: Passes over the training digits.
        num_steps: Time steps T of the spiking network.
        batch_size: Digits per training step.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW.
        seed: Seed of the weights and of the order of the digits.
    """

    out: Path = Path("demo")
    overwrite: bool = False
    epochs: int = 15
    num_steps: int = 4
    batch_size: int = 64
    lr: float = 5e-3
    weight_decay: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "num_steps", "batch_size")
        if not self.lr > 0:
            raise ValueError(f"expected a positive lr, got {self.lr}: try 0.005")
