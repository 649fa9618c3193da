"""Gated attention coding and the neuron behind it in one pass: ``gated = gac(x)``, ``spikes = LIF(gated)``.

This is how a network with membrane shortcuts begins. Forward spares a read of the gated frames. Backward spares the
gradient at them, which would be written, added to the shortcut's and read again: both membranes and the gate are
recomputed in registers. The ops one after the other give the same answer, and do so without Triton and for more steps
than registers hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_gate, check_spec
from ..common.fake import register_fake
from ..common.layout import as_layout, on_device
from ..common.messages import shown
from ..common.triton import launchable
from ..derivatives import differentiable_gradients, register_derivatives, spec_of
from ..neuron import learned
from ..neuron.eager import lif_forward
from ..neuron.lif import launch_forward
from ..neuron.values import check_learnable, check_values, named_values, stack_values
from ..reference import gac_fire_reference, state_dtype
from ..registry import kernel_constants
from ..spec import CIFAR, LIFSpec
from .gac import CHUNK, backward_outputs, frames_like, geometry, places_like, sum_places, value_arguments
from .gac_fire_kernels import fire_bwd_kernel, fire_fwd_kernel


def _forward_triton(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    gated: Tensor,
    spikes: Tensor,
    threshold: float,
    decay: float,
    soft_reset: bool,
    values: Tensor | None = None,
    surrogate: int = 0,
) -> None:
    sizes, config, programs = geometry(stem, gated, "gac_fire_fwd")
    with on_device(stem):
        launchable(fire_fwd_kernel)[(programs,)](
            stem,
            spatial,
            temporal,
            gated,
            spikes,
            values,
            *value_arguments(values, gated),
            *sizes,
            T=gated.shape[0],
            STATIC=stem.dim() == 4,
            THRESHOLD=threshold,
            DECAY=decay,
            SOFT=soft_reset,
            **kernel_constants(surrogate, backward=False),
            **config,
        )


def _backward_triton(
    grad_gated: Tensor | None,
    grad_spikes: Tensor,
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    grad_stem: Tensor,
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
    sizes, config, programs = geometry(stem, grad_spikes, "gac_fire_bwd")
    num_steps, batch = grad_spikes.shape[:2]
    places = places_like(values, stem, batch)
    # One partial sum a program and step, added up by torch in a fixed order: no atomics, so the same bits every time.
    partial = torch.empty((batch, programs // batch, num_steps), dtype=torch.float32, device=stem.device)
    with on_device(stem):
        fire_bwd_kernel[(programs,)](
            grad_gated,
            grad_spikes,
            stem,
            spatial,
            temporal,
            grad_stem,
            grad_spatial,
            partial,
            values,
            places,
            *value_arguments(values, grad_spikes),
            *sizes,
            T=num_steps,
            STATIC=stem.dim() == 4,
            THRESHOLD=threshold,
            DECAY=decay,
            WIDTH=width,
            DETACH=detach_reset,
            SOFT=soft_reset,
            HAS_GY=grad_gated is not None,
            **kernel_constants(surrogate, backward=True),
            **config,
        )
    grad_temporal.copy_(partial.sum(1))
    sum_places(places, grad_values)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "gac_fire(Tensor stem, Tensor spatial, Tensor temporal, bool integer, float threshold, float decay, int surrogate, "
    "float width, bool detach_reset, bool soft_reset, Tensor? values=None) -> (Tensor, Tensor)"
)
_lib.define(
    "gac_fire_backward(Tensor? grad_gated, Tensor grad_spikes, Tensor stem, Tensor spatial, Tensor temporal, "
    "Tensor? gated, float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "gac_fire_backward_learned(Tensor? grad_gated, Tensor grad_spikes, Tensor stem, Tensor spatial, Tensor temporal, "
    "Tensor? gated, float threshold, float decay, int surrogate, float width, bool detach_reset, bool soft_reset, "
    "Tensor values) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _in_one_pass(stem: Tensor, num_steps: int) -> bool:
    return num_steps <= CHUNK and resolve_backend(stem.device, stem.dtype) == "triton"


@torch.library.impl(_lib, "gac_fire", "CompositeExplicitAutograd")
def _gac_fire(
    stem, spatial, temporal, integer, threshold, decay, surrogate, width, detach_reset, soft_reset, values=None
):
    if values is not None:
        check_values(values)
        check_learnable(surrogate)
        values = values.contiguous()
    spec = (threshold, decay, surrogate, width, detach_reset, soft_reset)
    if _in_one_pass(stem, temporal.shape[1]):
        gated, spikes = _gac_fire_fake(stem, spatial, temporal, integer, *spec)
        if gated.numel():
            like = frames_like(stem, *stem.shape[:-3])
            sources = as_layout(stem, like), as_layout(spatial, like), temporal.contiguous()
            _forward_triton(*sources, gated, spikes, threshold, decay, soft_reset, values, surrogate)
        return gated, spikes
    first, second = (None, None) if values is None else values.split(2)
    gated = torch.ops.gac_kernels.gated_lif(stem, spatial, temporal, *spec, first)
    spikes = torch.empty_like(gated, dtype=torch.int8 if integer else None)
    if gated.numel() and second is not None:
        nothing = gated.new_empty(0, dtype=torch.float32)
        fired = torch.empty_like(learned.walkable(gated, per_channel=True), dtype=spikes.dtype)
        learned.run_forward(gated, None, second, fired, nothing, width, soft_reset)
        spikes.copy_(fired)
    elif gated.numel():
        nothing = gated.new_empty(0, dtype=torch.float32)
        run = launch_forward if resolve_backend(stem.device, stem.dtype) == "triton" else lif_forward
        run(gated, None, spikes, nothing, nothing, threshold, decay, width, soft_reset, surrogate)
    return gated, spikes


@torch.library.impl(_lib, "gac_fire_backward_learned", "CompositeExplicitAutograd")
def _gac_fire_backward_learned(*args: Any):
    *rest, values = args
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    run: Any = _gac_fire_backward
    return *run(*rest, values.contiguous(), grad_values), grad_values


@torch.library.impl(_lib, "gac_fire_backward", "CompositeExplicitAutograd")
def _gac_fire_backward(
    grad_gated,
    grad_spikes,
    stem,
    spatial,
    temporal,
    gated,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
    values=None,
    grad_values=None,
):
    spec = (threshold, decay, surrogate, width, detach_reset, soft_reset)
    if grad_spikes.numel() and _in_one_pass(stem, temporal.shape[1]):
        grads = backward_outputs(stem, temporal)
        like = frames_like(stem, *grad_spikes.shape[:2])
        grad_gated, grad_spikes = (None if g is None else as_layout(g, like) for g in (grad_gated, grad_spikes))
        sources = as_layout(stem, grads[0]), as_layout(spatial, grads[1]), temporal.contiguous()
        _backward_triton(grad_gated, grad_spikes, *sources, *grads, *spec, values, grad_values)
        return grads
    first, second = (None, None) if values is None else values.split(2)
    if gated is None:
        gated = torch.ops.gac_kernels.gated_lif(stem, spatial, temporal, *spec, first)
    if first is not None:
        grad, _, at_second = torch.ops.gac_kernels.lif_backward_learned(
            grad_spikes, None, gated, None, second, *spec[2:]
        )
        grad = grad if grad_gated is None else grad.add_(grad_gated)
        *grads, at_first = torch.ops.gac_kernels.gated_lif_backward_learned(grad, stem, spatial, temporal, *spec, first)
        torch.cat((at_first, at_second), out=grad_values)
        return tuple(grads)
    no_mask = gated.new_empty(0, dtype=torch.uint8)
    grad, _ = torch.ops.gac_kernels.lif_backward(grad_spikes, None, gated, None, no_mask, gated.stride(), *spec)
    grad = grad if grad_gated is None else grad.add_(grad_gated)
    return torch.ops.gac_kernels.gated_lif_backward(grad, stem, spatial, temporal, *spec)


@register_fake("gac_kernels::gac_fire", lib=_lib)
def _gac_fire_fake(
    stem, spatial, temporal, integer, threshold, decay, surrogate, width, detach_reset, soft_reset, values=None
):
    check_current("stem", stem, min_dims=4, max_dims=5)
    check_gate(stem, spatial, temporal)
    gated = frames_like(stem, temporal.shape[1], stem.shape[-4])
    return gated, torch.empty_like(gated, dtype=torch.int8 if integer else None)


@register_fake("gac_kernels::gac_fire_backward", lib=_lib)
def _gac_fire_backward_fake(
    grad_gated,
    grad_spikes,
    stem,
    spatial,
    temporal,
    gated,
    threshold,
    decay,
    surrogate,
    width,
    detach_reset,
    soft_reset,
):
    return backward_outputs(stem, temporal)


@register_fake("gac_kernels::gac_fire_backward_learned", lib=_lib)
def _gac_fire_backward_learned_fake(grad_gated, grad_spikes, stem, spatial, temporal, *args: Any):
    return *backward_outputs(stem, temporal), torch.empty_like(args[-1], memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    stem, spatial, temporal, _, *ctx.spec_args, values = inputs
    ctx.set_materialize_grads(False)
    gated = None if _in_one_pass(stem, temporal.shape[1]) else output[0]
    ctx.save_for_backward(stem, spatial, temporal, gated, values)


def _backward(ctx, grad_gated, grad_spikes):
    *sources, gated, values = ctx.saved_tensors
    with_values: Any = () if values is None else (values,)
    if grad_spikes is not None:
        run = (
            torch.ops.gac_kernels.gac_fire_backward_learned if with_values else torch.ops.gac_kernels.gac_fire_backward
        )
        grads = run(grad_gated, grad_spikes, *sources, gated, *ctx.spec_args, *with_values)
    elif grad_gated is not None and values is not None:
        first, second = values.split(2)
        *grads, at_first = torch.ops.gac_kernels.gated_lif_backward_learned(grad_gated, *sources, *ctx.spec_args, first)
        grads = (*grads, torch.cat((at_first, torch.zeros_like(second))))
    elif grad_gated is not None:
        grads = torch.ops.gac_kernels.gated_lif_backward(grad_gated, *sources, *ctx.spec_args)
    else:
        grads = (None,) * (3 + len(with_values))
    return *grads[:3], *[None] * 7, *(grads[3:] or (None,))


def _definition(stem, spatial, temporal, integer, *args: Any):
    *spec_args, values = args
    dtype = torch.int8 if integer else None
    return gac_fire_reference(stem, spatial, temporal, spec_of(*spec_args), dtype, **_named(values))


def _named(values: Tensor | None) -> dict[str, Any]:
    """Values (4, N) as `gac_fire_reference` takes them."""
    if values is None:
        return {}
    first, second = values.split(2)
    return named_values(first) | {f"second_{name}": value for name, value in named_values(second).items()}


def _backward_again(ctx, grad_gated, grad_spikes):
    *sources, _, values = ctx.saved_tensors

    def function(stem, spatial, temporal, values):
        return gac_fire_reference(stem, spatial, temporal, spec_of(*ctx.spec_args), **_named(values))

    *grads, at_values = differentiable_gradients(function, (*sources, values), (grad_gated, grad_spikes))
    return *grads, *[None] * 7, at_values


register_derivatives(
    _lib,
    "gac_fire",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=_definition,
    defaults=(None,),
)


def _stack(
    x: Tensor,
    spec: LIFSpec,
    decay: Tensor | None,
    threshold: Tensor | None,
    second_decay: Tensor | None,
    second_threshold: Tensor | None,
) -> Tensor | None:
    """The values (4, N) of both neurons; None where the spec's numbers hold for both."""
    names = ("second_decay", "second_threshold")
    first = stack_values(x, x.shape[-3], spec, decay, threshold)
    second = stack_values(x, x.shape[-3], spec, second_decay, second_threshold, names)
    if first is None and second is None:
        return None
    options: dict[str, Any] = dict(dtype=state_dtype(x.dtype), device=x.device)
    fixed = [torch.full((1, 1), value, **options) for value in (spec.decay, spec.threshold)]
    pairs = [torch.cat(fixed) if pair is None else pair for pair in (first, second)]
    length = max(pair.shape[1] for pair in pairs)
    return torch.cat([pair.expand(2, length) for pair in pairs])


