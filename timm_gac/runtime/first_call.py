"""A network's first call with inputs of a kind, for which its kernels are compiled side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gac_kernels import compile_ahead

SWITCH = "TIMM_GAC_COMPILE_AHEAD"  # 0: kernels are compiled one after the other, as they are launched
_KINDS = 64  # of inputs a network; more have sizes that vary, and mostly the kernels of those before them

_known: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


def compiled_first(model: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``; at the first call with such an x its kernels are compiled side by side before.

    That calls the function twice, so it is left out while training, which changes running statistics, and where hooks
    would see both calls.

    Args:
        model: The network, whose ``conv1`` has the dtype and memory format of its weights.
        function: A method of it that changes nothing in eval mode.
        x: Images.
    """
    if not isinstance(x, Tensor) or not x.is_cuda or model.training or torch.compiler.is_compiling():
        return function(x)
    weight = model.conv1.weight
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    given = (function.__name__, x.shape, x.stride(), x.dtype, x.device)
    kind = (*given, autocast, torch.is_grad_enabled(), weight.dtype, weight.stride())
    known = _known.setdefault(model, set())
    if kind in known or len(known) >= _KINDS:
        return function(x)
    if not may_compile_ahead(model) or getattr(model, "_is_replica", False):
        return function(x)
    result = compile_ahead(lambda: function(x), x.device)
    known.add(kind)
    return result


def may_compile_ahead(model: nn.Module) -> bool:
    """Whether a network may be called once more: not if hooks or something that counts operators would see that.

    Nor where it is switched off.
    """
    # Counted as by FlopCounterMode.
    if os.environ.get(SWITCH) == "0" or torch._C._len_torch_dispatch_stack() > 0 or _has_any_global_hook():
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module is not model
    )
