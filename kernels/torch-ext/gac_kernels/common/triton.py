"""Triton where it is installed, and a stand-in with which the same files import where it is not.

Kernel launches and registered operators pass tensors by position and name constants only: both bind their arguments
anew at each call, and small networks are bound by that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

HAS_TRITON = True
TRITON_ERROR = ""
try:
    import triton
    import triton.language as tl
except ImportError as error:  # CPU-only and non-Linux installs of PyTorch come without Triton
    HAS_TRITON = False
    TRITON_ERROR = str(error)

    class _Absent:
        """Accepts the decorators and annotations of a kernel file; calling a kernel is what fails."""

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def jit(self, function: Any) -> Any:
            return function

        def constexpr(self, value: Any) -> Any:
            return value

    triton = tl = _Absent()

# Read once: Triton itself decides at decoration time, so a later change of the variable has no effect on either.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

_embedding: ContextVar[bool] = ContextVar("gac_kernels_embedding", default=False)

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "TRITON_ERROR",
    "cdiv",
    "embedding",
    "is_embedding",
    "launchable",
    "next_power_of_2",
    "tl",
    "triton",
]


def is_embedding() -> bool:
    """Whether launches go into a graph that a compiler traces: tensors have no memory, and sizes may be symbols."""
    return _embedding.get()


@contextmanager
def embedding() -> Iterator[None]:
    """Put launches into the graph that is traced within ``with``."""
    token = _embedding.set(True)
    try:
        yield
    finally:
        _embedding.reset(token)


def launchable(kernel: Any) -> Any:
    """The kernel, or what puts its launch into a graph, see `embedding`."""
    return _Embedded(kernel) if _embedding.get() else kernel


class _Embedded:
    """A kernel whose launches go into a graph, with all its arguments: what analyses the graph knows no defaults."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        from torch.library import wrap_triton

        def launch(*args: Any, **kwargs: Any) -> None:
            rest = [*self.kernel.signature.parameters.values()][len(args) :]
            defaults = {one.name: one.default for one in rest if one.default is not one.empty}
            wrap_triton(self.kernel)[grid](*args, **(defaults | kwargs))

        return launch


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up; faster on the host than Triton's own."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
