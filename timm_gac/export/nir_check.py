"""What a NIR file computes, compared with the network that it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.record import record_spikes
from ..layers.encoder import DirectCoding
from ..runtime.dtypes import float32_as


@dataclass(frozen=True)
class NIRReport:
    """How a network read from a NIR file differs from the one written.

    Attributes:
        path: The file.
        samples: Samples compared.
        spikes: Spikes that all neurons of the written network emitted.
        flips: Neurons and steps where one of the two fired alone.
        largest_difference: Of the logits, averaged over the steps.
    """

    path: Path
    samples: int
    spikes: int
    flips: int
    largest_difference: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.path}: read back, {self.flips} of {self.spikes} spikes differ on {self.samples} samples; logits by "
            f"up to {self.largest_difference:.1e}"
        )


@float32_as("ieee")
@torch.no_grad()
def compare(model: Any, path: Path, written: nn.Module, currents: Tensor) -> NIRReport:
    """Compare a folded network with the file that it was written to.

    Args:
        model: The folded network, on the CPU.
        path: The file.
        written: What was read from it.
        currents: ``(T, B, C, H, W)`` from `graph_input`.
    """
    written.eval()
    membrane = currents.flatten(0, 1)
    if isinstance(model.encoder, DirectCoding):
        membrane = model.conv1(membrane)
    with record_spikes(model) as expected:
        logits = model.forward_head(model._run_stages(membrane)).unflatten(0, currents.shape[:2])
    with record_spikes(written) as found:
        outputs = written(currents).flatten(2)
    # The neurons form a chain, so both recordings have them in the same order.
    pairs = list(zip(expected.spikes.values(), found.spikes.values(), strict=True))
    return NIRReport(
        path=path,
        samples=currents.shape[1],
        spikes=sum(int(spikes.sum()) for spikes, _ in pairs),
        flips=sum(int((spikes != other).sum()) for spikes, other in pairs),
        largest_difference=float((logits.mean(0).flatten(1) - outputs.mean(0)).abs().max()),
    )
