"""Memory layouts: which tensors a kernel can read as they are, and copies of the others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .triton import is_embedding


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order (strides of size-1 axes do not matter)."""
    if a.stride() == b.stride():
        return True
    return all(i == j or n <= 1 for i, j, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def as_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of the dense tensor ``like``: itself where it has them, else a copy."""
    return tensor if same_layout(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def packed(vectors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The vectors with their values side by side, as kernels read them: themselves, or copies."""
    return tuple([v if v is None or v.is_contiguous() else v.contiguous() for v in vectors])


def time_stride(x: Tensor) -> int:
    """Elements between two steps of a dense (T, ...) tensor."""
    return x.stride(0) if x.shape[0] > 1 else x.numel()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on the tensor's own GPU."""
    if is_embedding() or not tensor.is_cuda or tensor.device.index == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(tensor.device)
