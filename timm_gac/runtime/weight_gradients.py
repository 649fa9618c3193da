"""Weight gradients of a network's convolutions on a second stream, beside the backward passes of its batch norms.

Weight gradients are compute-bound and not needed before the optimiser step; the backward pass of batch norm is
memory-bound. Two streams overlap them. For that the network casts the weights of all its convolutions for autocast at
the start of its forward pass, in one kernel: the gradients of these casts are then the last thing that the backward
pass asks for, also in one kernel.

A step opts in by `overlap_weight_gradients`, as `GraphedStep` does for the steps that it runs: in a graph the second
stream costs the host nothing. Without autocast, under torch.compile and with gradient checkpointing nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups
CastWeight = tuple[Tensor, "PendingGradients", int]  # weight in autocast's dtype, where its gradient goes, its number

_OVERLAP: ContextVar[bool] = ContextVar("timm_gac_overlap_weight_gradients", default=False)
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def overlap_weight_gradients() -> Iterator[None]:
    """Forward passes within leave their weight gradients to a second stream; values and their order do not change."""
    token = _OVERLAP.set(True)
    try:
        yield
    finally:
        _OVERLAP.reset(token)


def overlap_requested() -> bool:
    """Whether this runs within `overlap_weight_gradients`."""
    return _OVERLAP.get()


class PendingGradients:
    """Weight gradients of one forward pass, each on its way on the second stream.

    Args:
        device: Where they are computed; on a CPU at once.
        count: How many weights there are.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.gradients: list[Tensor | None] = [None] * count
        self._stream = _second_stream(device)
        self._event: torch.cuda.Event | None = None
        self._running: Callable[[], Tensor] | None = None  # holds its tensors, which their own stream may not reuse yet
        self._ends_with_backward = False

    def start(self, index: int, compute: Callable[[], Tensor]) -> None:
        """Add what ``compute`` returns to the gradient of weight number ``index``, after all work queued so far."""
        if not self._ends_with_backward:
            self._ends_with_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if self._stream is None:
            self._add(index, compute())
            return
        self.join()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._add(index, compute())
            self._event = self._stream.record_event()
        self._running = compute

    def join(self) -> None:
        """Make the current stream wait for the second one."""
        if self._stream is not None and self._event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        self._event = self._running = None

    def take(self) -> list[Tensor | None]:
        """All gradients, for the current stream; none is left here."""
        self.join()
        taken, self.gradients = self.gradients, [None] * len(self.gradients)
        return taken

    def _add(self, index: int, gradient: Tensor) -> None:
        before = self.gradients[index]
        self.gradients[index] = gradient if before is None else before + gradient

    def _end(self) -> None:
        """End a backward pass, which may have asked for no weight: the next one begins with nothing."""
        self._ends_with_backward = False
        self.take()


def _second_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def overlap_enabled(network: nn.Module) -> bool:
    """Whether `with_cast_weights` is to be used around a forward pass of ``network`` that happens now."""
    if torch.compiler.is_compiling() or not _OVERLAP.get() or not torch.is_grad_enabled():
        return False
    return not any(getattr(module, "grad_checkpointing", False) for module in network.modules())


@contextmanager
def with_cast_weights(network: nn.Module, kind: type[nn.Module], x: Tensor) -> Iterator[None]:
    """Give the convolutions of a network their weights in autocast's dtype for one forward pass.

    Args:
        network: Whose forward pass it is.
        kind: Class of these convolutions; ``cast_weight`` is set on each that has no bias and learns.
        x: Input of the pass.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    found: list[Any] = [module for module in network.modules() if isinstance(module, kind) and _learns(module, dtype)]
    if not found:
        yield
        return
    pending = PendingGradients(x.device, len(found))
    # A convolution in 8 bits rounds its own weight.
    dtypes = [module.weight.dtype if getattr(module, "int8", False) else dtype for module in found]
    weights = _Cast.apply(pending, dtypes, *[module.weight for module in found])
    for index, (module, weight) in enumerate(zip(found, weights, strict=True)):
        module.cast_weight = (weight, pending, index)
    try:
        yield
    finally:
        for module in found:
            del module.cast_weight


def _learns(module: Any, dtype: torch.dtype | None) -> bool:
    """Whether autocast would cast its weight, an ordinary tensor (not one divided among processes) that learns."""
    weight = module.weight
    ordinary = type(weight) is nn.Parameter and module.bias is None
    ordinary = ordinary and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return dtype is not None and ordinary and weight.requires_grad and weight.dtype not in (dtype, torch.float64)


class _Cast(torch.autograd.Function):
    """Weights to their dtypes at once; backward waits for their gradients, which come by way of `PendingGradients`."""

    @staticmethod
    def forward(ctx: Any, pending: PendingGradients, dtypes: list[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pending, ctx.dtypes = pending, [weight.dtype for weight in weights]
        return tuple(_cast_all(weights, dtypes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = ctx.pending.take()
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        cast = _cast_all([gradients[index] for index in there], [ctx.dtypes[index] for index in there])
        for index, gradient in zip(there, cast, strict=True):
            gradients[index] = gradient
        return None, None, *gradients


def _cast_all(tensors: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Tensors of these dtypes: copies in one kernel, views where nothing changes."""
    pairs = list(zip(tensors, dtypes, strict=True))
    out = [x.view_as(x) if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x, dtype in pairs]
    copies = [(to, x) for to, (x, dtype) in zip(out, pairs, strict=True) if x.dtype != dtype]
    if copies:
        torch._foreach_copy_([to for to, _ in copies], [x for _, x in copies])
    return out


class _Call(NamedTuple):
    """What a convolution is called with beside its tensors: where its weight's gradient goes, T, and its geometry."""

    pending: PendingGradients
    number: int
    num_steps: int
    geometry: Geometry


class _Convolution(torch.autograd.Function):
    """A convolution, as `torch.nn.functional.conv2d`, whose weight gradient goes to `PendingGradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: Tensor | None, call: _Call) -> Tensor:
        stride, padding, dilation, groups = call.geometry
        ctx.save_for_backward(x if bits is None else bits, weight)
        ctx.packed, ctx.call = bits is not None, call
        return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        call: _Call = ctx.call
        stride, padding, dilation, groups = call.geometry

        def gradients(of_input: bool, of_weight: bool) -> Any:
            if ctx.packed:
                return torch.ops.gac_kernels.packed_conv2d_backward(
                    grad, kept, weight, call.num_steps, *call.geometry, of_input, of_weight
                )
            geometry = (stride, padding, dilation, False, [0, 0], groups)
            needed = [of_input, of_weight, False]
            return torch.ops.aten.convolution_backward(grad, kept, weight, None, *geometry, needed)

        call.pending.join()  # what the one before still holds would only make the peak of memory higher
        at_input = gradients(True, False)[0] if ctx.needs_input_grad[0] else None
        call.pending.start(call.number, lambda: gradients(False, True)[1])
        return at_input, None, None, None


def convolve(x: Tensor, cast_weight: CastWeight, bits: Tensor | None, num_steps: int, geometry: Geometry) -> Tensor:
    """Convolution with a weight that `with_cast_weights` has set.

    Args:
        x: (N, C, H, W), cast to the weight's dtype.
        cast_weight: What `with_cast_weights` has set.
        bits: x as bits, which are kept instead of it, or None.
        num_steps: T.
        geometry: Stride, padding, dilation and groups.
    """
    weight, pending, index = cast_weight
    return _Convolution.apply(x.to(weight.dtype), weight, bits, _Call(pending, index, num_steps, geometry))
