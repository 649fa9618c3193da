"""Compile kernels ahead without a GPU, whose launches end before the GPU, and say what happened as JSON."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton import language as tl
from triton.runtime import driver

from compile_for_hopper import Hopper
from gac_kernels import LIFSpec, compile_ahead
from gac_kernels.common import ahead
from gac_kernels.encoder import pool_frames
from gac_kernels.neuron import lif
from gac_kernels.spikes import firing_rate

compiled: list[tuple[str, str]] = []  # kernel and thread
launched: list[str] = []
loaded: list[str] = []
logged: list[str] = []


class Launcher:
    """What Triton launches a kernel with."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = src.fn.__name__
        loaded.append(self.name)

    def __call__(self, *arguments: object) -> None:
        launched.append(self.name)


@triton.jit
def foreign_kernel(x_ptr, BLOCK: tl.constexpr):
    """A kernel of somebody else."""
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


def backward() -> None:
    """The backward pass of a neuron whose step kernels take as a function, one kernel."""
    x, grad, grad_x = (torch.zeros(2, 1024) for _ in range(3))
    nothing = torch.zeros(0)
    lif._backward_triton(grad, None, x, None, nothing, grad_x, nothing, *LIFSpec(neuron="ternary").op_arguments)


class Calls:
    """A function that launches kernels, and how many had been launched when it was called."""

    def __init__(self, *launches: Any) -> None:
        self.launches, self.before = launches, list[int]()

    def __call__(self) -> str:
        self.before.append(len(launched))
        for launch in self.launches:
            launch()
        return "answer"


def pool(size: int) -> None:
    """Two kernels."""
    x = torch.zeros(2, 3, size, size)
    pool_frames._forward_triton(x, *(torch.zeros(2) for _ in range(3)))


def rate(num_steps: int, block: int | None = None) -> None:
    """One kernel."""
    x = torch.zeros(2 * num_steps, 3, 4, 4)
    if block is None:
        firing_rate._launch(firing_rate._firing_rate_kernel, x, x, x[:2], num_steps)
    else:
        firing_rate._firing_rate_kernel[(1,)](x, x, x.numel(), T=num_steps, BLOCK=block)


def fail() -> Any:
    """Raises an error."""
    raise ArithmeticError


def run(function: Calls) -> Any:
    """What `compile_ahead` gives, or the name of its error, and what it did meanwhile."""
    del compiled[:], launched[:], loaded[:], logged[:]
    filters = list(warnings.filters)
    try:
        answer = compile_ahead(function, 0)
    except Exception as error:
        answer = type(error).__name__
    assert warnings.filters == filters, "filters of warnings changed"
    assert triton.JITFunction.run is plain_run, "launches are still left out"
    threads = sorted({thread.rpartition("_")[0] if "_" in thread else "main" for _, thread in compiled})
    return {
        "answer": answer,
        "launches before each call": function.before,
        "launched": len(launched),
        "loaded": len(loaded),
        "compiled": sorted(kernel for kernel, _ in compiled),
        "threads": threads,
        "logged": list(logged),
    }


def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
    """What Triton calls after it compiled a kernel."""
    compiled.append((src.name, threading.current_thread().name))


if __name__ == "__main__":
    Hopper.launcher_cls = Launcher  # type: ignore[attr-defined]
    Hopper.utils = SimpleNamespace(  # type: ignore[attr-defined]
        load_binary=lambda *_: (object(), 1, 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )
    driver.set_active(Hopper())
    knobs.compilation.listener = note
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gac_kernels").addHandler(handler)
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.set_device = lambda _: None
    torch.cuda.get_device_name = lambda _: "a GPU"  # type: ignore[misc]
    ahead._processors = lambda: 2  # type: ignore[attr-defined]
    ahead._SILENT = 1e9  # type: ignore[attr-defined]
    plain_run = triton.JITFunction.run

    results = {"several": run(Calls(lambda: pool(8), lambda: rate(2)))}
    results["again"] = run(Calls(lambda: pool(8), lambda: rate(2)))
    results["foreign"] = run(Calls(lambda: foreign_kernel[(1,)](torch.zeros(16), BLOCK=16)))
    results["nested"] = run(Calls(lambda: compile_ahead(lambda: rate(4), 0)))
    results["refused"] = run(Calls(lambda: rate(2, block=48)))
    results["function"] = run(Calls(backward))
    ahead._processors = lambda: 1  # type: ignore[attr-defined]  # so that kernels wait for each other
    results["raises"] = run(Calls(lambda: rate(7), lambda: rate(8), lambda: rate(9), fail))
    ahead._processors = lambda: 2  # type: ignore[attr-defined]
    ahead._SILENT = 0.0  # type: ignore[attr-defined]
    results["slow"] = run(Calls(lambda: rate(5)))
    knobs.cache.dir = sys.argv[1]
    results["unwritable"] = run(Calls(lambda: rate(6)))
    results["unwritable"]["moved"] = knobs.cache.dir != sys.argv[1]
    sys.stdout.write(json.dumps(results))
