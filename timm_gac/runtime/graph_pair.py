"""Forward and backward pass of a module as two CUDA graphs behind one autograd node: what `graphed` replays.

The two graphs share buffers that every replay overwrites: a backward pass belongs to the last forward pass. What leaves
the graphs (outputs, gradients) is copied, so that gradients add up and outputs of earlier steps keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import captured
from .weight_gradients import overlap_weight_gradients

Forward = Callable[..., Any]  # a module's forward, which takes the module first


class NotGraphableError(Exception):
    """A module that has to stay eager; the message ends a sentence that begins with "as"."""


class CudaGraphs:
    """What `GraphPair` needs of CUDA on one device: a stream to capture on, memory for graphs, random numbers.

    Args:
        device: The CUDA device.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None  # the stream of the last replay

    @staticmethod
    def is_capturing() -> bool:
        """Whether somebody captures a graph of their own here."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run on the stream that captures later, as cuDNN's and cuBLAS's handles belong to a stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, compute: Callable[[], Any]) -> tuple[Any, Any]:
        """The graph of a call, and what the call returned.

        Other threads go on: a loader that pins memory in its own would end a capture in CUDA's global mode.
        """
        try:
            return captured(compute, self.device, self._stream, self._pool, "thread_local")
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()
            raise

    @contextmanager
    def keeping_random_numbers(self) -> Iterator[None]:
        """What is drawn within does not count: the next numbers are those that would have been drawn without it."""
        before = torch.get_rng_state(), torch.cuda.get_rng_state(self.device)
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            torch.cuda.set_rng_state(before[1], self.device)

    def order(self) -> None:
        """Make the current stream wait for the last replay, if that was on another one."""
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def synchronize(self) -> None:
        """Wait for the device, before graphs are destroyed."""
        torch.cuda.synchronize(self.device)


class Ticket:
    """A forward pass that was replayed. As long as it lives and is not used, its activations have to stay."""

    __slots__ = ("__weakref__", "used", "versions")

    def __init__(self, versions: list[int]) -> None:
        self.versions = versions  # of the parameters
        self.used = False


class GraphPair:
    """Forward and backward of a module for inputs of one kind, captured at once.

    Nothing of the module changes: buffers that the passes before the capture have moved get their values back, and
    random numbers go on as if they had not been drawn.

    Args:
        module: The module, whose parameters are all ordinary ones.
        forward: Its forward.
        inputs: Tensors it is called with.
        cuda: Where to capture.
        warmup: Passes before the capture.

    Raises:
        NotGraphableError: The module returns something else than tensors, nothing of it can be differentiated, it
            learns tensors that are not its parameters, or it writes buffers on another device.
    """

    def __init__(self, module: nn.Module, forward: Forward, inputs: Sequence[Tensor], cuda: Any, warmup: int) -> None:
        self._cuda = cuda
        self._inputs = [_static_copy(x) for x in inputs]
        originals = list(module.parameters())
        self.addresses = frozenset(parameter.data_ptr() for parameter in originals)
        # Leaves of their own in the same memory: hooks on the parameters, such as DDP's, do not see the capture, and no
        # gradient node of theirs, which belongs to another stream, is part of it.
        aliases = {p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in originals}
        self._aliases = list(aliases.values())  # keep the memory
        self.parameters = [p for p in originals if p.requires_grad]
        leaves = [x for x in [*self._inputs, *self._aliases] if x.requires_grad]
        device = inputs[0].device
        elsewhere = {name: buffer for name, buffer in module.named_buffers() if buffer.device != device}

        def run() -> list[Tensor]:
            with _parameters_replaced(module, aliases), _own_autocast_cache(), overlap_weight_gradients():
                returned, self._container = _as_list(forward(module, *self._inputs))
            return returned

        def differentiate(outputs: list[Tensor], seeds: list[Tensor]) -> tuple[Any, ...]:
            learned = [out for out in outputs if out.requires_grad]
            return torch.autograd.grad(learned, leaves, seeds, allow_unused=True)

        def seeds_of(outputs: list[Tensor]) -> list[Tensor]:
            return [torch.ones_like(out) for out in outputs if out.requires_grad]

        with _buffers_kept(module), cuda.keeping_random_numbers():
            with cuda.warming_up():
                for _ in range(warmup):
                    written = {name: buffer._version for name, buffer in elsewhere.items()}
                    outputs = run()
                    _check_unwritten(elsewhere, written)
                    _check_leaves(outputs, leaves)
                    differentiate(outputs, seeds_of(outputs))
                    del outputs
            self._forward, outputs = cuda.capture(run)
            self._seeds = seeds_of(outputs)
            self._backward, found = cuda.capture(lambda: differentiate(outputs, self._seeds))
        self._differentiable = [out.requires_grad for out in outputs]
        self._outputs = [out.detach() for out in outputs]
        gradients = iter(found)
        of_leaves = [next(gradients) if x.requires_grad else None for x in [*self._inputs, *self.parameters]]
        self._gradients: list[Tensor | None] = of_leaves

    def __call__(self, inputs: Sequence[Tensor], ticket: Ticket) -> Any:
        """What the module returns: replays the forward pass; ``ticket`` is then that of the backward pass."""
        outputs = _Replay.apply(self, ticket, *inputs, *self.parameters)
        return outputs[0] if self._container is None else self._container(outputs)

    def versions(self) -> list[int]:
        """How often each parameter was written."""
        return [parameter._version for parameter in self.parameters]

    def replay_forward(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and those of them without a gradient."""
        self._cuda.order()
        for static, x in zip(self._inputs, inputs, strict=False):
            static.copy_(x, non_blocking=True)
        self._forward.replay()
        outputs = [out.clone() for out in self._outputs]
        return outputs, [out for out, learns in zip(outputs, self._differentiable, strict=True) if not learns]

    def replay_backward(self, gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of inputs and learned parameters, in memory of their own."""
        self._cuda.order()
        given = [gradient for gradient, learns in zip(gradients, self._differentiable, strict=True) if learns]
        torch._foreach_copy_(self._seeds, given)
        self._backward.replay()
        kept = [gradient if wanted else None for gradient, wanted in zip(self._gradients, needed, strict=True)]
        there = [gradient for gradient in kept if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in there]
        if there:
            torch._foreach_copy_(copies, there)
        rest = iter(copies)
        return [None if gradient is None else next(rest) for gradient in kept]


class _Replay(torch.autograd.Function):
    """A module as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, pair: GraphPair, ticket: Ticket, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.pair, ctx.ticket = pair, ticket
        outputs, without_gradient = pair.replay_forward(tensors)
        ctx.mark_non_differentiable(*without_gradient)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pair: GraphPair = ctx.pair
        ticket: Ticket = ctx.ticket
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward pass without create_graph, got create_graph=True through a graphed network, whose "
                "gradients cannot be differentiated again: call timm_gac.ungraphed(model) first"
            )
        if ticket.used:
            raise RuntimeError(
                "expected one backward pass for each forward pass of a graphed network, got a second one "
                "(retain_graph=True), whose activations are gone: call timm_gac.ungraphed(model) first"
            )
        if ticket.versions != pair.versions():
            raise RuntimeError(
                "expected parameters to stay as they are between the forward and the backward pass, got one that was "
                "modified by an inplace operation: step the optimiser after the backward pass"
            )
        ticket.used = True
        return None, None, *pair.replay_backward(gradients, ctx.needs_input_grad[2:])


