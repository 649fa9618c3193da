"""Multi-step leaky integrate-and-fire: x (T, ...) to spikes (T, ...).

The backward pass keeps x (or, where the surrogate is a rectangle and the gradient does not need u, two bits a step)
and recomputes the membrane in registers. A (T, ...) tensor is walked as (outer, T, inner) in its own memory order, so
any dense memory format works as it lies; contiguous and channels-last tensors have outer = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_flags, check_spec, check_state, check_tensor
from ..common.fake import register_fake
from ..common.layout import as_layout, on_device, time_stride
from ..common.triton import cdiv, launchable
from ..derivatives import differentiable_gradients, register_derivatives, spec_of
from ..reference import lif_reference, state_dtype
from ..registry import kernel_constants, states_by
from ..spec import CIFAR, SURROGATES, LIFSpec
from ..tuning import launch_config
from . import eager, learned
from .lif_kernels import lif_bwd_kernel, lif_bwd_mask_kernel, lif_fwd_kernel
from .stepwise import state_memory
from .values import check_learnable, check_values, named_values, stack_values

CHUNK = 8  # steps held in registers at once; longer sequences keep one membrane a chunk in float32 scratch memory


def mask_dtype(num_steps: int) -> torch.dtype:
    """Smallest integer type that holds two bits a step."""
    sizes = {4: torch.uint8, 8: torch.int16, 16: torch.int32, 32: torch.int64}
    return next(dtype for steps, dtype in sizes.items() if num_steps <= steps)


def can_keep_mask(num_steps: int, surrogate: int, detach_reset: bool, soft_reset: bool) -> bool:
    """Whether two bits a step (fired, inside the window) are all that the backward pass of a LIF needs."""
    return surrogate == SURROGATES.index("rectangle") and (detach_reset or soft_reset) and num_steps <= 32


def _launch(kernel, x: Tensor, args: tuple, op: str, **constants: Any) -> None:
    """Run a kernel over all neurons of the dense sequence ``x``."""
    num_steps, inner = x.shape[0], time_stride(x)
    neurons = x.numel() // num_steps
    config = launch_config(op, num_steps, x.element_size(), x.device)
    block = config["BLOCK"]
    with on_device(x):
        launchable(kernel)[(cdiv(neurons, block),)](
            *args,
            neurons,
            inner,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            TIME_OUTER=inner == neurons,
            **config,
            **constants,
        )


def launch_forward(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    mask: Tensor,
    threshold: float,
    decay: float,
    width: float,
    soft_reset: bool,
    surrogate: int = 0,
) -> None:
    """Write spikes, in their own dtype, and, where they have elements, the last states and the bit mask."""
    _launch(
        lif_fwd_kernel,
        x,
        (x, state, spikes, last, mask),
        "lif_fwd",
        THRESHOLD=threshold,
        DECAY=decay,
        WIDTH=width,
        SOFT=soft_reset,
        HAS_STATE=state is not None,
        KEEP_MASK=mask.numel() > 0,
        RETURN_STATE=last.numel() > 0,
        **kernel_constants(surrogate, backward=False),
    )


def _backward_triton(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    mask: Tensor,
    grad_x: Tensor,
    grad_state: Tensor,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
) -> None:
    shared = dict(
        THRESHOLD=threshold,
        DECAY=decay,
        WIDTH=width,
        DETACH=detach_reset,
        SOFT=soft_reset,
        HAS_STATE=grad_state.numel() > 0,
        HAS_GV=grad_last is not None,
    )
    if mask.numel():
        _launch(lif_bwd_mask_kernel, grad_x, (grad, grad_last, mask, grad_x, grad_state), "lif_bwd_mask", **shared)
        return
    num_steps = x.shape[0]
    chunks, frame = cdiv(num_steps, CHUNK), x.numel() // num_steps
    constants = kernel_constants(surrogate, backward=True)
    scratch = x.new_empty(chunks * frame * states_by(surrogate) if chunks > 1 else 0, dtype=torch.float32)
    args = (grad, grad_last, x, state, grad_x, grad_state, scratch)
    _launch(lif_bwd_kernel, grad_x, args, "lif_bwd", **shared, **constants)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "lif(Tensor x, Tensor? state, float threshold, float decay, int surrogate, float width, bool detach_reset, "
    "bool soft_reset, bool keep_mask, bool return_state, Tensor? values=None) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "lif_backward(Tensor grad, Tensor? grad_last, Tensor x, Tensor? state, Tensor mask, SymInt[] strides, "
    "float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset) -> (Tensor, Tensor)"
)
_lib.define(
    "lif_backward_learned(Tensor grad, Tensor? grad_last, Tensor x, Tensor? state, Tensor values, int surrogate, "
    "float width, bool detach_reset, bool soft_reset) -> (Tensor, Tensor, Tensor)"
)


def _outputs(
    x: Tensor, keep_mask: bool, return_state: bool, values: Tensor | None, surrogate: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten spikes, last states and bit mask; what was not asked for has no elements."""
    spikes = torch.empty_like(x if values is None else learned.walkable(x, values.shape[1] > 1))
    frame = x.new_empty(0, dtype=torch.float32)
    if return_state:
        frame = _states_like(spikes[0], state_dtype(x.dtype), surrogate)
    kept = x.numel() // x.shape[0] if keep_mask else 0
    return spikes, frame, x.new_empty(kept, dtype=mask_dtype(x.shape[0]) if keep_mask else torch.uint8)


