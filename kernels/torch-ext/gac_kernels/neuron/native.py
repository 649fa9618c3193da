"""The neuron in C, where a CPU has a C compiler: `lif.c` compiled once in the background, kept, and loaded.

Until it is there, and where there is no compiler, the same is computed in `blocks`, to the same bits, several times as
slowly. The library is compiled once blocks have had some work, so that short scripts and tests do without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.layout import time_stride
from ..spec import LIFSpec

SWITCH = "TIMM_GAC_COMPILE_C"  # 0: no C compiler is called, and nothing loaded
_logger = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("lif.c")
_SURROGATES = {"triangle": 0, "rectangle": 1, "atan": 2}  # a sigmoid would need an exponential of the same bits
_LEAST = 2**15  # elements; below, calls take a CPU longer than their work
_WORTH = 2**26  # elements that blocks have computed when the compiler is started
_PART = 2**17  # elements at least of a thread's part
_MOST_STEPS = 128  # of which a block's membranes fit into `lif.c`'s buffer
_SIDE_BY_SIDE = 256  # neurons at least that lie side by side in memory
_FLAGS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_OF_CPU = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"),
}
_POINTER, _INT, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t, ctypes.c_float
_ARGUMENTS = {
    "lif_forward": [*[_POINTER] * 5, _INT, *[_SIZE] * 4, *[_FLOAT] * 3, _INT],
    "lif_backward": [*[_POINTER] * 5, _INT, *[_POINTER] * 2, *[_SIZE] * 4, *[_FLOAT] * 5, *[_INT] * 3],
}


class _Library:
    """The compiled functions, once they are there; one for the process."""

    def __init__(self) -> None:
        self.functions: Any = None
        self._lock, self._work, self._asked = threading.Lock(), 0, False

    def get(self, elements: int) -> Any:
        """The functions, or None; ``elements`` is what blocks compute if they are not there."""
        if self.functions is None and not self._asked:
            self._ask(elements)
        return self.functions

    def _ask(self, elements: int) -> None:
        with self._lock:
            first, self._work = self._work == 0, self._work + elements
            if self._asked:
                return
            if os.environ.get(SWITCH) == "0":
                self._asked = True
            elif first:
                self.functions = _load(_kept())
            elif self._work >= _WORTH:
                self._asked = True
                threading.Thread(target=self.build, name="gac-kernels-cc", daemon=True).start()

    def build(self) -> None:
        """Compile the functions and load them; where that fails, a line in the log says why."""
        self._asked = True
        try:
            self.functions = _load(_compile())
        except (OSError, subprocess.SubprocessError) as error:
            _logger.info("neurons on this CPU run slower than they could, as nothing compiles C: %s", error)


_library = _Library()


def _compiler() -> list[str]:
    """The command of the C compiler; empty where there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    names = [given] if given else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *name[1:]] for name in names if (path := shutil.which(name[0]))), [])


@functools.cache
def _command() -> tuple[str, ...]:
    return (*_compiler(), *_FLAGS, *_OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ()))


def _kept() -> Path:
    """Where the library is kept: a name for each source, compiler and kind of CPU."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (where there is no home)
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join((*_command(), platform.machine())).encode()).hexdigest()
    return Path(home) / "gac-kernels" / f"lif-{key[:16]}.so"


def _compile() -> Path:
    """Compile the library; in a temporary folder where its place cannot be written."""
    if not _compiler():
        raise OSError("expected a C compiler as CC, cc, gcc or clang, got none: install one")
    kept = _kept()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=kept.parent)
    except OSError:
        folder = tempfile.mkdtemp()
        kept = Path(folder).with_suffix(".so")
    made = Path(folder) / kept.name
    try:
        subprocess.run(
            [*_command(), str(_SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True, timeout=300
        )
        made.replace(kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kept


def _load(path: Path) -> Any:
    """The functions of a library; None where there is no such file."""
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    for name, types in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _functions(like: Tensor, mask: Tensor, *tensors: Tensor | None) -> Any:
    """The functions where they take a dense (T, ...) tensor with these others, else None."""
    if like.device.type != "cpu" or like.numel() < _LEAST or like.shape[0] > _MOST_STEPS:
        return None
    if time_stride(like) < _SIDE_BY_SIDE or mask.element_size() > 4:
        return None
    if any(t is not None and t.numel() and t.dtype != torch.float32 for t in (like, *tensors)):
        return None
    return _library.get(like.numel())


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gac-kernels-lif")


if hasattr(os, "register_at_fork"):  # a child has no threads of its parent's pool
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run(like: Tensor, call: Callable[[int, int], None]) -> None:
    """Call a function for all neurons, in as many parts as PyTorch has threads."""
    neurons = like.numel() // like.shape[0]
    parts = max(1, min(torch.get_num_threads(), like.numel() // _PART))
    ends = [neurons * part // parts for part in range(parts + 1)]
    others = [_pool(parts - 1).submit(call, *part) for part in pairwise(ends[1:])]
    call(ends[0], ends[1])
    for other in others:
        other.result()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def forward(
    x: Tensor,
    state: Tensor | None,
    spikes: Tensor,
    last: Tensor,
    mask: Tensor,
    threshold: float,
    decay: float,
    width: float,
    soft_reset: bool,
) -> bool:
    """`blocks.lif_forward`, if it can be computed here; whether it was."""
    library = _functions(spikes, mask, x, state, last)
    if library is None:
        return False
    tensors = (_at(x), _at(state), _at(spikes), _at(last), _at(mask), mask.element_size())
    sizes = (len(x), time_stride(spikes))

    def call(first: int, end: int) -> None:
        library.lif_forward(*tensors, *sizes, first, end, threshold, decay, width, soft_reset)

    _run(spikes, call)
    return True


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    mask: Tensor,
    grad_x: Tensor,
    grad_state: Tensor,
    spec: LIFSpec,
) -> bool:
    """`blocks.lif_backward`, if it can be computed here; whether it was."""
    if spec.surrogate not in _SURROGATES or not spec.is_lif:
        return False
    masked = mask.numel() > 0
    library = _functions(grad_x, mask, grad, grad_last, None if masked else x, state, grad_state)
    if library is None:
        return False
    tensors = (_at(grad), _at(grad_last), None if masked else _at(x), _at(state), _at(mask), mask.element_size())
    sizes = (len(grad), time_stride(grad_x))
    width = spec.width
    factor, scale = {
        "triangle": (0.0, 1.0 / width**2),
        "rectangle": (0.0, 1.0 / (2.0 * width)),
        "atan": (torch.pi / width, 0.0),
    }[spec.surrogate]
    numbers = (spec.threshold, spec.decay, width, factor, scale, _SURROGATES[spec.surrogate])

    def call(first: int, end: int) -> None:
        outputs = (_at(grad_x), _at(grad_state))
        library.lif_backward(*tensors, *outputs, *sizes, first, end, *numbers, spec.detach_reset, spec.soft_reset)

    _run(grad_x, call)
    return True
