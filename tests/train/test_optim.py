"""Which parameters the trainer's optimiser decays."""

from __future__ import annotations

import pytest
import timm
import torch

from timm_gac.train.checkpoints import restore_optimizer
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


def is_gate(name: str) -> bool:
    """Whether a parameter is of the encoder's attention."""
    return name.startswith("encoder.") and ".learned." not in name


def is_neuron(name: str) -> bool:
    """Whether a parameter is a learned decay or threshold."""
    return "learned." in name


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize(("field", "scaled", "count"), [("gate_lr", is_gate, 4), ("neuron_lr", is_neuron, 16)])
def test_gate_and_neurons_have_rates_of_their_own(field, scaled, count, layer_decay):
    model = timm.create_model("test_gac_msresnet", num_classes=3, neuron="plif")
    names = {id(value): name for name, value in model.named_parameters()}
    assert sum(map(scaled, names.values())) == count
    rates = []
    for factor in (1.0, 0.1):
        recipe = Recipe(model="test_gac_msresnet", neuron="plif", layer_decay=layer_decay, **{field: factor})
        optimizer = create_optimizer(model, recipe, torch.device("cpu"))
        set_learning_rate(optimizer, 0.2)
        rates.append({names[id(p)]: group["lr"].item() for group in optimizer.param_groups for p in group["params"]})
    assert rates[0].keys() == rates[1].keys() == set(names.values())
    for name, rate in rates[0].items():
        assert rates[1][name] == pytest.approx(rate * (0.1 if scaled(name) else 1.0)), name


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_gate_may_decay_as_the_others_do_or_less(layer_decay):
    model = timm.create_model("test_gac_msresnet", num_classes=3, neuron="plif")
    names = {id(value): name for name, value in model.named_parameters()}
    decays = []
    for factor in (0.0, 0.1):
        recipe = Recipe(
            model="test_gac_msresnet", neuron="plif", layer_decay=layer_decay, gate_decay=factor, gate_lr=0.5
        )
        groups = create_optimizer(model, recipe, torch.device("cpu")).param_groups
        decays.append({names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]})
        assert {group["lr_scale"] for group in groups if is_gate(names[id(group["params"][0])])} != {1.0}
    assert decays[0].keys() == decays[1].keys() == set(names.values())
    for name, decay in decays[0].items():
        assert decay == 0.0 or not is_gate(name)
        assert decays[1][name] == (pytest.approx(0.1 * recipe.weight_decay) if is_gate(name) else decay), name


def test_state_is_numbered_group_by_group_and_never_lands_on_another_parameter():
    """Each group's own part comes right behind it, as in checkpoints of earlier commits."""
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    names = {id(value): name for name, value in model.named_parameters()}
    optimizers = [
        create_optimizer(model, Recipe(model="test_gac_msresnet", layer_decay=0.7, gate_lr=rate), torch.device("cpu"))
        for rate in (1.0, 0.1)
    ]
    flat, own = ([[names[id(p)] for p in group["params"]] for group in o.param_groups] for o in optimizers)
    expected = [part for group in flat for part in ([n for n in group if not is_gate(n)], list(filter(is_gate, group)))]
    assert own == [part for part in expected if part]
    first = torch.zeros(7)
    with pytest.raises(ValueError, match=r"expected momentum_buffer of shape .* for parameter 0, got \(7,\)"):
        restore_optimizer(optimizers[1], {"0.momentum_buffer": first}, {})


def test_no_warning_of_a_decay_that_was_asked_for(recwarn):
    """An optimiser of somebody's own with decay on the gate is warned of: see tests/layers."""
    model = timm.create_model("test_gac_msresnet", num_classes=3).train()
    recipe = Recipe(model="test_gac_msresnet", gate_decay=1.0)
    optimizer = create_optimizer(model, recipe, torch.device("cpu"))
    model(torch.randn(2, *model.pretrained_cfg["input_size"])).sum().backward()
    optimizer.step()
    assert not [warning for warning in recwarn if "weight decay" in str(warning.message)]


@pytest.mark.parametrize("field", ["gate_lr", "neuron_lr"])
def test_a_rate_below_zero_is_refused(field):
    with pytest.raises(ValueError, match=f"expected {field} >= 0, got -1"):
        Recipe(**{field: -1})
