"""A 3x3 convolution, batch norm, optional residual and neuron in 8 bits, as one function with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.layout import as_layout
from .convolution import finish_statistics, forward, input_gradient
from .norm import NO_NORM, Norm, Spikes, backward, norm_and_fire
from .weight_gradient import weight_gradient
from .weights import EightBitWeight, round_weight

_NOTHING: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Running(NamedTuple):
    """Running statistics that a batch brings up to date; see `batch_stats`."""

    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float = 0.0
    num_batches: Tensor | None = None


class Call(NamedTuple):
    """What a layer is called with beside the tensors that have gradients.

    Attributes:
        stride: 1 or 2.
        num_steps: T, up to 8.
        neuron: `LIFSpec.op_arguments`.
        dtype: Of currents and gradients, float16 or bfloat16; float32 in plain Triton.
        eps: Of the norm.
        running: Of the norm.
        res_statistics: Mean and variance of the residual where it has a norm of its own.
        res_eps: Of that norm.
        keep_membrane: The neuron's input current is wanted.
        full: Other layers than these follow: spikes are wanted in ``dtype``.
        join: Called before the gradient at the spikes is computed: what `later` began has to have ended by then.
        later: Takes a function that computes the weight's gradient, which then is not returned.
    """

    stride: int
    num_steps: int
    neuron: tuple
    dtype: torch.dtype
    eps: float
    running: Running
    res_statistics: tuple[Tensor, Tensor] | None
    res_eps: float
    keep_membrane: bool
    full: bool
    join: Callable[[], None] | None = None
    later: Callable[[Callable[[], Tensor]], None] | None = None


def edge_like(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that stands for spikes in autograd's graph: it has their gradient, one element in memory, and NaN."""
    key = (device, dtype)
    if key not in _NOTHING:
        _NOTHING[key] = torch.full((), float("nan"), dtype=dtype, device=device)
    return _NOTHING[key].expand(size)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        edge: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        res_weight: Tensor | None,
        res_bias: Tensor | None,
        spikes: Spikes,
        call: Call,
    ) -> tuple[Tensor, ...]:
        rounded = round_weight(weight)
        x, partial = forward(spikes.plain, rounded, call.stride, call.dtype, call.num_steps)
        assert partial is not None
        mean, var, affine = finish_statistics(partial, *call.running, (norm_weight, norm_bias, call.eps))
        norm, res_norm = Norm(norm_weight, norm_bias, mean, var, call.eps, affine), NO_NORM
        if call.res_statistics is not None:
            res_norm = Norm(res_weight, res_bias, *call.res_statistics, call.res_eps)
        residual = None if residual is None else as_layout(residual, x)
        fired, membrane = norm_and_fire(
            x, residual, norm, res_norm, call.num_steps, call.neuron, call.keep_membrane, call.full
        )
        ctx.call, ctx.has_residual, ctx.spikes_size = (
            call,
            residual is not None,
            spikes.plain.shape,
        )
        # The stored current stands for the residual too: where it is kept, the residual serves its own norm only.
        if membrane is not None and call.res_statistics is None:
            residual = None
        ctx.save_for_backward(
            spikes.turned, weight, rounded.turned, rounded.scale, x, residual, membrane, *norm.tensors,
            *res_norm.tensors,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        kept = x.new_empty(0) if membrane is None else membrane
        if isinstance(fired, Tensor):
            nothing = (fired.new_empty(0, dtype=torch.int8), fired.new_empty(0, dtype=torch.int32))
            ctx.mark_non_differentiable(*nothing)
            return fired, kept, *nothing
        ctx.mark_non_differentiable(*fired)
        return edge_like(tuple(x.shape), x.dtype, x.device), kept, *fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_membrane: Tensor | None, *_: Any) -> tuple[Any, ...]:
        call: Call = ctx.call
        grad_membrane = grad_membrane if call.keep_membrane else None
        if grad_spikes is None and grad_membrane is None:
            return (None,) * 9
        turned, weight, weight_turned, scale, x, residual, membrane, *tensors = ctx.saved_tensors
        norm, res_norm = Norm(tensors[0], tensors[1], tensors[2], tensors[3], call.eps), NO_NORM
        if call.res_statistics is not None:
            res_norm = Norm(tensors[4], tensors[5], tensors[6], tensors[7], call.res_eps)
        found = backward(
            None if grad_spikes is None else as_layout(grad_spikes, x),
            None if grad_membrane is None else as_layout(grad_membrane, x),
            x,
            residual,
            membrane,
            norm,
            res_norm,
            scale,
            call.num_steps,
            call.neuron,
            ctx.has_residual,
        )
        at_edge = at_weight = None
        if call.join is not None:
            call.join()
        if ctx.needs_input_grad[0]:
            rounded = EightBitWeight(weight_turned.new_empty(0), weight_turned, scale)
            size = tuple(ctx.spikes_size[2:])
            at_edge = input_gradient(found.plain, rounded, found.divisor, size, call.stride, call.dtype, call.num_steps)
        if ctx.needs_input_grad[1]:

            def of_weight() -> Tensor:
                return weight_gradient(
                    found.turned, turned, scale, found.divisor, torch.empty_like(weight), call.stride
                )

            if call.later is None:
                at_weight = of_weight()
            else:
                call.later(of_weight)
        at_residual = found.current if ctx.has_residual else None
        return at_edge, at_weight, at_residual, *found.of_norm, *found.of_res_norm, None, None


def conv_norm_fire(
    edge: Tensor,
    spikes: Spikes,
    weight: Tensor,
    call: Call,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    residual: Tensor | None = None,
    res_norm: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Spikes | None]:
    """``lif(batch_norm(int8_conv2d(spikes, weight)) + residual)`` in training, whose gradients `int8_conv2d` explains.

    Nothing is cast in between: the convolution leaves the sums for its statistics, the neuron writes spikes, and the
    norm's backward pass the gradient at the convolution's output, in one byte each. The latter's power of two is chosen
    by a bound of its largest magnitude, from sums and largest values that the pass before has found: it is that of
    `gradient_scale`, or a smaller one, and nothing saturates.

    Args:
        edge: What gets the gradient at the spikes: these themselves, or the edge of the layer before.
        spikes: Those that the convolution reads.
        weight: (C', C, 3, 3), the weights that learn.
        call: All that has no gradient.
        norm: Weight and bias (C',) of the batch norm.
        residual: (T*B, C', H', W') in ``call.dtype``.
        res_norm: Weight and bias of the residual's norm.

    Returns:
        The spikes' edge (with ``call.full`` the spikes), the neuron's input current (empty where it is not kept), and
        the spikes in 8 bits (with ``call.full`` None).
    """
    out, membrane, plain, turned = _Layer.apply(edge, weight, residual, *norm, *res_norm, spikes, call)
    return out, membrane, None if call.full else Spikes(plain, turned)
