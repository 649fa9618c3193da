"""Which implementation an op runs: one switch, resolved in one place, never in silence.

``TIMM_GAC_BACKEND`` (``auto``, ``triton`` or ``eager``) sets the process default, `use_backend` overrides it for a
block in the thread or task that entered it. ``auto`` is Triton on a CUDA (or ROCm) device that has Triton, and plain
PyTorch elsewhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .common.messages import shown
from .common.triton import HAS_TRITON, INTERPRETED, TRITON_ERROR

BACKENDS = ("auto", "triton", "eager")
# Of the thread or task: two blocks that overlap in time do not see each other. Autograd runs backward passes on threads
# of its own, so each op remembers what its forward pass ran under.
_forced: ContextVar[str | None] = ContextVar("gac_kernels_backend", default=None)
_warned = False


def forced_backend() -> str | None:
    """What `use_backend` asks for here, None outside of its blocks."""
    return _forced.get()


def requested_backend() -> str:
    """The backend asked for by `use_backend` or ``TIMM_GAC_BACKEND``: ``auto``, ``triton`` or ``eager``."""
    choice = _forced.get() or os.environ.get("TIMM_GAC_BACKEND", "auto").strip().lower() or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"expected TIMM_GAC_BACKEND out of {BACKENDS}, got {choice!r}: set it to one of these")
    return choice


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for this thread or task and for the backward passes of what runs in it.

    A compiled network's backward pass on a GPU runs on a thread of autograd's, outside of the block: set
    ``TIMM_GAC_BACKEND`` for it.

    Args:
        name: ``auto``, ``triton`` or ``eager``.

    Raises:
        ValueError: Any other name was given.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend out of {BACKENDS}, got {shown(name)}: choose one of these")
    previous = _forced.get()
    _forced.set(name)
    try:
        yield
    finally:
        _forced.set(previous)


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
