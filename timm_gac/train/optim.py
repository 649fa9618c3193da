"""Parameter groups, optimiser, schedule and moving average; rates are tensors, so that a CUDA graph can read them."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ..layers.encoder import GatedAttentionCoding
from ..layers.learned import LearnedValues
from ..layers.parameter_groups import parameters_of
from ..layers.weight_decay import expect_decay
from .idle import refuse_idle_rate
from .recipes import Recipe


def create_optimizer(
    model: Any, recipe: Recipe, device: torch.device, *, resumed: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimiser, without weight decay of norms, biases and the names in ``model.no_weight_decay()``.

    The gate's attention, which is among these names, has the decay that ``gate_decay`` says.

    Args:
        model: The network.
        recipe: Its recipe.
        device: Where the learning rates are kept.
        resumed: Refuse nothing: the recipe is that of a run which has begun.

    Raises:
        ValueError: The recipe gives a rate or decay to a gate, or a rate to neurons, that do not learn.
    """
    # By name, since it depends on timm's version whether it leaves out one-dimensional parameters itself.
    skip = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    if hasattr(model, "no_weight_decay"):
        skip |= set(model.no_weight_decay())
    if recipe.layer_decay is None:
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=skip)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay=recipe.weight_decay, no_weight_decay_list=tuple(skip), layer_decay=recipe.layer_decay
        )
    neurons = parameters_of(model, LearnedValues)
    gate = parameters_of(model, GatedAttentionCoding) - neurons  # an encoder's neuron is no part of its attention
    for name, parameters in (("gate_lr", gate), ("neuron_lr", neurons), ("gate_decay", gate)):
        value = getattr(recipe, name)
        if value == getattr(Recipe, name):
            continue
        learn = any(id(parameter) in parameters for group in groups for parameter in group["params"])
        if not (learn or resumed):
            refuse_idle_rate(recipe, name, model)
        own = {"weight_decay": recipe.weight_decay * value} if name == "gate_decay" else {"lr_scale": value}
        groups = _with_own(groups, parameters, own)
    # Tensors, because a CUDA graph would keep a number for ever; the groups' rates differ by their lr_scale.
    for group in groups:
        group["lr"] = torch.tensor(recipe.lr, device=device)
    cuda = device.type == "cuda"
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=cuda)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=cuda, capturable=cuda)
    if recipe.gate_decay:
        expect_decay(optimizer)
    return optimizer


def _with_own(groups: list[dict[str, Any]], chosen: set[int], own: dict[str, float]) -> list[dict[str, Any]]:
    """The groups, each followed by one of those of its parameters, by id, that have a rate or decay of their own.

    This order is the one by which checkpoints number the state of parameters.

    Args:
        groups: Groups of parameters.
        chosen: Ids of those parameters.
        own: Their ``weight_decay``, or a factor of their ``lr_scale``.
    """
    divided = []
    for group in groups:
        changes = {k: group.get(k, 1.0) * value if k == "lr_scale" else value for k, value in own.items()}
        for inside, new in ((False, group), (True, group | changes)):
            part = [parameter for parameter in group["params"] if (id(parameter) in chosen) == inside]
            if part:
                divided.append(new | {"params": part})
    return divided


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine to ``min_lr`` at the last step.

    The warm-up takes at most half of the run.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = min(recipe.warmup_epochs, recipe.epochs / 2) * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1.0, total - warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's rate to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr * group.get("lr_scale", 1.0))


def freeze_stages(model: nn.Module, stages: int) -> list[str]:
    """Stop training the stem and encoder (``stages`` >= 1) and the first ``stages - 1`` stages of blocks.

    Returns:
        Names of the model's frozen children, which must stay in eval mode to keep their running statistics.

    Raises:
        ValueError: The model has fewer stages.
    """
    if not stages:
        return []
    children = [name for name, _ in model.named_children()]
    layers = [name for name in children if name.startswith("layer")]
    if stages - 1 > len(layers):
        raise ValueError(f"expected freeze_stages of at most {len(layers) + 1}, got {stages}: the model has no more")
    frozen = [*children[: children.index(layers[0])], *layers[: stages - 1]]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return frozen


class MovingAverage:
    """Exponential moving average of weights and running statistics, ``decay`` a step, with a warm-up.

    A step's decay is ``min(decay, (1 + step) / (10 + step))``, so that early weights are soon forgotten. `set_step`
    writes it into a tensor and `update` has no branch, so that a CUDA graph can replay it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        state = model.state_dict()
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        self._floating, self._counting = floating, [name for name in state if name not in set(floating)]
        self._averages = [self.state[name] for name in floating]
        self.follow(model)
        self._share = torch.zeros((), device=next(model.parameters()).device)

    def follow(self, model: nn.Module) -> None:
        """Average the model's current tensors from now on; needed after they were replaced."""
        state = model.state_dict()
        self._sources = [state[name] for name in self._floating]
        self._counters = [(self.state[name], state[name]) for name in self._counting]

    def set_step(self, step: int) -> None:
        """Set the decay of the update after ``step`` earlier ones."""
        self._share.fill_(1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's current weights."""
        towards = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(towards, self._share)
        torch._foreach_add_(self._averages, towards)
        for average, source in self._counters:
            average.copy_(source)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a saved average in place."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
