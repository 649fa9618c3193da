"""A setting that would change nothing is refused before training; one that nobody gave is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from timm_gac.train.optim import create_optimizer, freeze_stages
from timm_gac.train.recipes import RECIPES, Recipe
from timm_gac.train.setup import settled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tet_lambda=0.1), r"expected loss='tet' for tet_lambda=0\.1, got loss='mean': leave --tet-lambda out"),
        (
            dict(gate_decay=1.0, weight_decay=0.0),
            r"expected weight_decay > 0 for gate_decay=1\.0, got weight_decay=0\.0",
        ),
        (dict(distill_weight=0.7), r"expected a teacher for distill_weight=0\.7, got none: leave --distill-weight out"),
        (dict(distill_temperature=2.0), r"expected a teacher for distill_temperature=2\.0, got none"),
        (dict(optimizer="adamw", momentum=0.5), r"expected optimizer='sgd' for momentum=0\.5, got optimizer='adamw'"),
        (dict(mix_probability=0.3), r"expected mixup or cutmix for mix_probability=0\.3, got neither"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settled(replace(Recipe(), **changes), "custom")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "changes", [{}, dict(model="ann_resnet18_cifar"), dict(loss="mean", optimizer="adamw")], ids=str
)
def test_what_a_recipe_says_itself_is_not_refused(name: str, changes: dict) -> None:
    given = replace(RECIPES[name], **changes)
    assert settled(given, name).loss == ("mean" if "model" in changes else given.loss)
    without = replace(given, cutmix=0.0, mixup=0.0)  # the recipe's share of mixed images stays
    assert settled(without, name).mix_probability == given.mix_probability


def test_what_differs_from_the_recipe_is_refused_though_it_is_the_default_of_others() -> None:
    given = replace(RECIPES["cifar100_fast"], loss="mean", tet_lambda=0.05)
    with pytest.raises(ValueError, match=r"loss='tet' for tet_lambda=0\.05"):
        settled(given, "cifar100_fast")


@pytest.mark.parametrize(
    "given",
    [
        replace(Recipe(), optimizer="adamw", momentum=0.0),
        replace(RECIPES["cifar100_fast"], cutmix=0.0),
        replace(RECIPES["tiny_imagenet_first"], model="ann_resnet34"),
    ],
    ids=["momentum", "cutmix", "ann"],
)
def test_what_asks_for_nothing_or_is_a_recipes_own_is_not_refused(given: Recipe) -> None:
    assert settled(given, "custom").optimizer == given.optimizer


def test_a_run_that_has_begun_is_not_refused() -> None:
    """It may be older than what is refused now, and must go on with its own options."""
    given = replace(Recipe(), tet_lambda=0.1, gate="half", gate_lr=0.1)
    assert settled(given, "custom", resumed=True) == given
    network = timm.create_model("test_gac_msresnet", device="meta", gate="half")
    create_optimizer(network, given, torch.device("cpu"), resumed=True)


@pytest.mark.parametrize(
    ("model", "field", "message"),
    [
        (
            dict(name="msresnet18_cifar"),
            "gate_lr",
            "expected a gate that learns for gate_lr=0.1, got a network without",
        ),
        (dict(gate="half"), "gate_lr", "got gate='half': leave --gate-lr out"),
        (dict(frozen=1), "gate_lr", "got gate='full' and freeze_stages=1: leave --gate-lr out"),
        (
            dict(gate="open"),
            "gate_decay",
            "a gate that learns for gate_decay=0.1, got gate='open': leave --gate-decay out",
        ),
        ({}, "neuron_lr", "decay and threshold for neuron_lr=0.1, got neuron='lif': leave --neuron-lr out, or give"),
        (dict(neuron="ternary"), "neuron_lr", "got neuron='ternary'"),
        (dict(name="ann_resnet18_cifar"), "neuron_lr", "got a network without such"),
    ],
    ids=str,
)
def test_a_rate_of_nothing_is_refused(model: dict, field: str, message: str) -> None:
    name, frozen = model.pop("name", "test_gac_msresnet"), model.pop("frozen", 0)
    network = timm.create_model(name, device="meta", **model)
    freeze_stages(network, frozen)
    with pytest.raises(ValueError, match=message):
        create_optimizer(network, Recipe(freeze_stages=frozen, **{field: 0.1}), torch.device("cpu"))
