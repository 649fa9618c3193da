"""Checks that several layers share."""

from __future__ import annotations

from torch import nn

__all__ = ["check_num_steps", "has_hooks"]


def check_num_steps(num_steps: int) -> int:
    """``num_steps`` itself where it is a valid number of time steps, else a ValueError."""
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"expected num_steps as an integer >= 1, got {num_steps!r}: give one such as 4")
    return num_steps


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or a replaced forward would notice that a module is not called, its work being done elsewhere."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
