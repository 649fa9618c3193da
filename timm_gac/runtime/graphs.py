"""A whole training or inference step as one CUDA graph, for steps whose launches take the host longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .capture import captured
from .weight_gradients import overlap_weight_gradients

T = TypeVar("T")


class GraphedStep(Generic[T]):
    """A step that becomes a CUDA graph: the first ``warmup`` calls run eagerly, the next one captures, then all replay.

    Every call executes the step exactly once: warm-up calls are real steps on a side stream, and the call that captures
    also replays, since a capture computes nothing. A replay repeats the kernels of the captured call and no Python:

    - what changes between steps must be a tensor that is written in place, such as a learning rate tensor;
    - counters, schedules and branches in Python advance in the first ``warmup + 1`` calls only;
    - hooks, ``model.eval()``, frozen norms and replaced modules count as they were in the captured call;
    - the step must not read a tensor's value on the host (``.item()``, ``if loss > 1``), which fails while capturing;
    - gradients must be cleared within the step (``zero_grad(set_to_none=True)`` before the backward pass), and
      ``torch.autocast`` entered within it, so that weights are cast anew in every replay.

    Networks of this package compute the weight gradients of their convolutions on a second stream in such a step, which
    costs the host nothing in a graph: see `timm_gac.runtime.weight_gradients`.

    Args:
        step: Takes CUDA tensors; its result (a tensor, or any structure of them) is what a call returns.
        warmup: Eager calls before the capture, at least 1: optimisers create their state, and cuDNN chooses its
            algorithms, in them.

    Raises:
        ValueError: ``warmup`` is below 1.

    Examples:
        >>> graphed = GraphedStep(train_step)  # doctest: +SKIP
        >>> for images, labels in loader:  # doctest: +SKIP
        ...     loss = graphed(images, labels)
    """

    def __init__(self, step: Callable[..., T], warmup: int = 4) -> None:
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
            raise ValueError(f"expected warmup as an integer >= 1, got {warmup!r}: give one such as 4")
        self._step = step
        self._remaining = warmup
        self._signature: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result: T

    @property
    def captured(self) -> bool:
        """Whether the graph exists, so that further calls replay it."""
        return self._graph is not None

    def __call__(self, *tensors: Tensor) -> T:
        """Run the step once.

        Args:
            tensors: The step's inputs, copied into the graph's own buffers; shapes and dtypes as in the first call.

        Returns:
            The step's result. Once captured these are the same tensors in every call: clone what has to outlive the
            next one.

        Raises:
            ValueError: An input is no tensor, is not on a CUDA device, requires gradients, or differs from the first
                call's in shape, dtype or device; or the call that would capture runs under an autocast entered outside
                of the step.
        """
        self._check(tensors)
        if self._graph is not None:
            for buffer, tensor in zip(self._inputs, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            self._graph.replay()
        elif self._remaining > 0:
            self._remaining -= 1
            return self._run_eagerly(tensors)
        else:
            self._capture(tensors).replay()
        return self._result

    def release(self) -> None:
        """Free the graph and its memory; a further call captures anew.

        Where the step holds collectives, NCCL wants this done before their process group is destroyed.
        """
        if self._graph is not None:
            torch.cuda.synchronize(self._inputs[0].device)
            self._graph.reset()
            self._graph = None
            self._inputs = []
            del self._result

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"expected CUDA tensors, got {type(tensor).__name__}: a graph would keep its value; give a tensor"
                )
            if tensor.device.type != "cuda":
                raise ValueError(f"expected CUDA tensors, got one on {tensor.device}: move the batch to the GPU first")
            if tensor.requires_grad:
                raise ValueError("expected inputs without gradients, got one that requires them: detach it")
        signature = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if not signature:
            raise ValueError("expected at least one tensor, got none: pass the step's inputs to the call")
        if self._signature and signature != self._signature:
            raise ValueError(
                f"expected inputs {_describe(self._signature)} as in the first call, got {_describe(signature)}: "
                "drop the last, smaller batch (drop_last=True) or make another GraphedStep"
            )
        self._signature = signature

    def _run_eagerly(self, tensors: tuple[Tensor, ...]) -> T:
        # On the stream that captures later: backward nodes and cuDNN handles are bound to the stream they saw first.
        device = tensors[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._run_step(tensors)
        current.wait_stream(self._stream)
        return result

    def _run_step(self, tensors: Sequence[Tensor]) -> T:
        with overlap_weight_gradients():
            return self._step(*tensors)

    def _capture(self, tensors: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise ValueError(
                "expected torch.autocast to be entered within the step, got one around it: its cached casts of the "
                "weights would be frozen into the graph; move the `with` block into the step"
            )
        self._inputs = [tensor.clone() for tensor in tensors]
        assert self._stream is not None
        self._graph, self._result = captured(lambda: self._run_step(self._inputs), tensors[0].device, self._stream)
        return self._graph


def _describe(signature: list[tuple[torch.Size, torch.dtype, torch.device]]) -> str:
    return ", ".join(
        f"{tuple(shape)} {str(dtype).removeprefix('torch.')} {device}" for shape, dtype, device in signature
    )
