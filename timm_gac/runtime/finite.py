"""Detection of NaN and infinity: a comparison with NaN is false, so spikes hide it from all that follows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity. Waits for the device."""
    return [name for name, t in tensors if t.is_floating_point() and not t.is_meta and not torch.isfinite(t).all()]


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or infinity: a NaN membrane never fires, so the logits would not show it.

    Args:
        model: Any network. Its tensors without values, on the device ``meta``, are not looked at.
        where: Behind "weights" in the message.

    Raises:
        ValueError: A parameter or a buffer is not finite, or a running variance is negative.
    """
    state = model.state_dict()
    names = names_not_finite(state.items())
    variances = (name for name, t in state.items() if name.endswith("running_var") and not t.is_meta)
    names += [name for name in variances if bool((state[name] < 0).any())]
    if names:
        raise ValueError(
            f"expected finite weights {where}, got NaN, infinity or a negative variance in {names[0]}: "
            "train again, or download or convert them again"
        )
