"""Triton where it is installed, and a stand-in with which the same files import where it is not.

Kernel launches and registered operators pass tensors by position and name constants only: both bind their arguments
anew at each call, and small networks are bound by that.
"""

from __future__ import annotations

import os
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

__all__ = ["HAS_TRITON", "INTERPRETED", "TRITON_ERROR", "cdiv", "next_power_of_2", "tl", "triton"]


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up; faster on the host than Triton's own."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
