"""Statistics of batch norms: of a batch, and the running ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gac_kernels.norm.batch_stats import blend_running


def uses_batch(norm: nn.Module) -> bool:
    """Whether a batch norm normalises with statistics of the batch: in training, unless it is frozen."""
    return norm.training and isinstance(norm, _BatchNorm)


def batch_statistics(norm: Any, x: Tensor, buffers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; a batch norm's buffers are brought up to date where it trains."""
    if not (norm.training and norm.track_running_stats):
        mean, var = torch.ops.gac_kernels.batch_stats(x, None, None, 0.0, None)
        return mean, var
    running = (buffers["running_mean"], buffers["running_var"])
    counter = counter_beside(x, buffers["num_batches_tracked"])
    if norm.momentum is not None:
        mean, var = torch.ops.gac_kernels.batch_stats(x, *running, norm.momentum, counter)
        return mean, var
    mean, var = torch.ops.gac_kernels.batch_stats(x, None, None, 0.0, counter)
    count = x.numel() // x.shape[1]
    update_running(buffers, mean, var * (count / (count - 1.0)), None)
    return mean, var


def counter_beside(x: Tensor, counter: Tensor | None) -> Tensor | None:
    """A batch norm's counter for the kernel to count; one on another device is counted here, and None is returned.

    `timm.utils.unfreeze` leaves the counters of a network on a GPU on the CPU.
    """
    if counter is None or counter.device == x.device:
        return counter
    counter.add_(1)
    return None


def update_running(buffers: dict[str, Any], mean: Tensor, unbiased_var: Tensor, momentum: float | None) -> None:
    """Bring running statistics up to date, without a host synchronisation where they are cumulative.

    Those of a channel of which one would not be finite stay as they are.
    """
    running_mean, running_var, count = (
        buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    if running_mean is None or running_var is None:
        return
    weight = momentum
    if weight is None:
        if count is None:
            return
        weight = 1.0 / count.to(mean)
    blend_running((running_mean, running_var), (mean, unbiased_var), weight)


def call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Call a norm as a module; running statistics of a channel that would not be finite stay as they were.

    PyTorch's own batch norms take NaN into them for good, and the neuron behind hides it. Nothing waits for the host.
    """
    kept = [getattr(norm, name, None) for name in ("running_mean", "running_var")]
    running = [value for value in kept if isinstance(value, Tensor)]
    if not (uses_batch(norm) and len(running) == 2 and isinstance(x, Tensor)):  # under fx x is none
        return norm(x)
    before = [value.clone() for value in running]
    out: Tensor = norm(x)
    with torch.no_grad():
        finite = running[0].isfinite() & running[1].isfinite()
        for value, old in zip(running, before, strict=True):
            value.data.copy_(torch.where(finite, value, old))  # the norm keeps it for backward, which does not read it
    return out


def process_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes that a synchronised batch norm shares its statistics with."""
    found = getattr(norm, "process_group", None)
    return dist.group.WORLD if found is None else found


def is_synchronised(norm: nn.Module) -> bool:
    """Whether a batch norm shares its statistics with other processes."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(process_group(norm)) > 1


@contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[None]:
    """Forward passes in training leave the running statistics of a module's batch norms as they are, after ``with``.

    They are put back, not left out: PyTorch's own batch norms save them for the backward pass, and a recomputation has
    to save as many tensors as the first pass did.
    """
    names = ("running_mean", "running_var", "num_batches_tracked")
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    found = [getattr(norm, name) for norm in norms if norm.track_running_stats for name in names]
    buffers = [buffer for buffer in found if isinstance(buffer, Tensor)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:  # also where a recomputation stops early, by an exception
        for buffer, old in zip(buffers, before, strict=True):
            buffer.data.copy_(old)  # what a norm has saved is not read by its backward pass
