"""Detection of NaN and infinity in a run: a comparison with NaN is false, so spikes hide it from all that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["NotFiniteError", "count_not_finite", "names_not_finite"]


class NotFiniteError(ValueError):
    """A loss, gradient, weight or statistic is NaN or infinite; the message says where and when."""


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """How many floating-point tensors on ``device`` hold NaN or infinity; a float32 scalar there. Does not wait."""
    watched = [t.detach() for t in tensors if t.is_floating_point() and t.device == device and t.numel()]
    largest = torch._foreach_norm(watched, math.inf)
    finite = torch.isfinite(torch.stack([value.float() for value in largest]))
    return (~finite).sum().float()


def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity. Waits for the device."""
    return [name for name, t in tensors if t.is_floating_point() and not torch.isfinite(t).all()]
