"""Parameter groups for an optimiser: weight decay that spares what it would harm, and a rate for the encoder's gate."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import nn

from .encoder import GatedAttentionCoding
from .learned import LearnedValues
from .neuron_layer import NeuronLayer


def parameter_groups(
    model: nn.Module, weight_decay: float, *, lr: float | None = None, gate_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weight decay for weights, none for gates, neurons, norms and biases.

    A gate of gated attention coding is the sigmoid of a product of two scores, each of which scales the other's
    gradient. Decay takes both to 0, from where no gradient leads back; a rate that suits convolutions makes both grow
    until the gate is a fixed mask (docs/gate.md). Norms and biases are the parameters with at most one axis.

    Args:
        model: Any network; names in its ``no_weight_decay()`` are spared too.
        weight_decay: Of the first group, at least 0.
        lr: Learning rate of all but the gates, at least 0; left out, the optimiser's.
        gate_lr: Learning rate of the gates' attention as a factor of ``lr``, at least 0, as in ``timm-gac train``; one
            other than 1 wants ``lr``.

    Returns:
        Two groups, with and without decay, of the parameters that require gradients, each parameter once. With a
        ``gate_lr`` other than 1 a third has the gates' attention, without decay. Schedulers of PyTorch and timm scale
        the rate of each.

    Raises:
        ValueError: ``weight_decay``, ``lr`` or ``gate_lr`` is no finite number of at least 0, ``model`` is no network,
            or a ``gate_lr`` comes without ``lr`` or without a gate that learns.

    Examples:
        >>> import timm, timm_gac, torch
        >>> model = timm.create_model("test_gac_msresnet")
        >>> optimizer = torch.optim.SGD(timm_gac.parameter_groups(model, 5e-4), lr=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
        >>> groups = timm_gac.parameter_groups(model, 5e-4, lr=0.1, gate_lr=0.1)
        >>> [round(group["lr"], 4) for group in torch.optim.SGD(groups).param_groups]
        [0.1, 0.1, 0.01]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a network, got {type(model).__name__}: give the module, not its parameters")
    for name, value, example in (("weight_decay", weight_decay, 5e-4), ("lr", lr, 0.1), ("gate_lr", gate_lr, 0.1)):
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value >= 0.0
        if not (number or (name == "lr" and value is None)):
            raise ValueError(f"expected {name} of at least 0, got {value!r}: give a number such as {example:g}")
    neurons = parameters_of(model, NeuronLayer)  # an encoder is one too
    gates = parameters_of(model, GatedAttentionCoding) - parameters_of(model, LearnedValues)
    named: Any = getattr(model, "no_weight_decay", set)
    names = set(named())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    attention: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates and gate_lr != 1:
            attention.append(parameter)
        elif parameter.ndim <= 1 or name in names or id(parameter) in neurons:
            others.append(parameter)
        else:
            decayed.append(parameter)
    rate = {} if lr is None else {"lr": lr}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, **rate},
        {"params": others, "weight_decay": 0.0, **rate},
    ]
    if gate_lr == 1:
        return groups
    if lr is None:
        raise ValueError(
            f"expected lr with gate_lr={gate_lr!r}, a factor of it, got none: give the optimiser's rate here"
        )
    if not attention:
        raise ValueError(f"expected a gate that learns with gate_lr={gate_lr!r}, got none: leave gate_lr out")
    return [*groups, {"params": attention, "weight_decay": 0.0, "lr": lr * gate_lr}]


def parameters_of(model: nn.Module, kind: type[Any]) -> set[int]:
    """The ids of the parameters of all modules of one kind.

    Args:
        model: A network.
        kind: Class of the modules.
    """
    owners = [module for module in model.modules() if isinstance(module, kind)]
    return {id(parameter) for owner in owners for parameter in owner.parameters()}
