"""Capture a CUDA graph, and leave PyTorch as it was where that fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def captured(
    compute: Callable[[], T],
    device: torch.device,
    stream: torch.cuda.Stream,
    pool: Any = None,
    mode: str = "global",
) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of a call, and what the call returned.

    Args:
        compute: What to capture.
        device: Where to capture.
        stream: Of that device, for the time of the capture.
        pool: Memory to share with other graphs; after an error it is not to be used again.
        mode: CUDA's: which other threads' calls end the capture.

    Raises:
        Exception: What ``compute`` raised, or CUDA at the end of the capture.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        try:
            with garbage_kept(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                result = compute()
        except BaseException:
            torch.cuda.set_stream(current)  # older PyTorch leaves the stream of a failed capture current
            _end_in_order(device, stream, pool)
            raise
    return graph, result


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect garbage now, and none within.

    A graph in a cycle of references, such as that of a model which is no longer used, may be destroyed at any
    allocation of Python's. CUDA does not permit that within a capture, and ends it. PyTorch itself collects garbage
    before a capture up to 2.8 only.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_in_order(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """What PyTorch leaves out at the end of a capture that CUDA has refused.

    Its allocator would go on looking for the capture at each allocation, and in PyTorch 2.11 the random number
    generator, which took itself to be in a capture, would refuse to draw.
    """
    index = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:  # it has ended: the graph itself gives the memory back
        pass
    else:
        torch._C._cuda_releasePool(index, pool)
    number = torch.zeros(1, device=device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        number.zero_()  # a capture that ends well, so that the generator's does too
