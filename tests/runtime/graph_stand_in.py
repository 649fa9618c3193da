"""What stands in for CUDA graphs on a machine without a GPU, for `timm_gac.runtime.graphed`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Repeated:
    """Stands in for a graph: a replay repeats the call and writes what it returned into the memory of the first."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute
        self.result = compute()
        self.memory = [None if tensor is None else tensor.detach() for tensor in self.result]

    def replay(self) -> None:
        with torch.enable_grad():
            new = self.compute()
        for memory, tensor in zip(self.memory, new, strict=True):
            if memory is not None:
                memory.copy_(tensor.detach())
        if isinstance(self.result, list):  # the forward pass, whose outputs the backward pass starts from
            self.result[:] = new


class StandIn:
    """`CudaGraphs` without CUDA."""

    device_type = "cpu"
    captures = 0

    def __init__(self, device: torch.device) -> None: ...

    is_capturing = staticmethod(lambda: False)
    warming_up = staticmethod(contextlib.nullcontext)

    def capture(self, compute: Callable[[], Any]) -> tuple[Any, Any]:
        StandIn.captures += 1
        repeated = Repeated(compute)
        return repeated, repeated.result

    @contextlib.contextmanager
    def keeping_random_numbers(self) -> Iterator[None]:
        before = torch.get_rng_state()
        yield
        torch.set_rng_state(before)

    def order(self) -> None: ...

    def synchronize(self) -> None: ...
