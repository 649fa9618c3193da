"""Triton's interpreter replaces the functions of its language by its own at the first call of a kernel alone.

Triton 3.8 does so, by a look at every attribute of the language, again at each call of a device function: that takes
longer than what the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Replace what is not replaced yet, from the begin of a kernel to its end, in this process."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another version
        return
    replace, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    done = set[int]()  # by module that a function is of, whose names for the language count

    def replace_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        done.add(module)
        return replace(function)

    def restored(scope: Any) -> None:
        done.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = replace_once, restored
