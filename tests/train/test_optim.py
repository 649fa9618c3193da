"""Which parameters the trainer's optimiser decays."""

from __future__ import annotations

import pytest
import timm
import torch

from timm_gac.train.optim import create_optimizer, set_learning_rate
from timm_gac.train.recipes import Recipe


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_gate_norms_and_biases_are_not_decayed(layer_decay):
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    recipe = Recipe(model="test_gac_msresnet", weight_decay=0.1, layer_decay=layer_decay)
    optimizer = create_optimizer(model, recipe, torch.device("cpu"))
    decayed = {id(value) for group in optimizer.param_groups if group["weight_decay"] for value in group["params"]}
    names = {name for name, value in model.named_parameters() if id(value) in decayed}
    assert "conv1.weight" in names and "layer1.0.conv1.weight" in names
    assert not [name for name in names if name.startswith("encoder.") or "bn" in name or name.endswith("bias")]


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_gate_has_a_rate_of_its_own(layer_decay):
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    names = {id(value): name for name, value in model.named_parameters()}
    rates = []
    for factor in (1.0, 0.1):
        recipe = Recipe(model="test_gac_msresnet", layer_decay=layer_decay, gate_lr=factor)
        optimizer = create_optimizer(model, recipe, torch.device("cpu"))
        set_learning_rate(optimizer, 0.2)
        rates.append({names[id(p)]: group["lr"].item() for group in optimizer.param_groups for p in group["params"]})
    assert rates[0].keys() == rates[1].keys() == set(names.values())
    for name, rate in rates[0].items():
        assert rates[1][name] == pytest.approx(rate * (0.1 if name.startswith("encoder.") else 1.0)), name


def test_a_rate_of_the_gate_below_zero_is_refused():
    with pytest.raises(ValueError, match="expected gate_lr >= 0, got -1"):
        Recipe(gate_lr=-1)
