"""What processes that train together tell each other, fit for a CUDA graph: nothing here waits for the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average_gradients", "combine_statistics", "share_tensors"]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(gradients[0], ctx.group), None


def combine_statistics(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the values of all processes from those of each, in one collective, with a backward pass.

    No difference of two large sums is taken, and processes may have different numbers of values.

    Args:
        mean: Of this process's values, (C,).
        var: Their biased variance, (C,).
        count: How many a channel there are on this process.
        group: Of processes; all where None.

    Returns:
        Mean (C,), biased variance (C,) and number of values (1,) of all processes, the same bits on each.
    """
    # A row a process, zero in all others' copies. Nothing comes from the host, which a CUDA graph would refuse.
    rows = torch.arange(dist.get_world_size(group), device=mean.device)[:, None] == dist.get_rank(group)
    table = _AllReduce.apply(rows * torch.cat((mean, var, mean.new_full((1,), float(count)))), group)
    means, variances, counts = table.split([len(mean), len(mean), 1], 1)
    total = counts.sum(0)
    shares = counts / total
    mean_of_all = (shares * means).sum(0)
    return mean_of_all, (shares * (variances + (means - mean_of_all) ** 2)).sum(0), total


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in one all-reduce: what DDP does bucket by bucket.

    DDP's hooks start while the backward pass still runs, which hides the exchange but needs its own rules in a CUDA
    graph (side stream, eleven eager steps). This is a plain call after the backward pass.

    Args:
        parameters: In the same order on every process, with gradients of one dtype; those without any are left out,
            and must be so on every process.
    """
    gradients = [_in_memory_order(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat(gradients)
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    torch._foreach_copy_(gradients, flat.split([len(gradient) for gradient in gradients]))


def _in_memory_order(x: Tensor) -> Tensor:
    """A dense tensor of any memory format as a flat view: no copy, so that what is written there is written to it."""
    strides = x.stride()
    return x.permute(sorted(range(x.ndim), key=lambda axis: -strides[axis])).view(-1)


@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values; nothing where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()  # NCCL takes no channels-last
            dist.broadcast(whole, 0)
            tensor.copy_(whole)
