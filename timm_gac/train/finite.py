"""Detection of NaN and infinity in a run, without waiting for the device, and the error that says where it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["NotFiniteError", "count_not_finite", "not_finite", "tensors_of"]


class NotFiniteError(ValueError):
    """A loss, gradient, weight or statistic is NaN or infinite; the message says where and when."""


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """How many floating-point tensors on ``device`` hold NaN or infinity; a float32 scalar there. Does not wait.

    Compared by type: a process has one device, which some call "cuda" and others "cuda:0", "cpu" or "cpu:1".
    """
    watched = [t.detach() for t in tensors if t.is_floating_point() and t.device.type == device.type and t.numel()]
    if not watched:
        return torch.zeros((), device=device)
    largest = torch._foreach_norm(watched, math.inf)
    finite = torch.isfinite(torch.stack([value.float() for value in largest]))
    return (~finite).sum().float()


def tensors_of(
    network: nn.Module, average: Mapping[str, Tensor] | None, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a run carries on: weights, statistics, their average, gradients, optimiser state."""
    yield from network.state_dict().items()
    yield from ((f"average of {name}", tensor) for name, tensor in (average or {}).items())
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            yield f"gradient of {name}", parameter.grad
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", value


def not_finite(loss: float, names: Sequence[str], when: str, kept: Path | None) -> NotFiniteError:
    """The error of a run that has met NaN or infinity.

    Args:
        loss: Mean loss since the last reading.
        names: Tensors that hold NaN or infinity.
        when: Between which steps.
        kept: The last checkpoint.
    """
    where = [] if math.isfinite(loss) else [f"a loss of {loss}"]
    where += [f"NaN or infinity in {', '.join(names[:3])}"] if names else []
    where += [f"{len(names) - 3} more tensors"] if len(names) > 3 else []
    found = "there is no checkpoint before it"
    if kept is not None:
        found = f"the last finite checkpoint is {kept}, from which --resume goes on"
    return NotFiniteError(
        f"expected finite numbers, got {', '.join(where) or 'others in another process'} {when}: {found}; where it "
        "comes again, begin anew with a lower lr or with clip_grad"
    )
