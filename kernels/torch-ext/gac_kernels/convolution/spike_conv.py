"""3x3 convolution of spikes with 8-bit weights, folded batch norm, residual and multi-step LIF in one pass.

Spikes (T*B, C, H, W) as int8 go in and come out; the convolution is summed in integers, so it is exact. A program owns
a tile of pixels by output channels at all time steps: the membrane potential never leaves its registers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import check_flags, check_spec, check_spike_conv, check_tensors, conv3x3_shape
from ..common.fake import register_fake
from ..common.layout import on_device, packed
from ..common.shortcut import convolve_shortcut
from ..common.triton import cdiv, is_embedding, launchable, next_power_of_2
from ..derivatives import refuse_forward_mode, register_no_derivatives
from ..reference import grid_shift, on_grid
from ..spec import CIFAR, LIFSpec
from . import eager, onednn
from .dispatch import Shape, spike_conv_backend, spike_conv_config
from .hopper import launch as hopper
from .spike_conv_kernel import spike_conv_kernel

_logger = logging.getLogger(__name__)


def _forward_triton(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    shift: float,
    out: Tensor,
    membrane: Tensor,
    shortcut: Tensor | None = None,
) -> None:
    shape = Shape.of(spikes, weight, stride, residual is not None, shortcut is not None)
    config = spike_conv_config("spike_conv_hopper", shape, spikes.device)
    arguments: dict[str, Any] = dict(
        spikes=spikes,
        weight=weight,
        scale=scale,
        bias=bias,
        num_steps=num_steps,
        stride=stride,
        threshold=threshold,
        decay=decay,
        soft_reset=soft_reset,
        shift=shift,
        out=out,
        membrane=membrane,
        config=config,
    )
    refusal = hopper.run(**arguments, residual=residual, shortcut=shortcut)
    if refusal and residual is not None and shortcut is not None:
        residual = convolve_shortcut(residual, shortcut, tuple(out.shape[2:]))
        refusal = hopper.run(**arguments, residual=residual, shortcut=None)
    if not refusal:
        return
    _logger.debug("spike_conv of %s runs in plain Triton: %s", shape, refusal)
    channels, height, width = spikes.shape[1:]
    out_channels, out_height, out_width = out.shape[1:]
    config = dict(spike_conv_config("spike_conv", shape, spikes.device))
    # No larger than the channels need; 32 is the depth of one int8 tensor core instruction, 16 its least width.
    block_k = min(config.pop("BLOCK_K"), max(32, next_power_of_2(channels)))
    block_n = min(config.pop("BLOCK_N"), max(16, next_power_of_2(out_channels)))
    rows = out.numel() // (num_steps * out_channels)
    # A fused multiply-add rounds once where every other path rounds twice. Graphs know no such option; for a network on
    # the grid, whose products float32 holds, both are the same.
    unfused = {} if is_embedding() else {"enable_fp_fusion": False}
    with on_device(spikes):
        launchable(spike_conv_kernel)[(cdiv(rows, config["BLOCK_M"]) * cdiv(out_channels, block_n),)](
            spikes,
            weight,
            scale,
            bias,
            residual,
            out,
            membrane,
            rows,
            height,
            width,
            out_height,
            out_width,
            channels,
            out_channels,
            spikes.numel() // num_steps,
            out.numel() // num_steps,
            T=num_steps,
            STRIDE=stride,
            THRESHOLD=threshold,
            DECAY=decay,
            SOFT=soft_reset,
            RESIDUAL=residual is not None,
            SHIFT=shift,
            KEEP=membrane.numel() > 0,
            WHOLE_K=channels % block_k == 0,
            WHOLE_N=out_channels % block_n == 0,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            **unfused,
            **config,
        )


_FORWARD = {"eager": eager.forward, "onednn": onednn.forward, "triton": _forward_triton}

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "spike_conv(Tensor spikes, Tensor weight, Tensor scale, Tensor bias, Tensor? residual, int num_steps, int stride, "
    "float threshold, float decay, bool soft_reset, bool keep_membrane, float grid=0.0, Tensor? shortcut=None) "
    "-> (Tensor, Tensor)"
)


def _outputs(
    spikes: Tensor, weight: Tensor, residual: Tensor | None, stride: int, keep_membrane: bool
) -> tuple[Tensor, Tensor]:
    """Unwritten spikes and, where asked for, membrane."""
    size = conv3x3_shape(spikes, weight, stride)
    dtype = torch.float32 if residual is None or residual.dtype == torch.int8 else residual.dtype
    out = torch.empty(size, dtype=torch.int8, device=spikes.device, memory_format=torch.channels_last)
    membrane = torch.empty_like(out, dtype=dtype) if keep_membrane else spikes.new_empty(0, dtype=dtype)
    return out, membrane


@torch.library.impl(_lib, "spike_conv", "CompositeExplicitAutograd")
def _spike_conv(
    spikes,
    weight,
    scale,
    bias,
    residual,
    num_steps,
    stride,
    threshold,
    decay,
    soft_reset,
    keep_membrane,
    grid=0.0,
    shortcut=None,
):
    check_spike_conv(
        spikes=spikes,
        weight=weight,
        scale=scale,
        bias=bias,
        residual=residual,
        num_steps=num_steps,
        stride=stride,
        grid=grid,
        shortcut=shortcut,
    )
    refuse_forward_mode("spike_conv")
    out, membrane = _outputs(
        spikes=spikes,
        weight=weight,
        residual=residual,
        stride=stride,
        keep_membrane=keep_membrane,
    )
    if out.numel():
        scale, bias, residual, shortcut = (None if v is None else v.detach() for v in (scale, bias, residual, shortcut))
        scale, bias = packed((scale, bias))
        layout = torch.channels_last
        spikes, weight = (tensor.contiguous(memory_format=layout) for tensor in (spikes, weight))
        residual = None if residual is None else residual.contiguous(memory_format=layout)
        backend = spike_conv_backend(spikes.device)
        shortcut_argument = {}
        if shortcut is not None and backend == "triton":
            shortcut_argument = {"shortcut": shortcut.contiguous()}
        elif shortcut is not None:
            residual = convolve_shortcut(residual, shortcut, tuple(out.shape[2:]))
        shift = grid_shift(grid) if residual is not None and residual.is_floating_point() else 0.0
        _FORWARD[backend](
            spikes,
            weight,
            scale,
            bias,
            residual,
            num_steps,
            stride,
            threshold,
            decay,
            soft_reset,
            shift,
            out,
            membrane,
            **shortcut_argument,
        )
    return out, membrane


register_no_derivatives(_lib, "spike_conv")


@register_fake("gac_kernels::spike_conv", lib=_lib)
def _spike_conv_fake(
    spikes,
    weight,
    scale,
    bias,
    residual,
    num_steps,
    stride,
    threshold,
    decay,
    soft_reset,
    keep_membrane,
    grid=0.0,
    shortcut=None,
):
    return _outputs(
        spikes=spikes,
        weight=weight,
        residual=residual,
        stride=stride,
        keep_membrane=keep_membrane,
    )


# Tensors whose values were multiples of a grid: the grid, and their version and address then.
_on_grid: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _check_on_grid(grid: float, **vectors: Tensor) -> None:
    """Raise unless all values are multiples of the grid; not under a compiler or a capture, which read no values.

    A tensor is looked at once, and again after it was written to: on a GPU the host waits for the answer.
    """
    if not grid or torch.compiler.is_compiling():
        return
    for name, vector in vectors.items():
        if vector.is_meta or (vector.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        seen = None if vector.is_inference() else (grid, vector._version, vector.data_ptr())
        if seen is not None and _on_grid.get(vector) == seen:
            continue
        if not torch.equal(on_grid(vector, grid), vector):
            raise ValueError(
                f"expected {name} in multiples of grid={grid!r}, got other values: round it to these, or leave grid 0"
            )
        if seen is not None:
            _on_grid[vector] = seen


def spike_conv(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """``lif(conv3x3(spikes, weight) * scale + bias + residual)`` over T steps, with integer arithmetic inside.

    The convolution has padding 1 and is summed exactly; scale, bias, residual and neuron are float32 operations in the
    order written, rounded one by one, so every implementation returns the same bits. Inference only: no gradient.

    Where scale and bias are multiples of a power of two g and, by ``grid=g``, the residual is too, nothing else rounds,
    and the spikes are those of exact arithmetic, provided that decay is a power of two, the threshold, if the reset
    subtracts it, a multiple of ``g * decay**(T-1)``, residuals and the parts of currents are below ``2**22 * g`` and
    membranes below ``2**24 * g * decay**(T-1)``. Beyond that float32 rounds, to 24 bits of the larger operand.

    Args:
        spikes: (T*B, C, H, W) int8, 0 or 1, row ``t * B + b`` being sample b at step t; channels-last without a copy.
        weight: (C', C, 3, 3) int8, channels-last without a copy.
        scale: (C',) float32, what one unit of an output channel's weights stands for.
        bias: (C',) float32.
        num_steps: T.
        spec: What the neuron computes.
        stride: 1 or 2.
        residual: (T*B, C', H', W'), added to the neuron's input current: a floating dtype, or int8.
        return_membrane: Return the neuron's input current, in the residual's floating dtype or float32, as well. The
            neuron sees it before it is rounded to that dtype.
        grid: Round a floating-point residual to the nearest multiple of this, ties to even: a power of two from 2**-24
            to 1, of which scale and bias have to be multiples; 0 leaves it as it is.
        shortcut: (C', C'', 1, 1) in the residual's floating dtype: the residual is then (T*B, C'', H'', W''), and what
            is added is its convolution with this weight and a stride of 1 or 2, rounded to that dtype. Its sums have no
            prescribed order, so the last bit of what is added can differ between implementations.

    Returns:
        Spikes (T*B, C', H', W') int8, channels-last, H' = ceil(H / stride); with ``return_membrane`` the pair
        (current, spikes).

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, T does not divide the first axis, ``grid`` is no such
            power of two, or C is above 14,563, where sums of int8 weights may leave the integers that float32 holds.
    """
    check_spec(spec)
    check_tensors(residual=residual, shortcut=shortcut)
    check_flags(return_membrane=return_membrane)
    check_spike_conv(
        spikes=spikes,
        weight=weight,
        scale=scale,
        bias=bias,
        residual=residual,
        num_steps=num_steps,
        stride=stride,
        grid=grid,
        shortcut=shortcut,
    )
    _check_on_grid(grid, scale=scale, bias=bias)
    out, membrane = torch.ops.gac_kernels.spike_conv(
        spikes,
        weight,
        scale,
        bias,
        residual,
        num_steps,
        stride,
        *spec.forward_arguments,
        return_membrane,
        grid,
        shortcut,
    )
    return (membrane, out) if return_membrane else out