def gac_fire(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    spec: LIFSpec = CIFAR,
    spikes_dtype: torch.dtype | None = None,
    *,
    decay: Tensor | None = None,
    threshold: Tensor | None = None,
    second_decay: Tensor | None = None,
    second_threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated attention coding and the spikes of a second neuron that integrates it, both with one spec.

    ``gated = gac_encode(stem, ...)`` (`gated_lif` for an input that varies over time) and ``spikes = lif(gated)``, to
    the bit. On a GPU one kernel does both, up to T = 8, and one kernel the backward pass, whose gradient at ``gated``
    stays in float32; for larger T, and in plain PyTorch, the two ops run one after the other. Gradients are
    deterministic. Saved for backward: the three inputs, and ``gated`` where it is not one kernel.

    Args:
        stem: (B, C, H, W), a static image's frame, or (T, B, C, H, W); float32, float16, bfloat16 or float64; any dense
            memory format.
        spatial: Spatial-channel attention before the sigmoid, in stem's shape and dtype.
        temporal: (B, T), temporal attention before the sigmoid, any floating dtype.
        spec: Dynamics and surrogate gradient of both neurons.
        spikes_dtype: torch.int8 for spikes as `integer_lif` gives them, through which no gradient flows; None for
            stem's dtype.
        decay: Of the encoder's neuron in the place of the spec's, with a gradient: one element or (C,), any floating
            dtype, between 0 and 1.
        threshold: Likewise, above 0.
        second_decay: Of the second neuron, likewise.
        second_threshold: Likewise.

    Returns:
        Gated spikes (T, B, C, H, W) in stem's dtype, values in [0, 1), and spikes (T, B, C, H, W), 0 or 1; both in
        stem's memory format.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, T is 0, spikes_dtype is another, a decay or
            threshold is, on a CPU, out of range, or the forced backend cannot run here.

    Source: Qiu et al., AAAI 2024 (arXiv 2308.06582).
    """
    check_spec(spec)
    check_current("stem", stem, min_dims=4, max_dims=5)
    check_gate(stem, spatial, temporal)
    if not (spikes_dtype is None or spikes_dtype == stem.dtype or spikes_dtype == torch.int8):
        raise ValueError(
            f"expected spikes_dtype None, {stem.dtype} (like stem) or torch.int8, got {shown(spikes_dtype)}: leave it "
            "out"
        )
    values = _stack(stem, spec, decay, threshold, second_decay, second_threshold)
    integer = spikes_dtype == torch.int8
    return torch.ops.gac_kernels.gac_fire(stem, spatial, temporal, integer, *spec.op_arguments, values)
