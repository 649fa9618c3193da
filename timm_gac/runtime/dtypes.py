"""The names of floating-point formats, as options, tables and files spell them."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Precision of a computation to the dtype of its autocast; None is no autocast. tf32 is float32 whose convolutions and
# matrix products may use TensorFloat-32.
AUTOCAST: dict[str, torch.dtype | None] = DTYPES | {"float32": None, "tf32": None}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast of a precision; a disabled one for ``float32`` and ``tf32``.

    Args:
        device: Where the block computes.
        precision: A key of `AUTOCAST`.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in AUTOCAST:
        raise ValueError(f"expected a precision out of {list(AUTOCAST)}, got {precision!r}: choose one of these")
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
