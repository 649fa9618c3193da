"""Which implementation an op runs: one switch, resolved in one place, never in silence.

``TIMM_GAC_BACKEND`` (``auto``, ``triton`` or ``eager``) sets the process default, `use_backend` overrides it for a
block. ``auto`` is Triton on a CUDA (or ROCm) device that has Triton and plain PyTorch elsewhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .common.triton import HAS_TRITON, INTERPRETED, TRITON_ERROR

BACKENDS = ("auto", "triton", "eager")
# A plain module global, not a context variable: autograd runs backward passes on threads of its own, and those must
# see the same choice as the thread that entered `use_backend`.
_forced: str | None = None
_warned = False


def requested_backend() -> str:
    """The backend asked for by `use_backend` or ``TIMM_GAC_BACKEND``: ``auto``, ``triton`` or ``eager``."""
    choice = _forced or os.environ.get("TIMM_GAC_BACKEND", "auto").strip().lower() or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"expected TIMM_GAC_BACKEND out of {BACKENDS}, got {choice!r}: set it to one of these")
    return choice


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for the whole process.

    Args:
        name: ``auto``, ``triton`` or ``eager``.

    Raises:
        ValueError: Any other name was given.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"expected a backend out of {BACKENDS}, got {name!r}: choose one of these")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def resolve_backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that an op on ``device`` will run: ``triton`` or ``eager``.

    The kernels compute in float32, so ``auto`` sends float64 input to plain PyTorch, which keeps its precision.

    Raises:
        ValueError: ``triton`` was asked for and cannot run on this device; the message says why.
    """
    global _warned
    choice = requested_backend()
    if choice == "eager":
        return "eager"
    device_type = device if isinstance(device, str) else device.type
    on_gpu = device_type.startswith("cuda")
    if choice == "triton":
        if dtype == torch.float64:
            raise ValueError("expected float32, float16 or bfloat16 for backend 'triton', got float64: use 'eager'")
        if not HAS_TRITON:
            raise ValueError(f"expected Triton for backend 'triton', got none ({TRITON_ERROR}): use 'auto'")
        if not on_gpu and not (INTERPRETED and device_type == "cpu"):
            raise ValueError(
                f"expected a CUDA device for backend 'triton', got {device_type!r}: move the tensors to a GPU, use "
                "backend 'auto', or set TRITON_INTERPRET=1 before the first import to interpret kernels on the CPU"
            )
        return "triton"
    if not on_gpu or dtype == torch.float64:
        return "eager"
    if not HAS_TRITON:
        if not _warned:
            warnings.warn(f"Triton is missing ({TRITON_ERROR}): spiking ops run as plain PyTorch, slower", stacklevel=3)
            _warned = True
        return "eager"
    return "triton"
