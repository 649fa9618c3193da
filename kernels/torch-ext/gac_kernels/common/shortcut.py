"""The 1x1 convolution of a block's shortcut: its stride, and the plain convolution where no kernel fuses it."""

from __future__ import annotations

import torch
from torch import Tensor


def shortcut_stride(size: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Stride of a 1x1 convolution without padding: 1 or 2, or 0 where neither brings ``size`` to ``out``.

    Args:
        size: Rows and columns of its input.
        out: Rows and columns of its output.
    """
    return next((s for s in (1, 2) if tuple((n - 1) // s + 1 for n in size) == tuple(out)), 0)


def convolve_shortcut(residual: Tensor, weight: Tensor, out: tuple[int, ...]) -> Tensor:
    """The convolution of a residual with a weight (C', C'', 1, 1), to so many rows and columns; channels-last."""
    stride = [shortcut_stride(tuple(residual.shape[2:]), out)] * 2
    result = torch.ops.aten.convolution(residual, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1)
    return result.contiguous(memory_format=torch.channels_last)  # cuDNN's mostly is already
