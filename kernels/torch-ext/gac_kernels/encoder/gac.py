"""Gated attention coding: repetition over time, gate and neuron in one pass.

``y[t] = sigmoid(temporal[b, t] * spatial) * LIF(x)[t]``. For a static image x and spatial are (B, C, H, W) and the
T-fold repetition exists only in registers; for input that varies over time they are (T, B, C, H, W). One pair of
kernels serves both: STATIC loads once and sums the gradient over time. A sample's (C, H, W) block is walked in its own
memory order, so contiguous and channels-last work as they lie.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_gate, check_spec
from ..common.fake import register_fake
from ..common.layout import as_layout, on_device
from ..common.triton import cdiv, launchable
from ..derivatives import differentiable_gradients, register_derivatives, spec_of
from ..neuron.values import check_learnable, check_values, named_values, stack_values
from ..reference import gac_encode_reference, gated_lif_reference
from ..registry import kernel_constants, states_by
from ..spec import CIFAR, LIFSpec
from ..tuning import launch_config
from . import eager
from .gated_lif_kernels import gated_bwd_kernel, gated_fwd_kernel

CHUNK = 8  # steps held in registers at once, as in neuron/lif.py


def frames_like(x: Tensor, *outer: int) -> Tensor:
    """Unwritten (*outer, C, H, W): outer axes in order, each (C, H, W) block in the memory order of x's blocks."""
    block = x[(0,) * (x.dim() - 3)] if x.numel() else x.new_empty(x.shape[-3:])
    strides = list(torch.empty_like(block).stride())
    span = block.numel()
    for size in reversed(outer):
        strides.insert(0, span)
        span = span * size
    return torch.empty_strided((*outer, *block.shape), strides, dtype=x.dtype, device=x.device)


def geometry(x: Tensor, y: Tensor, op: str) -> tuple[tuple[int, ...], dict[str, int], int]:
    """Kernel arguments (size, tiles, strides of x and of y), launch parameters and the number of programs."""
    config = launch_config(op, y.shape[0], x.element_size(), x.device)
    if y.shape[0] > CHUNK and "TILES" in config:
        config = config | {"TILES": 1}  # beyond one chunk the temporal sums leave the registers step by step
    size = x[(0,) * (x.dim() - 3)].numel()
    tiles = cdiv(size, config["BLOCK"] * config.get("TILES", 1))
    x_step = size * y.shape[1] if x.dim() == 5 else 0
    return (size, tiles, x_step, size, size * y.shape[1], size), config, tiles * y.shape[1]


def value_arguments(values: Tensor | None, frame: Tensor) -> tuple[int | None, int | None]:
    """Kernel arguments by which a place of a frame (..., C, H, W) finds its channel; None without values."""
    if values is None:
        return None, None
    return (frame.stride(-3), values.shape[1]) if values.shape[1] > 1 else (1, 1)


def places_like(values: Tensor | None, x: Tensor, batch: int) -> Tensor | None:
    """Unwritten float32 gradients (rows, B, C, H, W) at the values, one a place in the memory order of x."""
    return None if values is None else torch.empty_like(frames_like(x, len(values), batch), dtype=torch.float32)


def sum_places(places: Tensor | None, grad_values: Tensor | None) -> None:
    """Sum gradients of places (rows, B, C, H, W) into (rows, N), in a fixed order."""
    if places is not None and grad_values is not None:
        per_channel = places.sum((1, 3, 4)) if grad_values.shape[1] > 1 else places.sum((1, 2, 3, 4))[:, None]
        grad_values.copy_(per_channel)


def _forward_triton(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    y: Tensor,
    threshold: float,
    decay: float,
    soft_reset: bool,
    values: Tensor | None = None,
    surrogate: int = 0,
) -> None:
    sizes, config, programs = geometry(x, y, "gac_fwd")
    with on_device(x):
        launchable(gated_fwd_kernel)[(programs,)](
            x,
            spatial,
            temporal,
            y,
            values,
            *value_arguments(values, y),
            *sizes,
            T=y.shape[0],
            STATIC=x.dim() == 4,
            THRESHOLD=threshold,
            DECAY=decay,
            SOFT=soft_reset,
            **kernel_constants(surrogate, backward=False),
            **config,
        )


