"""The one meaning of ``--device``."""

from __future__ import annotations

import torch


def device_type(name: str | torch.device) -> str:
    """The kind of device that a user names, ``cuda`` or ``cpu`` among others; it need not be there.

    Args:
        name: ``auto`` for CUDA where there is one, else the CPU; or a device as PyTorch spells it: ``cpu``, ``cuda:1``.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name).type


def resolve_device(name: str | torch.device) -> torch.device:
    """The device that a user names.

    Args:
        name: As for `device_type`.

    Raises:
        ValueError: This machine has no such device.
    """
    try:
        return torch.empty(0, device=device_type(name) if name == "auto" else name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch without CUDA asserts
        raise ValueError(f"expected a device of this machine, got {str(name)!r}: use auto or cpu") from error