def _states_like(frame: Tensor, dtype: torch.dtype, surrogate: int) -> Tensor:
    """Unwritten states of neurons that integrate a frame (...), of several states (states, ...)."""
    return state_memory(torch.empty_like(frame, dtype=dtype), states_by(surrogate))


def _as_states(state: Tensor | None, frame: Tensor, surrogate: int) -> Tensor | None:
    """States in the memory layout in which kernels read them; ``frame`` is a dense (...) of the layout of a step."""
    if state is None:
        return None
    return as_layout(state, _states_like(frame, state.dtype, surrogate))


@torch.library.impl(_lib, "lif", "CompositeExplicitAutograd")
def _lif(x, state, threshold, decay, surrogate, width, detach_reset, soft_reset, keep_mask, return_state, values=None):
    check_current("x", x, min_dims=1)
    check_state(state, x, states_by(surrogate))
    keep_mask = values is None and keep_mask and can_keep_mask(x.shape[0], surrogate, detach_reset, soft_reset)
    spikes, last, mask = _outputs(x, keep_mask, return_state, values, surrogate)
    if values is not None:
        check_values(values)
        check_learnable(surrogate)
    if x.numel() and values is not None:
        learned.run_forward(x, state, values, spikes, last, width, soft_reset)
    elif x.numel():
        source = as_layout(x, spikes)
        start = _as_states(state, spikes[0], surrogate)
        run = launch_forward if resolve_backend(x.device, x.dtype) == "triton" else eager.lif_forward
        run(source, start, spikes, last, mask, threshold, decay, width, soft_reset, surrogate)
    elif return_state and state is not None:
        last.copy_(state)
    return spikes, last, mask


@torch.library.impl(_lib, "lif_backward", "CompositeExplicitAutograd")
def _lif_backward(
    grad, grad_last, x, state, mask, strides, threshold, decay, surrogate, width, detach_reset, soft_reset
):
    grad_x, grad_state = _lif_backward_fake(
        grad, grad_last, x, state, mask, strides, threshold, decay, surrogate, width, detach_reset, soft_reset
    )
    if grad.numel():
        grad = as_layout(grad, grad_x)
        source = x if mask.numel() else as_layout(x, grad_x)
        start, end = (_as_states(v, grad_x[0], surrogate) for v in (state, grad_last))
        run = _backward_triton if resolve_backend(grad.device, grad.dtype) == "triton" else eager.lif_backward
        run(
            grad,
            end,
            source,
            start,
            mask,
            grad_x,
            grad_state,
            threshold,
            decay,
            surrogate,
            width,
            detach_reset,
            soft_reset,
        )
    return grad_x, grad_state


@torch.library.impl(_lib, "lif_backward_learned", "CompositeExplicitAutograd")
def _lif_backward_learned(grad, grad_last, x, state, values, surrogate, width, detach_reset, soft_reset):
    grad_x, grad_state, grad_values = _lif_backward_learned_fake(
        grad, grad_last, x, state, values, surrogate, width, detach_reset, soft_reset
    )
    if grad.numel():
        frame = torch.empty_like(grad_x[0], dtype=state_dtype(grad.dtype))
        start, end = (None if v is None else as_layout(v, frame) for v in (state, grad_last))
        grads = (grad_x, grad_state, grad_values)
        sources = as_layout(grad, grad_x), end, as_layout(x, grad_x), start, values.contiguous()
        learned.backward(*sources, *grads, surrogate, width, detach_reset, soft_reset)
    else:
        grad_values.zero_()
    return grad_x, grad_state, grad_values


@register_fake("gac_kernels::lif", lib=_lib)
def _lif_fake(
    x, state, threshold, decay, surrogate, width, detach_reset, soft_reset, keep_mask, return_state, values=None
):
    check_current("x", x, min_dims=1)
    keep_mask = values is None and keep_mask and can_keep_mask(x.shape[0], surrogate, detach_reset, soft_reset)
    return _outputs(x, keep_mask, return_state, values, surrogate)


