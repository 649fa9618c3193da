"""Checks that several layers share."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["SetOnce", "check_num_steps", "has_hooks"]


class SetOnce:
    """An attribute of a module that its constructor sets and that cannot be changed afterwards.

    Other modules and parameters have been built for its value: a module with another number of time steps would group
    the rows of a time-folded batch otherwise, without an error. There is no ``__get__``, so reading the attribute is as
    fast as without this.

    Args:
        remedy: What to do instead, for the error message.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, module: nn.Module, value: Any) -> None:
        before = vars(module).setdefault(self.name, value)
        if before != value:
            raise ValueError(
                f"expected {self.name} of {type(module).__name__} to stay {before!r}, got {value!r}: {self.remedy}"
            )


def fixed_num_steps() -> Any:
    """The attribute ``num_steps`` of a module, see `SetOnce`; typed as Any, since it reads as the value."""
    return SetOnce("create the network or module with this num_steps and load its state_dict")


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
