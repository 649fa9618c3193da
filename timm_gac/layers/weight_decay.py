"""Weight decay that spares what it would harm: the encoder's gate, neurons, norms and biases."""

from __future__ import annotations

import math
import warnings
import weakref
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .neuron_layer import NeuronLayer

_GATES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_SEEN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weight decay for weights, none for gates, neurons, norms and biases.

    A gate of gated attention coding is the sigmoid of a product of two scores, each of which scales the other's
    gradient. Decay takes both to 0, from where no gradient leads back. Norms and biases are the parameters with at most
    one axis.

    Args:
        model: Any network; names in its ``no_weight_decay()`` are spared too.
        weight_decay: Of the first group, at least 0.

    Returns:
        Two groups, with and without decay, of the parameters that require gradients, each parameter once.

    Raises:
        ValueError: ``weight_decay`` is no finite number of at least 0, or ``model`` is no network.

    Examples:
        >>> import timm, timm_gac, torch
        >>> model = timm.create_model("test_gac_msresnet")
        >>> optimizer = torch.optim.SGD(timm_gac.parameter_groups(model, 5e-4), lr=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a network, got {type(model).__name__}: give the module, not its parameters")
    number = isinstance(weight_decay, Real) and not isinstance(weight_decay, bool)
    if not (number and weight_decay >= 0.0 and math.isfinite(weight_decay)):
        raise ValueError(f"expected weight_decay of at least 0, got {weight_decay!r}: give a number such as 5e-4")
    named: Any = getattr(model, "no_weight_decay", set)
    names = set(named())
    neurons = [module for module in model.modules() if isinstance(module, NeuronLayer)]  # an encoder is one too
    spared = {id(parameter) for module in neurons for parameter in module.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 or name in names or id(parameter) in spared
            (others if spare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


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
            "pass timm_gac.parameter_groups(model, weight_decay) to the optimiser",
            stacklevel=4,
        )