@register_fake("gac_kernels::lif_backward_learned", lib=_lib)
def _lif_backward_learned_fake(grad, grad_last, x, state, values, surrogate, width, detach_reset, soft_reset):
    grad_x = torch.empty_like(learned.walkable(x, values.shape[1] > 1))
    frame = torch.empty_like(grad_x[0], dtype=state_dtype(grad.dtype))
    grad_values = torch.empty_like(values, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(frame) if state is not None else frame.new_empty(0), grad_values


@register_fake("gac_kernels::lif_backward", lib=_lib)
def _lif_backward_fake(
    grad, grad_last, x, state, mask, strides, threshold, decay, surrogate, width, detach_reset, soft_reset
):
    grad_x = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
    dtype = state_dtype(grad.dtype)
    if state is None:
        return grad_x, grad_x.new_empty(0, dtype=dtype)
    return grad_x, _states_like(grad_x[0], dtype, surrogate)


def _setup_context(ctx, inputs, output) -> None:
    x, state, *ctx.spec_args, _, ctx.return_state, values = inputs
    spikes, _, mask = output
    ctx.strides = spikes.stride()
    ctx.has_state = state is not None
    # With the bit mask, x is not needed any more: an empty tensor stands for it.
    ctx.save_for_backward(x.new_empty(0) if mask.numel() else x, state, mask, values)


def _backward(ctx, grad_spikes, grad_last, _grad_mask):
    x, state, mask, values = ctx.saved_tensors
    if values is not None:
        grad_last = grad_last if ctx.return_state else None
        grad_x, grad_state, grad_values = torch.ops.gac_kernels.lif_backward_learned(
            grad_spikes, grad_last, x, state, values, *ctx.spec_args[2:]
        )
        return grad_x, grad_state if ctx.has_state else None, *[None] * 8, grad_values
    grad_x, grad_state = torch.ops.gac_kernels.lif_backward(
        grad_spikes, grad_last if ctx.return_state else None, x, state, mask, ctx.strides, *ctx.spec_args
    )
    return grad_x, grad_state if ctx.has_state else None, *[None] * 9


def _backward_again(ctx, grad_spikes, grad_last, _grad_mask):
    x, state, mask, values = ctx.saved_tensors
    grad_last = grad_last if ctx.return_state else None
    if mask.numel():
        bits = torch.empty_strided(grad_spikes.shape[1:], ctx.strides[1:], dtype=torch.int64, device=mask.device)
        eager.in_memory_order(bits).copy_(mask)
        grad_x, grad_state = eager.masked_gradients(grad_spikes, grad_last, bits, spec_of(*ctx.spec_args))
        return grad_x, grad_state if ctx.has_state else None, *[None] * 9

    def function(x, state, values):
        return lif_reference(x, spec_of(*ctx.spec_args), state, return_state=True, **named_values(values))

    *grads, at_values = differentiable_gradients(function, (x, state, values), (grad_spikes, grad_last))
    return *grads, *[None] * 8, at_values


def _definition(
    x, state, threshold, decay, surrogate, width, detach_reset, soft_reset, keep_mask, return_state, values=None
):
    spec = spec_of(threshold, decay, surrogate, width, detach_reset, soft_reset)
    spikes, last = lif_reference(x, spec, state, return_state=True, **named_values(values))
    nothing = x.new_empty(0, dtype=torch.float32)
    return spikes, last if return_state else nothing, nothing.to(torch.uint8)


register_derivatives(
    _lib,
    "lif",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=_definition,
    defaults=(None,),
)


def lif(
    x: Tensor,
    spec: LIFSpec = CIFAR,
    state: Tensor | None = None,
    return_state: bool = False,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-step leaky integrate-and-fire neuron over a whole sequence, in one kernel.

    ``u[t] = decay * v[t-1] + x[t]``; a spike where ``u[t] > threshold``; then the reset: see `LIFSpec`. The membrane is
    float32 whatever x's dtype (float64 for float64, which always runs as plain PyTorch). Nothing is kept between
    calls: to go on where a sequence ended, hand its last membrane to the next call.

    Args:
        x: (T, ...), input current; float32, float16, bfloat16 or float64; any dense memory format without a copy.
        spec: Dynamics and surrogate gradient.
        state: (...), membrane potential after the reset of the step before the first; zeros if None. Of a registered
            neuron with several states (states, ...).
        return_state: Return the last membrane potential as well.
        decay: In the place of the spec's, with a gradient: one element, or (C,) for x (T, B, C, ...), any floating
            dtype, values between 0 and 1. Memory other than contiguous or channels-last is then copied first.
        threshold: Likewise, values above 0.

    Returns:
        Spikes (T, ...), 0 or 1, in x's dtype and memory format; with ``return_state`` also the membrane potential after
        the last reset, (...) in float32, or all states of a neuron with several, (states, ...).

    Raises:
        ValueError: x has no time axis, no step or no floating dtype; state has another shape, dtype or device; decay or
            threshold has another length, dtype or device, a value out of range on a CPU, or the spec another neuron
            than ``lif`` with them; or the backend that was forced cannot run here.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    check_spec(spec)
    check_current("x", x, min_dims=1)
    check_flags(return_state=return_state)
    if state is not None:
        check_tensor("state", state)
        state = state.to(state_dtype(x.dtype)) if state.is_floating_point() else state
        check_state(state, x, states_by(spec.surrogate_id))
    keep_mask = torch.is_grad_enabled() and x.requires_grad
    args: tuple[Any, ...] = (x, state, *spec.op_arguments, keep_mask, return_state)
    values = stack_values(x, x.shape[2] if x.dim() > 2 else None, spec, decay, threshold)
    if values is not None:
        args = (*args, values)
    spikes, last, _ = torch.ops.gac_kernels.lif(*args)
    return (spikes, last) if return_state else spikes
