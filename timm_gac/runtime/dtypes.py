"""The names of floating-point formats, as options, tables and files spell them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Precision of a computation to the dtype of its autocast; None is no autocast. tf32 is float32 whose convolutions
# may use TensorFloat-32.
AUTOCAST: dict[str, torch.dtype | None] = DTYPES | {"float32": None, "tf32": None}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The autocast of a precision; for ``float32`` and ``tf32`` none, and `float32_as` the precision says.

    Args:
        device: Where the block computes.
        precision: A key of `AUTOCAST`.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in AUTOCAST:
        raise ValueError(f"expected a precision out of {list(AUTOCAST)}, got {precision!r}: choose one of these")
    return _computing(device, AUTOCAST[precision], tf32=precision == "tf32")


def computing(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to a dtype; with None no autocast, and float32 is float32, see `float32_as`.

    Args:
        device: Where the block computes.
        dtype: Of autocast, or None.
    """
    return _computing(device, dtype, tf32=False)


@contextmanager
def _computing(device: torch.device, dtype: torch.dtype | None, *, tf32: bool) -> Iterator[None]:
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        if dtype is not None or device.type != "cuda":
            yield
            return
        with float32_as("tf32" if tf32 else "ieee"):
            yield


def float32_forms() -> tuple[str, ...]:
    """How a GPU multiplies float32 now, in matrix products, convolutions and recurrent layers.

    It can be asked whichever of PyTorch's switches was used: ``torch.get_float32_matmul_precision`` raises an error
    once the newer ones were.
    """
    cudnn: Any = torch.backends.cudnn
    return tuple(part.fp32_precision for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn))


@contextmanager
def float32_as(form: Literal["ieee", "tf32"]) -> Iterator[None]:
    """How cuDNN's convolutions of float32 multiply on a GPU within the block.

    PyTorch lets them use TensorFloat-32, of 11 significant bits, where nobody asks: a float32 accuracy of a spiking
    network is then another one, as rounding flips spikes. Matrix products do not use it unless asked to.

    What measures a network in float32 has ``@float32_as("ieee")`` before it. The switch is the process's: of threads,
    only one at a time may be within such a block.
    """
    # The older of PyTorch's two switches, unless somebody has used the newer one, which forbids it; and for ieee unless
    # TensorFloat-32 was allowed for all of cuDNN or PyTorch, on which convolutions fall back with the older one off.
    cudnn: Any = torch.backends.cudnn
    places: list[tuple[Any, str, Any, Any]]
    places = [(part, "fp32_precision", part.fp32_precision, form) for part in (cudnn.conv, cudnn.rnn)]
    if cudnn.fp32_precision != "tf32" or form == "tf32":
        with suppress(RuntimeError):
            places = [(cudnn, "allow_tf32", cudnn.allow_tf32, form == "tf32")]
    for owner, name, _, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, before, _ in places:
            setattr(owner, name, before)
