"""3x3 convolution, residual and neuron, one after the other, and the grid on which these are exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.shortcut import shortcut_stride
from ..spec import CIFAR, LIFSpec
from .neuron import fire, state_dtype


def grid_shift(grid: float, dtype: torch.dtype = torch.float32) -> float:
    """What, added to numbers of ``dtype``, leaves no bits finer than ``grid``; taken away again, it makes `on_grid`."""
    return 1.5 * grid / torch.finfo(dtype).eps


def on_grid(x: Tensor, grid: float) -> Tensor:
    """The nearest multiples of a power of two, ties to even; in at least float32.

    Args:
        x: Any shape. float32 is rounded so up to 2**22 times the grid, float64 up to 2**51 times; integers, which are
            multiples already, come back as they are.
        grid: A power of two up to 1, or 0 for no rounding.
    """
    if not grid or not x.is_floating_point():
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    shift = grid_shift(grid, x.dtype)
    return (x + shift).sub_(shift)


def _convolve_shortcut(residual: Tensor, shortcut: Tensor, size: tuple[int, ...]) -> Tensor:
    """The 1x1 convolution of a residual to ``size`` rows and columns, summed in float64 and rounded to its dtype."""
    stride = shortcut_stride(tuple(residual.shape[2:]), size)
    return F.conv2d(residual.double(), shortcut.double(), None, stride).to(shortcut.dtype)


def spike_conv_reference(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_steps: int,
    spec: LIFSpec = CIFAR,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    return_membrane: bool = False,
    grid: float = 0.0,
    shortcut: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution, scale, bias, residual and multi-step LIF, one after the other.

    The convolution is summed in float64, which holds its integers exactly; all that follows is computed in ``dtype``:
    float64 for the network as mathematics has it, float32 for the bits that `spike_conv` returns. A shortcut's
    convolution is summed in float64 too, then rounded to its dtype.

    Args:
        spikes: (T*B, C, H, W), row ``t * B + b`` being sample b at step t.
        weight: (C', C, 3, 3); padding is 1.
        scale: (C',).
        bias: (C',).
        num_steps: T.
        spec: Dynamics.
        stride: 1 or 2.
        residual: (T*B, C', H', W'), added to the neuron's input current.
        return_membrane: Return the neuron's input current as well.
        grid: Round the residual to multiples of this, see `on_grid`.
        shortcut: (C', C'', 1, 1), which convolves the residual (T*B, C'', H'', W'') first.
        dtype: Of all that follows the convolution.

    Returns:
        Spikes (T*B, C', H', W') int8, H' = ceil(H / stride); with ``return_membrane`` the pair (current, spikes), the
        current in ``dtype``.
    """
    sums = F.conv2d(spikes.double(), weight.double(), None, stride, 1).to(dtype)
    current = sums * scale.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
    if residual is not None and shortcut is not None:
        residual = _convolve_shortcut(residual, shortcut, tuple(sums.shape[2:]))
    if residual is not None:
        current = current + on_grid(residual.to(dtype), grid)
    fired = fire(current, num_steps, spec).to(torch.int8)
    return (current, fired) if return_membrane else fired


def conv_lif_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_steps: int,
    spec: LIFSpec = CIFAR,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    return_membrane: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution, bias, residual and multi-step LIF, one after the other; sums of the convolutions in float64.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t.
        weight: (C', C, 3, 3) in x's dtype; padding is 1.
        bias: (C',).
        num_steps: T.
        spec: Dynamics.
        stride: 1 or 2.
        residual: (T*B, C', H', W') in x's dtype, added to the neuron's input current.
        return_membrane: Return the neuron's input current as well.
        shortcut: (C', C'', 1, 1) in x's dtype, which convolves the residual (T*B, C'', H'', W'') first.

    Returns:
        Spikes (T*B, C', H', W') in x's dtype, H' = ceil(H / stride); with ``return_membrane`` the pair (current,
        spikes), the current rounded to x's dtype after the neuron saw it.
    """
    current = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1).to(state_dtype(x.dtype))
    if residual is not None and shortcut is not None:
        residual = _convolve_shortcut(residual, shortcut, tuple(current.shape[2:]))
    if residual is not None:
        current = current + residual
    spikes = fire(current, num_steps, spec).to(x.dtype)
    return (current.to(x.dtype), spikes) if return_membrane else spikes
