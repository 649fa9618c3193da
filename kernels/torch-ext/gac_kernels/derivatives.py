"""Derivatives of the ops: one fast backward pass for training, and the op's definition in PyTorch for all else.

Where `torch.func` transforms or forward mode are at work, an op runs as plain PyTorch, which has all derivatives and
batching rules. A backward pass that is to be differentiated again (``create_graph=True``) runs so too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import forced_backend, use_backend
from .registry import names_of
from .spec import RESETS, LIFSpec

Outputs = Any  # a tensor or a tuple of tensors
Gradients = tuple["Tensor | None", ...]


def register_derivatives(
    lib: torch.library.Library,
    name: str,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Gradients],
    again: Callable[..., Gradients],
    definition: Callable[..., Outputs],
    defaults: tuple[object, ...] = (),
) -> None:
    """Give an op its derivatives.

    `torch.library.register_autograd` would look up the default of each argument in the schema in every call: a third of
    a millisecond for 24 arguments, as long as all launches of such an op.

    Args:
        lib: Library that has the op.
        name: Of the op.
        setup_context: Called with ctx, the op's arguments and its outputs, saves what the backward passes need.
        backward: The gradients at all arguments from ctx and those at the outputs, in kernels.
        again: The same as PyTorch operations that can be differentiated in turn.
        definition: The op as PyTorch operations, with the op's arguments and outputs.
        defaults: Of the op's last arguments: the dispatcher leaves out arguments that have their default value.
    """
    op = getattr(torch.ops.gac_kernels, name).default
    count = len(op._schema.arguments)

    def forward(ctx: Any, *args: Any) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
        ctx.backend = forced_backend()
        setup_context(ctx, args, outputs)
        return outputs

    def gradients(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():  # by create_graph=True alone
            return again(ctx, *grads)
        if ctx.backend == forced_backend():
            return backward(ctx, *grads)
        with use_backend(ctx.backend or "auto"):  # autograd's own threads do not have the caller's context
            return backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"{name}_function", (torch.autograd.Function,), methods)

    def autograd(*args: Any) -> Outputs:
        if len(args) < count:
            args = args + defaults[len(args) - count :]
        if forward_ad._current_level >= 0:
            return definition(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def transformed(*args: Any) -> Outputs:
        return definition(*args, *defaults[len(args) - count :] if len(args) < count else ())

    torch.library.impl(lib, name, "Autograd")(autograd)
    torch.library.impl(lib, name, "FuncTorchDynamicLayerFrontMode")(transformed)  # before any transform sees the op


def register_no_derivatives(lib: torch.library.Library, name: str) -> None:
    """Say that an op has no gradient: its kernel is called as it is, and its outputs require none."""
    lib.impl(name, torch.library.fallthrough_kernel, "Autograd")


def differentiable_gradients(
    function: Callable[..., Outputs], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` at its inputs, which can be differentiated in turn.

    Args:
        function: PyTorch operations.
        inputs: Of the function; where one needs no gradient its gradient is None.
        grads: Those at its outputs; None where an output has no part in the result.
    """
    with torch.enable_grad():
        # Views, so that a tensor that is two of the inputs gets the gradient of each.
        viewed = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = function(*viewed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        needed = [x for x in viewed if x is not None and x.requires_grad]
        if not pairs or not needed:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], needed, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if x is not None and x.requires_grad else None for x in viewed]


def refuse_forward_mode(name: str) -> None:
    """Raise in forward mode, whose derivatives an op for inference would lose in silence."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"expected {name} outside of forward-mode differentiation, got torch.func.jvp or forward_ad: it is for "
            f"inference and has no derivatives, differentiate {name}_reference"
        )


@functools.lru_cache(maxsize=256)
def spec_of(
    threshold: float, decay: float, surrogate: int, width: float, detach_reset: bool, soft_reset: bool
) -> LIFSpec:
    """The spec of which these are `LIFSpec.op_arguments`."""
    neuron, name = names_of(surrogate)
    return LIFSpec(threshold, decay, name, width, detach_reset, RESETS[soft_reset], neuron)
