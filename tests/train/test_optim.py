"""Which parameters the trainer's optimiser decays."""

from __future__ import annotations

import pytest
import timm
import torch

from timm_gac.train.optim import create_optimizer
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
