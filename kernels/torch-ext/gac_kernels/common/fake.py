"""Shapes of an operator's outputs for `torch.compile`, under which older versions of it learn of the operator too."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

# Before 2.14 Inductor writes the arguments of an operator that it does not know into a log message that nobody asked
# for. The text of a network's later values repeats that of all before them, so that compiling does not end.
_LOGS_ARGUMENTS = TorchVersion(torch.__version__) < "2.14"


def register_fake(name: str, *, lib: torch.library.Library) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.register_fake` for an operator of this package, as a decorator.

    Args:
        name: ``gac_kernels::`` and the operator's name.
        lib: Library that has it.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not _LOGS_ARGUMENTS:
            torch.library.register_fake(name, function, lib=lib)
            return function

        @functools.wraps(function)
        def fake(*args: Any, **options: Any) -> Any:
            make_known(name)
            return function(*args, **options)

        torch.library.register_fake(name, fake, lib=lib)
        return function

    return register


def make_known(name: str) -> None:
    """Tell Inductor, where it is at work, what it would find out itself: that it has to call the operator as it is."""
    lowering: Any = sys.modules.get("torch._inductor.lowering")  # its compilers trace a network once it is imported
    if lowering is None:
        return
    namespace, _, base = name.partition("::")
    op = getattr(getattr(torch.ops, namespace), base).default
    if op not in lowering.lowerings:
        tag = lowering.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