def _backward_triton(
    grad: Tensor,
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    grad_x: Tensor,
    grad_spatial: Tensor,
    grad_temporal: Tensor,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    values: Tensor | None = None,
    grad_values: Tensor | None = None,
) -> None:
    sizes, config, programs = geometry(x, grad, "gac_bwd")
    num_steps, batch = grad.shape[:2]
    places = places_like(values, x, batch)
    chunks = cdiv(num_steps, CHUNK)
    # One partial sum a program and step, added up by torch in a fixed order: no atomics, so the same bits every time.
    partial = torch.empty((batch, programs // batch, num_steps), dtype=torch.float32, device=x.device)
    constants = kernel_constants(surrogate, backward=True)
    scratch = partial.new_empty(programs * chunks * config["BLOCK"] * states_by(surrogate) if chunks > 1 else 0)
    with on_device(x):
        gated_bwd_kernel[(programs,)](
            grad,
            x,
            spatial,
            temporal,
            grad_x,
            grad_spatial,
            partial,
            scratch,
            values,
            places,
            *value_arguments(values, grad),
            *sizes,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            STATIC=x.dim() == 4,
            THRESHOLD=threshold,
            DECAY=decay,
            WIDTH=width,
            DETACH=detach_reset,
            SOFT=soft_reset,
            **constants,
            **config,
        )
    grad_temporal.copy_(partial.sum(1))
    sum_places(places, grad_values)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "gated_lif(Tensor x, Tensor spatial, Tensor temporal, float threshold, float decay, int surrogate, float width, "
    "bool detach_reset, bool soft_reset, Tensor? values=None) -> Tensor"
)
_lib.define(
    "gated_lif_backward(Tensor grad, Tensor x, Tensor spatial, Tensor temporal, float threshold, float decay, "
    "int surrogate, float width, bool detach_reset, bool soft_reset) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "gated_lif_backward_learned(Tensor grad, Tensor x, Tensor spatial, Tensor temporal, float threshold, float decay, "
    "int surrogate, float width, bool detach_reset, bool soft_reset, Tensor values) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "gated_lif", "CompositeExplicitAutograd")
def _gated_lif(x, spatial, temporal, threshold, decay, surrogate, width, detach_reset, soft_reset, values=None):
    if values is not None:
        check_values(values)
        check_learnable(surrogate)
        values = values.contiguous()
    y = _gated_lif_fake(
        x=x,
        spatial=spatial,
        temporal=temporal,
        threshold=threshold,
        decay=decay,
        surrogate=surrogate,
        width=width,
        detach_reset=detach_reset,
        soft_reset=soft_reset,
    )
    if y.numel():
        like = frames_like(x, *x.shape[:-3])
        run = _forward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.gated_lif_forward
        sources = as_layout(x, like), as_layout(spatial, like), temporal.contiguous()
        run(*sources, y, threshold, decay, soft_reset, values, surrogate)
    return y


@torch.library.impl(_lib, "gated_lif_backward_learned", "CompositeExplicitAutograd")
def _gated_lif_backward_learned(*args: Any):
    *rest, values = args
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    run: Any = _gated_lif_backward
    return *run(*rest, values.contiguous(), grad_values), grad_values


@torch.library.impl(_lib, "gated_lif_backward", "CompositeExplicitAutograd")
def _gated_lif_backward(
    grad,
    x,
    spatial,
    temporal,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    values=None,
    grad_values=None,
):
    grad_x, grad_spatial, grad_temporal = backward_outputs(x, temporal)
    if grad.numel():
        sources = as_layout(x, grad_x), as_layout(spatial, grad_spatial), temporal.contiguous()
        grad = as_layout(grad, frames_like(x, *grad.shape[:2]))
        run = _backward_triton if resolve_backend(x.device, x.dtype) == "triton" else eager.gated_lif_backward
        run(
            grad,
            *sources,
            grad_x,
            grad_spatial,
            grad_temporal,
            threshold,
            decay,
            surrogate,
            width,
            detach_reset,
            soft_reset,
            values,
            grad_values,
        )
    else:
        grad_temporal.zero_()
    return grad_x, grad_spatial, grad_temporal


def backward_outputs(x: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten gradients at x, spatial and temporal."""
    like = frames_like(x, *x.shape[:-3])
    return like, torch.empty_like(like), torch.empty_like(temporal, memory_format=torch.contiguous_format)


@register_fake("gac_kernels::gated_lif", lib=_lib)
def _gated_lif_fake(x, spatial, temporal, threshold, decay, surrogate, width, detach_reset, soft_reset, values=None):
    check_current("x", x, min_dims=4, max_dims=5)
    check_gate(x, spatial, temporal)
    return frames_like(x, temporal.shape[1], x.shape[-4])


@register_fake("gac_kernels::gated_lif_backward", lib=_lib)
def _gated_lif_backward_fake(grad, x, spatial, temporal, threshold, decay, surrogate, width, detach_reset, soft_reset):
    return backward_outputs(x, temporal)


@register_fake("gac_kernels::gated_lif_backward_learned", lib=_lib)
def _gated_lif_backward_learned_fake(grad, x, spatial, temporal, *args: Any):
    return *backward_outputs(x, temporal), torch.empty_like(args[-1], memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    x, spatial, temporal, *ctx.spec_args, values = inputs
    ctx.save_for_backward(x, spatial, temporal, values)


def _backward(ctx, grad):
    *sources, values = ctx.saved_tensors
    if values is not None:
        *grads, at_values = torch.ops.gac_kernels.gated_lif_backward_learned(grad, *sources, *ctx.spec_args, values)
        return *grads, *[None] * 6, at_values
    grads = torch.ops.gac_kernels.gated_lif_backward(grad, *sources, *ctx.spec_args)
    return *grads, *[None] * 7


def define(x, spatial, temporal, values, spec):
    """Its definition in PyTorch, of a static or varying input."""
    op = gac_encode_reference if x.dim() == 4 else gated_lif_reference
    return op(x, spatial, temporal, spec, **named_values(values))


def _backward_again(ctx, grad):
    function = functools.partial(define, spec=spec_of(*ctx.spec_args))
    *grads, at_values = differentiable_gradients(function, ctx.saved_tensors, [grad])
    return *grads, *[None] * 6, at_values


def _definition(x, spatial, temporal, *args: Any):
    *spec_args, values = args
    return define(x, spatial, temporal, values, spec_of(*spec_args))


register_derivatives(
    _lib,
    "gated_lif",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=_definition,
    defaults=(None,),
)


def _call(
    x: Tensor, spatial: Tensor, temporal: Tensor, spec: LIFSpec, decay: Tensor | None, threshold: Tensor | None
) -> Tensor:
    values = stack_values(x, x.shape[-3], spec, decay, threshold)
    return torch.ops.gac_kernels.gated_lif(x, spatial, temporal, *spec.op_arguments, values)


def gac_encode(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Gated attention coding of a static image: repetition, neuron and gate in one pass.

    ``y[t] = sigmoid(temporal[:, t] * spatial) * LIF(stem repeated T times)[t]``. The repeated tensor never exists in
    memory. Gradients flow to all three inputs and are deterministic. Saved for backward: the three inputs.

    Args:
        stem: (B, C, H, W), the stem's output; float32, float16, bfloat16 or float64; any dense memory format.
        spatial: (B, C, H, W), spatial-channel attention before the sigmoid, in stem's dtype.
        temporal: (B, T), temporal attention before the sigmoid, any floating dtype.
        spec: Dynamics and surrogate gradient of the neuron.
        decay: In the place of the spec's, with a gradient: one element or (C,), any floating dtype, between 0 and 1.
        threshold: Likewise, above 0.

    Returns:
        Gated spikes (T, B, C, H, W) in stem's dtype and memory format, values in [0, 1).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, T is 0, decay or threshold is, on a CPU, out of
            range, or the forced backend cannot run here.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    check_spec(spec)
    check_current("stem", stem, min_dims=4, max_dims=4)
    check_gate(stem, spatial, temporal)
    return _call(stem, spatial, temporal, spec, decay, threshold)


def gated_lif(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Gated attention coding of an input that varies over time, such as event frames.

    ``y[t] = sigmoid(temporal[:, t] * spatial[t]) * LIF(x)[t]``.

    Args:
        x: (T, B, C, H, W), input current; float32, float16, bfloat16 or float64.
        spatial: (T, B, C, H, W), spatial-channel attention before the sigmoid, in x's dtype.
        temporal: (B, T), temporal attention before the sigmoid, any floating dtype.
        spec: Dynamics and surrogate gradient of the neuron.
        decay: In the place of the spec's, with a gradient: one element or (C,), any floating dtype, between 0 and 1.
        threshold: Likewise, above 0.

    Returns:
        Gated spikes (T, B, C, H, W) in x's dtype, time outermost, values in [0, 1).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, T is 0, decay or threshold is, on a CPU, out of
            range, or the forced backend cannot run here.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    check_spec(spec)
    check_current("x", x, min_dims=5, max_dims=5)
    check_gate(x, spatial, temporal)
    return _call(x, spatial, temporal, spec, decay, threshold)
