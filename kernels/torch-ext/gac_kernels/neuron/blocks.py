"""The neuron in vectorised PyTorch with plain numbers as decay and threshold, in blocks that stay in a CPU's cache.

Fresh memory costs a CPU more than what is computed in it: all blocks share theirs. Formulas stand in `LIFSpec`. On CPUs
with a C compiler large float32 sequences are computed in C instead, see `native`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.layout import as_layout, time_stride
from ..derivatives import spec_of
from ..reference import state_dtype, surrogate_derivative
from ..spec import LIFSpec
from . import native

# Neurons whose membranes, spikes and gradients stay in a core's cache from step to step: of 2^13 to 2^20 the fastest.
_BLOCK = 2**17


@functools.lru_cache(maxsize=64)
def _below(threshold: float, dtype: torch.dtype) -> float:
    """The number of this dtype next below -threshold: a neuron has not fired where its negated membrane is above it."""
    return torch.nextafter(torch.tensor(-threshold, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)).item()


def _where_kept(value: Tensor, negated: Tensor, below: float, out: Tensor) -> Tensor:
    """``value`` where a neuron of this negated membrane has not fired, else 0: one pass, exact for infinities too."""
    return torch.ops.aten.threshold_backward.grad_input(value, negated, below, grad_input=out)


class Blocks:
    """Blocks of the neurons of a dense (T, ...) tensor: on a CPU such as stay in its cache, elsewhere all at once.

    Args:
        like: Tensor whose layout all others have.
        dtype: Of the membrane.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.steps, self.inner = like.shape[0], time_stride(like)
        self.outer = like.numel() // (self.steps * self.inner)
        block = _BLOCK if like.device.type == "cpu" else like.numel()
        self.rows, self.columns = max(1, min(block // self.inner, self.outer)), min(block, self.inner)
        self.device, self.dtype = like.device, dtype

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for row in range(0, self.outer, self.rows):
            for column in range(0, self.inner, self.columns):
                yield row, column

    def _size(self, block: tuple[int, int]) -> tuple[int, int]:
        return min(self.rows, self.outer - block[0]), min(self.columns, self.inner - block[1])

    def steps_of(self, tensor: Tensor, block: tuple[int, int]) -> Tensor:
        """The block's part of a tensor with a time axis."""
        start = tensor.storage_offset() + block[0] * self.steps * self.inner + block[1]
        return tensor.as_strided((self.steps, *self._size(block)), (self.inner, self.steps * self.inner, 1), start)

    def frame_of(self, tensor: Tensor | None, block: tuple[int, int]) -> Tensor | None:
        """The block's part of a tensor with one value a neuron, in the order of their memory; None of an empty one."""
        if tensor is None or not tensor.numel():
            return None
        start = tensor.storage_offset() + block[0] * self.inner + block[1]
        return tensor.as_strided(self._size(block), (self.inner, 1), start)

    def rooms(self, number: int) -> Callable[[tuple[int, int]], Tensor]:
        """A function that gives memory for so many frames of a block: the same for all, since fresh memory is slow."""
        memory = torch.empty(number * self.rows * self.columns, dtype=self.dtype, device=self.device)

        def room(block: tuple[int, int]) -> Tensor:
            rows, columns = self._size(block)
            return memory[: number * rows * columns].view(number, rows, columns)

        return room


def lif_forward(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    mask: Tensor,
    threshold: float,
    decay: float,
    width: float,
    soft_reset: bool,
) -> None:
    """Write spikes and, where they have elements, the last membrane and the bit mask; ``spikes`` may be x itself."""
    x = as_layout(x, spikes)
    if native.forward(x, state, spikes, last, mask, threshold, decay, width, soft_reset):
        return
    blocks = Blocks(spikes, state_dtype(x.dtype))
    room = blocks.rooms(3)
    for block in blocks:
        _forward_block(
            x=blocks.steps_of(x, block),
            state=blocks.frame_of(state, block),
            spikes=blocks.steps_of(spikes, block),
            last=blocks.frame_of(last, block),
            mask=blocks.frame_of(mask, block),
            room=room(block),
            threshold=threshold,
            decay=decay,
            width=width,
            soft_reset=soft_reset,
        )


def _forward_block(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor | None,
    mask: Tensor | None,
    room: Tensor,
    threshold: float,
    decay: float,
    width: float,
    soft_reset: bool,
) -> None:
    n, scratch, codes = room  # the membrane is negated, so that one pass resets it
    below = _below(threshold, n.dtype)
    found = None if mask is None else torch.zeros_like(n, dtype=torch.int64)
    n.copy_(x[0] if state is None else state).neg_()
    for t, current in enumerate(x):
        if t > 0 or state is not None:
            n.mul_(decay).sub_(current)
        # A CPU makes bools of them four times as slowly.
        fired = torch.lt(n, -threshold, out=spikes[t] if spikes.dtype == n.dtype else scratch)
        if fired is scratch:
            spikes[t] = fired
        if found is not None:
            # Two bits a step. Those of eight steps are added up as one float, which holds them exactly.
            place = float(4 ** (t % 8))
            torch.mul(fired, place, out=codes) if t % 8 == 0 else codes.add_(fired, alpha=place)
            near = torch.add(n, threshold, out=scratch).abs_()
            codes.add_(torch.lt(near, width, out=near), alpha=2.0 * place)
            if t % 8 == 7 or t + 1 == len(x):
                found |= codes.long() << (2 * (t - t % 8))
        if t + 1 < len(x) or last is not None:
            if soft_reset:
                n.add_(torch.lt(n, -threshold, out=scratch), alpha=threshold)
            else:
                _where_kept(n, n, below, out=n)
    if mask is not None and found is not None:
        mask.copy_(found)
    if last is not None:
        last.copy_(n.neg_().add_(0.0))  # adding makes the zeros positive


def lif_backward(
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
    """Write the gradients at x and, where it has elements, at the initial state; ``grad_x`` may be x itself."""
    grad = as_layout(grad, grad_x)
    spec = spec_of(threshold, decay, surrogate, width, detach_reset, soft_reset)
    masked = mask.numel() > 0
    x = x if masked else as_layout(x, grad_x)
    if native.backward(grad, grad_last, x, state, mask, grad_x, grad_state, spec):
        return
    blocks = Blocks(grad_x, state_dtype(grad.dtype))
    room, membranes = blocks.rooms(3), blocks.rooms(0 if masked else len(grad))
    for block in blocks:
        _backward_block(
            grad=blocks.steps_of(grad, block),
            grad_last=blocks.frame_of(grad_last, block),
            x=None if masked else blocks.steps_of(x, block),
            state=blocks.frame_of(state, block),
            mask=blocks.frame_of(mask, block),
            grad_x=blocks.steps_of(grad_x, block),
            grad_state=blocks.frame_of(grad_state, block),
            room=room(block),
            membranes=membranes(block),
            spec=spec,
        )


def _backward_block(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    grad_x: Tensor,
    grad_state: Tensor | None,
    room: Tensor,
    membranes: Tensor,
    spec: LIFSpec,
) -> None:
    gv, slope, scratch = room
    below = _below(spec.threshold, gv.dtype)
    if x is not None:
        _recompute(x, state, membranes, scratch, spec)
    if grad_last is not None:
        gv.copy_(grad_last)
    carries = grad_last is not None
    for t in reversed(range(len(grad))):
        n = None if x is None else membranes[t]
        if n is None:
            _bit(mask, 2 * t + 1, 1.0 / (2.0 * spec.width), slope)
        else:
            _slope(torch.add(n, spec.threshold, out=slope), spec)
        if carries:
            if spec.soft_reset and not spec.detach_reset:
                gv.add_(torch.mul(gv, slope, out=scratch).mul_(-spec.threshold))
            elif not spec.soft_reset:
                through = None if n is None or spec.detach_reset else torch.mul(gv, slope, out=scratch).mul_(n)
                if n is None:
                    _where_kept(gv, _bit(mask, 2 * t, -1.0, scratch), -0.5, out=gv)
                else:
                    _where_kept(gv, n, below, out=gv)
                if through is not None:
                    gv.add_(through)  # the negated membrane makes the difference a sum
            gu = slope.mul_(grad[t]).add_(gv)
        else:
            gu = slope.mul_(grad[t])
        grad_x[t] = gu
        carries = True
        if t > 0 or grad_state is not None:
            torch.mul(gu, spec.decay, out=gv)
    if grad_state is not None:
        grad_state.copy_(gv)


def _recompute(x: Tensor, state: Tensor | None, membranes: Tensor, scratch: Tensor, spec: LIFSpec) -> None:
    """Write the negated membranes of all steps, before the reset."""
    below = _below(spec.threshold, membranes.dtype)
    for t, current in enumerate(x):
        n = membranes[t]
        if t == 0:
            if state is None:
                n.copy_(current).neg_()
                continue
            torch.mul(state, -spec.decay, out=n)
        elif spec.soft_reset:
            fired = torch.lt(membranes[t - 1], -spec.threshold, out=scratch)
            torch.add(membranes[t - 1], fired, alpha=spec.threshold, out=n).mul_(spec.decay)
        else:
            _where_kept(membranes[t - 1], membranes[t - 1], below, out=n).mul_(spec.decay)
        n.sub_(current)


def _slope(d: Tensor, spec: LIFSpec) -> Tensor:
    """`surrogate_derivative` at the negated distance -d, in the memory of d; those built in are even functions."""
    if spec.surrogate == "triangle":
        return d.abs_().neg_().add_(spec.width).clamp_(min=0.0).mul_(1.0 / spec.width**2)
    if spec.surrogate == "rectangle":
        return torch.lt(d.abs_(), spec.width, out=d).mul_(1.0 / (2.0 * spec.width))
    if spec.surrogate == "atan":
        return d.mul_(math.pi / spec.width).square_().add_(1.0).mul_(spec.width).reciprocal_()
    if spec.surrogate != "sigmoid":
        return d.copy_(surrogate_derivative(d.neg_(), spec.surrogate, spec.width))
    p = d.mul_(4.0 / spec.width).sigmoid_()
    return p.addcmul_(p, p, value=-1.0).mul_(4.0 / spec.width)


def _bit(mask: Tensor | None, place: int, value: float, out: Tensor) -> Tensor:
    """``value`` where this bit of the mask is set, else 0."""
    assert mask is not None
    bit = 1 << place
    if place == 8 * mask.element_size() - 1 and mask.dtype != torch.uint8:
        bit = -bit  # the sign
    return out.copy_(mask & bit).mul_(value / bit)
