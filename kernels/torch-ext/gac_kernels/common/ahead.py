"""Kernels that a function launches, compiled side by side before it runs.

Triton compiles a kernel at its first launch, so that a network's first answer waits for one kernel after the other.
Here the function is called once with the launches of missing kernels left out, and each begins to compile on a thread
of its own: three quarters of that are work of LLVM, ptxas and a C compiler, for which Python's lock is free. Shapes
decide what is launched, values do not, so what the launches would have written does not matter. Then the function is
called again.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from .triton import HAS_TRITON, INTERPRETED, triton

R = TypeVar("R")
_logger = logging.getLogger(__name__)
_PACKAGE = __name__.removesuffix(".common.ahead")
_SILENT = 1.0  # seconds; kernels that Triton has kept on disk are loaded sooner, and no line is written

_lock = threading.RLock()  # launches are left out in one place
_active = threading.local()


def compile_ahead(function: Callable[[], R], device: torch.device | str | int | None = None) -> R:
    """What a function returns, its missing Triton kernels being compiled side by side before.

    Where kernels are missing the function is called twice, first with unwritten memory in the place of what they would
    write. So it must not branch on values of tensors, nor change anything that a second call would change again, such
    as running statistics. Without Triton or a GPU, and in a CUDA graph's capture, it is called once and kernels are
    compiled as they are launched. One that does not compile raises its error then.

    A line in the log says how many kernels a call waits for, if it takes more than a second. Where Triton's cache
    folder cannot be written, a temporary one is used in this process, and the log says so.

    Args:
        function: Launches kernels on the device, from the thread that calls it.
        device: A CUDA device; the current one where left out.

    Examples:
        >>> logits = compile_ahead(lambda: model(images))  # doctest: +SKIP
    """
    device = _cuda_device(device)
    if device is None or getattr(_active, "here", False):
        return function()
    with _lock:
        _use_writable_cache(triton.knobs.cache.dir)
        _active.here = True
        try:
            with _Compilation(device) as compilation:
                result = function()
            if not compilation.left_out:
                return result
            del result
        finally:
            _active.here = False
    return function()


def _cuda_device(device: torch.device | str | int | None) -> torch.device | None:
    """The GPU whose kernels Triton compiles; None where it compiles none, or none now."""
    if not HAS_TRITON or INTERPRETED or not torch.cuda.is_available() or torch.compiler.is_compiling():
        return None
    found = torch.device("cuda") if device is None else torch.device(device)
    if found.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found


class _Pool:
    """Compiles kernels on threads for Triton's `AsyncCompileMode`, and loads them.

    Args:
        device: GPU that the kernels are for.
    """

    def __init__(self, device: torch.device) -> None:
        self.futures: list[Future[Any]] = []
        self._threads = ThreadPoolExecutor(_processors(), "gac-kernels", torch.cuda.set_device, (device,))

    def submit(self, compile: Callable[[], Any]) -> Future[Any]:
        """Begin to compile a kernel."""
        self.futures.append(self._threads.submit(_load, compile))
        return self.futures[-1]

    def stop(self) -> None:
        """Wait for what has begun, and leave out the rest."""
        self._threads.shutdown(cancel_futures=True)
        for future in self.futures:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # Triton waits for each, and for a cancelled one until it is told


def _load(compile: Callable[[], Any]) -> Any:
    """Compile a kernel and load it: older versions of Triton compile its launcher with a C compiler then."""
    kernel = compile()
    kernel.run  # noqa: B018 (a property that loads)
    return kernel


class _Compilation:
    """Within ``with``: leaves out launches of this package's missing kernels by this thread, and compiles them.

    At the end all of them are compiled and loaded, but those for which that failed.

    Args:
        device: GPU that the kernels are for.

    Attributes:
        left_out: How many launches were left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.left_out = device, 0

    def __enter__(self) -> _Compilation:
        self._thread, self._started, self._pool = threading.get_ident(), time.monotonic(), _Pool(self.device)
        self._mode = triton.AsyncCompileMode(self._pool, ignore_errors=True)
        self._mode.__enter__()
        # Triton's compiler changes the filters of warnings and puts them back, which threads do in any order.
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        self._launch = triton.JITFunction.run
        triton.JITFunction.run = functools.partialmethod(_run, self)
        return self

    def run(self, kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        """What a launch does meanwhile; arguments as of Triton's own."""
        ours = threading.get_ident() == self._thread and kernel.fn.__module__.startswith(f"{_PACKAGE}.")
        if ours and isinstance(self._launch(kernel, *args, warmup=True, **options), triton.FutureKernel):
            self.left_out += 1
            return None
        return self._launch(kernel, *args, warmup=warmup, **options)

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        triton.JITFunction.run = self._launch
        try:
            if error is None:
                self._finish(self._pool.futures)
        finally:
            self._pool.stop()
            self._mode.__exit__(None, None, None)  # hands the kernels to their functions
            self._warnings.__exit__(None, None, None)

    def _finish(self, kernels: list[Future[Any]]) -> None:
        if wait(kernels, max(0.0, self._started + _SILENT - time.monotonic())).not_done:
            count = f"{len(kernels)} kernel{'s' * (len(kernels) > 1)}"
            name = torch.cuda.get_device_name(self.device)
            _logger.warning("compiling %s for %s, at the first call only", count, name)
            wait(kernels)
        for kernel in kernels:
            if failure := kernel.exception():
                _logger.debug("a kernel was not compiled ahead: %s", failure)


def _run(kernel: Any, compilation: _Compilation, *args: Any, **options: Any) -> Any:
    return compilation.run(kernel, *args, **options)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _use_writable_cache(folder: str) -> None:
    """Have Triton keep its kernels in a temporary folder where it cannot write into this one."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        temporary = tempfile.mkdtemp(prefix="triton-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        triton.knobs.cache.dir = temporary
        _logger.warning(
            "Triton's cache cannot be written (%s), so kernels are compiled anew in each process: set TRITON_CACHE_DIR "
            "to a folder that can",
            error,
        )
