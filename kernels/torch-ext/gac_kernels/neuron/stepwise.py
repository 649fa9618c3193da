"""A registered neuron in PyTorch, step by step, written into given outputs: what runs without Triton.

Its derivative is autograd's, block by block, so that a definition says its step in PyTorch once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..common.layout import as_layout
from ..reference import run_steps, state_dtype
from ..spec import LIFSpec
from .blocks import Blocks


def state_memory(frame: Tensor, states: int) -> Tensor:
    """Unwritten states in the layout of a frame (...): like it for one state, else (states, ...), one after another."""
    if states == 1:
        return torch.empty_like(frame)
    return frame.new_empty_strided((states, *frame.shape), (frame.numel(), *torch.empty_like(frame).stride()))


def _parts(blocks: Blocks, block: tuple[int, int], state: Tensor | None, states: int) -> tuple[Tensor, ...] | None:
    """The block's part of each state; None where there are none."""
    if state is None or not state.numel():
        return None
    parts = [blocks.frame_of(each, block) for each in ((state,) if states == 1 else state.unbind())]
    return tuple(part for part in parts if part is not None)


def forward(x: Tensor, state: Tensor | None, spikes: Tensor, last: Tensor, spec: LIFSpec, states: int) -> None:
    """Write spikes and, where it has elements, the last states; ``spikes`` may be x itself."""
    x = as_layout(x, spikes)
    blocks = Blocks(spikes, state_dtype(x.dtype))
    for block in blocks:
        fired, after = run_steps(blocks.steps_of(x, block), _parts(blocks, block, state, states), spec, gradient=False)
        out, of_last = blocks.steps_of(spikes, block), _parts(blocks, block, last, states)
        for t, s in enumerate(fired):
            out[t] = s
        for to, value in zip(of_last or (), after, strict=bool(of_last)):
            to.copy_(value)


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    grad_x: Tensor,
    grad_state: Tensor,
    spec: LIFSpec,
    states: int,
) -> None:
    """Write the gradients at x and, where it has elements, at the initial states; ``grad_x`` may be x itself."""
    grad, x = as_layout(grad, grad_x), as_layout(x, grad_x)
    blocks = Blocks(grad_x, state_dtype(grad.dtype))
    for block in blocks:
        start = _parts(blocks, block, state, states)
        with _recorded():
            current = blocks.steps_of(x, block).detach().to(blocks.dtype).requires_grad_()
            before = None if start is None else tuple(each.detach().clone().requires_grad_() for each in start)
            fired, after = run_steps(current, before, spec)
            outputs: list[Tensor] = [*fired]
            towards: list[Tensor] = [*blocks.steps_of(grad, block).to(blocks.dtype)]
            of_last = _parts(blocks, block, grad_last, states)
            if of_last is not None:
                outputs += after
                towards += of_last
            pairs = [(y, g) for y, g in zip(outputs, towards, strict=True) if y.requires_grad]
            at_x, *at_state = torch.autograd.grad(
                [y for y, _ in pairs],
                [current, *(before or ())],
                [g for _, g in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        blocks.steps_of(grad_x, block).copy_(at_x)
        for to, value in zip(_parts(blocks, block, grad_state, states) or (), at_state, strict=False):
            to.copy_(value)


@contextmanager
def _recorded() -> Iterator[None]:
    """Record what runs for autograd, inside an operator too."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradFunctionality"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
