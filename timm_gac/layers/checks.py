"""Checks that several layers share: their arguments, and whether a kernel may do a module's work without calling it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

Forwards = tuple[Callable[..., Any], ...]  # the forward functions of classes, such as (nn.Conv2d.forward,)

_LOGGER = logging.getLogger(__name__)
_LOGGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
    """``num_steps`` as an int where it is a valid number of time steps, NumPy's too, else a ValueError."""
    return check_count("num_steps", num_steps, 4)


def check_count(name: str, value: Any, example: int) -> int:
    """``value`` as an int where it is an integer of at least 1, NumPy's too, else a ValueError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected {name} as an integer >= 1, got {value!r}: give one such as {example}")
    return int(value)


def may_skip(module: nn.Module, forwards: Forwards) -> bool:
    """Whether a kernel may do a module's work: nothing notices that it is not called, and its forward is a known one.

    Args:
        module: The module that would not be called.
        forwards: Forward functions that the kernel stands for.
    """
    return (
        type(module).forward in forwards
        and "forward" not in vars(module)
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or _has_any_global_hook()
        )
    )


def why_called(module: nn.Module, forwards: Forwards) -> str | None:
    """Why a module has to be called, in words; None where `may_skip` is true. Arguments as there."""
    if type(module).forward not in forwards:
        return "it is parametrised" if is_parametrized(module) else "its class has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None if may_skip(module, forwards) else "it has hooks, or there are hooks on all modules"


def log_called(module: nn.Module, forwards: Forwards) -> None:
    """Log once why a module is called where a faster kernel could have done its work; nothing while compiling."""
    if torch.compiler.is_compiling() or module in _LOGGED or _watched_by_design(module):
        return
    reason = why_called(module, forwards)
    if reason is not None:
        _LOGGED.add(module)
        _LOGGER.info("%s is called, as no faster kernel can do its work: %s", type(module).__name__, reason)


def _watched_by_design(module: nn.Module) -> bool:
    """Whether what watches a module is this package's own: early exit's forward, or a recorder's hooks alone."""
    replaced = vars(module).get("forward")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    watching = hooks if replaced is None else [replaced, *hooks]
    return bool(watching) and all(getattr(one, "by_design", False) for one in watching)
