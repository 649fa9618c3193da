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

_lock = threading.RLock()  # Triton has one hook
_active = threading.local()


def compile_ahead(function: Callable[[], R], device: torch.device | str | int | None = None) -> R:
    """What a function returns, its missing Triton kernels being compiled side by side before.

    Where kernels are missing the function is called twice, first with unwritten memory in the place of what they would
    write. So it must not branch on values of tensors, nor change anything that a second call would change again, such
    as running statistics. Without Triton or a GPU, in a CUDA graph's capture and where another tool has Triton's hook,
    it is called once and kernels are compiled as they are launched. One that does not compile raises its error then.

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
        if triton.knobs.runtime.jit_cache_hook is not None:
            return function()
        _use_writable_cache(triton.knobs.cache.dir)
        _active.here = True
        try:
            with _Compilation(device) as compilation:
                result = function()
            if not compilation.kernels:
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


class _Compilation:
    """Within ``with``: leaves out launches of this package's missing kernels by this thread, and compiles them.

    At the end all of them are compiled and loaded, but those for which that failed.

    Args:
        device: GPU that the kernels are for.

    Attributes:
        kernels: What is being compiled, by kernel and by Triton's key of arguments and options.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernels: dict[tuple[int, str], Future[None]] = {}

    def __enter__(self) -> _Compilation:
        self._thread, self._started = threading.get_ident(), time.monotonic()
        self._pool = ThreadPoolExecutor(_processors(), "gac_kernels", torch.cuda.set_device, (self.device,))
        # Triton's compiler changes the filters of warnings and puts them back, which threads do in any order.
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        triton.knobs.runtime.jit_cache_hook = self._note
        return self

    def _note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """What Triton calls before it compiles; True for no compilation and no launch."""
        if threading.get_ident() != self._thread or not fn.module.startswith(f"{_PACKAGE}."):
            return False
        at = (id(fn.jit_function), key)
        if at not in self.kernels:
            self.kernels[at] = self._pool.submit(_compile, fn.jit_function, compile["specialization_data"])
        return True

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        triton.knobs.runtime.jit_cache_hook = None
        try:
            if error is None and self.kernels:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._warnings.__exit__(None, None, None)

    def _finish(self) -> None:
        futures = list(self.kernels.values())
        if wait(futures, max(0.0, self._started + _SILENT - time.monotonic())).not_done:
            name = torch.cuda.get_device_name(self.device)
            kernels = f"{len(futures)} kernel{'s' * (len(futures) > 1)}"
            _logger.warning("compiling %s for %s, at the first call only", kernels, name)
            wait(futures)
        for future in futures:
            if failure := future.exception():
                _logger.debug("a kernel was not compiled ahead: %s", failure)


def _compile(kernel: Any, specialization: str) -> None:
    """Compile a kernel, and load it: older versions of Triton compile its launcher with a C compiler then."""
    compiled = kernel.preload(specialization)
    if compiled is not None:
        compiled.run  # noqa: B018 (a property that loads)


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
