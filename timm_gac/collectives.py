"""What processes that train together tell each other, fit for a CUDA graph: nothing here waits for the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce", "average_gradients", "share_tensors"]


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


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of a tensor over all processes, with a backward pass: the sum of the processes' gradients.

    Args:
        x: Of one shape and dtype on every process.
        group: Of processes; all where None.
    """
    return _AllReduce.apply(x, group)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in one all-reduce: what DDP does bucket by bucket.

    DDP's hooks start while the backward pass still runs, which hides the exchange but needs its own rules in a CUDA
    graph (side stream, eleven eager steps). This is a plain call after the backward pass.

    Args:
        parameters: In the same order on every process, with gradients of one dtype; those without any are left out,
            and must be so on every process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    means = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, means)


@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values; nothing where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()  # NCCL takes no channels-last
            dist.broadcast(whole, 0)
            tensor.copy_(whole)
