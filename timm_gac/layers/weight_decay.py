"""A warning of weight decay on the encoder's gate."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_GATES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_SEEN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def warn_of_decay(gate: nn.Module) -> None:
    """Warn where the first step of an optimiser would apply weight decay to the parameters of this gate."""
    if not _GATES:
        register_optimizer_step_pre_hook(_look_once)
    _GATES.add(gate)


def expect_decay(optimizer: torch.optim.Optimizer) -> None:
    """Have no warning of this optimiser: somebody asked for the decay that it has."""
    _SEEN.add(optimizer)


def _look_once(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _SEEN:
        return
    _SEEN.add(optimizer)
    gates = {id(parameter) for gate in _GATES for parameter in gate.parameters()}
    groups = [group for group in optimizer.param_groups if group.get("weight_decay", 0.0)]
    if any(id(parameter) in gates for group in groups for parameter in group["params"]):
        warnings.warn(
            "expected no weight decay on GatedAttentionCoding, got an optimiser with some, which may silence its gate: "
            "pass timm_gac.parameter_groups(model, weight_decay, lr=lr, gate_lr=0.1) to the optimiser",
            stacklevel=4,
        )
