"""Decay and threshold as tensors: one of each, or one a channel, in the form in which operators take them.

Operators take ``values`` (2, N): decays in the first row, thresholds in the second, N being 1 or the number of
channels, in the dtype of the membrane. Gradients come back in the same form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_tensor
from ..reference import state_dtype
from ..registry import neuron_by
from ..spec import LIFSpec


def stack_values(
    x: Tensor,
    channels: int | None,
    spec: LIFSpec,
    decay: Tensor | None,
    threshold: Tensor | None,
    names: tuple[str, str] = ("decay", "threshold"),
    expand: bool = False,
) -> Tensor | None:
    """The values (2, N) of a neuron; None where the spec's numbers hold for both.

    Args:
        x: What the neuron integrates.
        channels: C; None where x has no channels.
        spec: Whose number stands where one of the two is None.
        decay: One element or (C,), any floating dtype.
        threshold: Likewise.
        names: Of the two in error messages.
        expand: One value a channel also where one element is given.

    Raises:
        ValueError: One is no floating tensor on x's device with one element or one a channel, or the spec's neuron is
            not ``lif``.
    """
    if decay is None and threshold is None:
        return None
    spec.refuse_others("learned decay and threshold")
    dtype, rows = state_dtype(x.dtype), []
    for name, value, fixed in zip(names, (decay, threshold), (spec.decay, spec.threshold), strict=True):
        if value is not None:
            _check(name, value, x, channels)
            rows.append(value.reshape(-1))
        else:
            rows.append(torch.full((1,), fixed, dtype=dtype, device=x.device))  # no copy, which a CUDA graph refuses
    length = max(len(row) for row in rows)
    if expand and channels is not None:
        length = channels
    if rows[0].dtype != rows[1].dtype:
        rows = [row.to(dtype) for row in rows]
    return torch.stack([row.expand(length) for row in rows]).to(dtype)  # together: a kernel less than one by one


def _check(name: str, value: Tensor, x: Tensor, channels: int | None) -> None:
    check_tensor(name, value)
    if value.dtype not in DTYPES:
        raise ValueError(f"expected {name} as a floating tensor, got {value.dtype}: convert it with .float()")
    if value.device != x.device:
        raise ValueError(f"expected {name} on {x.device}, got {value.device}: move it with .to(x.device)")
    if value.numel() == 1 and value.dim() <= 1:
        return
    if channels is None or value.shape != (channels,):
        size = "one element" if channels is None else f"one element or shape ({channels},)"
        why = "x has no channel axis, (T, B, C, ...)" if channels is None else "one value a layer or one a channel"
        raise ValueError(f"expected {name} with {size}, got {tuple(value.shape)}: {why}")


def named_values(values: Tensor | None) -> dict[str, Any]:
    """Decay and threshold of values (2, N) by name, as references take them; none where there are none."""
    return {} if values is None else dict(zip(("decay", "threshold"), values.unbind(), strict=True))


def check_values(values: Tensor, length: int | None = None) -> None:
    """Raise unless values (2, N) are decays between 0 and 1 and thresholds above 0.

    On a CPU alone: a GPU would have to wait for the answer in every call.

    Args:
        values: As `stack_values` gives them, more pairs of rows for more neurons.
        length: N, where one is asked for.
    """
    if length is not None and values.shape[1] != length:
        raise ValueError(f"expected values (2, {length}), got {tuple(values.shape)}: give one a channel")
    if values.device.type != "cpu":
        return
    decays, thresholds = values.detach()[0::2], values.detach()[1::2]
    if not bool(((decays > 0.0) & (decays < 1.0)).all()):
        raise ValueError(
            f"expected decays between 0 and 1, got {_outside(decays, 1.0):g}: at 0 and 1 a sigmoid learns no more, use "
            "a LIFSpec for a fixed one"
        )
    if not bool(((thresholds > 0.0) & (thresholds < torch.inf)).all()):
        raise ValueError(
            f"expected finite thresholds > 0, got {_outside(thresholds, torch.inf):g}: learn the logarithm or, as "
            "timm_gac.LIF does, the softplus of one"
        )


def check_learnable(surrogate: int) -> None:
    """Raise unless the neuron of a surrogate's number can have values: ``lif`` alone."""
    neuron = neuron_by(surrogate)
    if neuron is not None:
        raise ValueError(f"expected neuron 'lif' for learned values, got {neuron.name!r}: leave the values out")


def check_binary(surrogate: int) -> None:
    """Raise unless the neuron of a surrogate's number has spikes that a bit holds."""
    neuron = neuron_by(surrogate)
    if neuron is not None and neuron.spikes != "binary":
        raise ValueError(
            f"expected spikes 0 or 1 for packed bits, got those of neuron {neuron.name!r}: it has none, leave them out"
        )


def _outside(values: Tensor, end: float) -> float:
    return float(values[~((values > 0.0) & (values < end))][0])