def _static_copy(x: Tensor) -> Tensor:
    static = torch.empty_like(x.detach()).copy_(x.detach())
    return static.requires_grad_(x.requires_grad)


def _as_list(returned: Any) -> tuple[list[Tensor], type | None]:
    """The tensors that a module returned, and the kind of sequence they are in."""
    if type(returned) is Tensor:
        return [returned], None
    if type(returned) in (tuple, list) and returned and all(type(out) is Tensor for out in returned):
        return list(returned), type(returned)
    raise NotGraphableError(f"it returns {type(returned).__name__}, not a tensor or a tuple or list of tensors")


def _check_leaves(outputs: list[Tensor], leaves: list[Tensor]) -> None:
    """Refuse a pass whose gradients reach other tensors than its inputs and parameters: a graph would not give them."""
    stack = [out.grad_fn for out in outputs if out.grad_fn is not None]
    if not stack:
        raise NotGraphableError("nothing that it returns can be differentiated")
    known, seen = {id(leaf) for leaf in leaves}, set(stack)
    while stack:
        node: Any = stack.pop()
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in known:
            raise NotGraphableError("it learns tensors that are not among its parameters")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _check_unwritten(buffers: dict[str, Tensor], versions: dict[str, int]) -> None:
    """Refuse a pass that writes buffers on another device: a graph would not."""
    for name, buffer in buffers.items():
        if buffer._version != versions[name]:
            raise NotGraphableError(f"it writes its buffer {name} on {buffer.device}, away from its input")


@contextmanager
def _parameters_replaced(module: nn.Module, replacement: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Other parameters in the place of a module's, for one forward pass."""
    places = [
        (inner._parameters, name, parameter)
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None
    ]
    try:
        for holder, name, parameter in places:
            holder[name] = replacement[parameter]
        yield
    finally:
        for holder, name, parameter in places:
            holder[name] = parameter


@contextmanager
def _own_autocast_cache() -> Iterator[None]:
    """Casts that autocast keeps are those made within: a graph would freeze one that it did not make."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers, such as running statistics, have their values again afterwards."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:  # by way of data: autograd may hold the buffer, with these very values
            buffer.data.copy_(value)
