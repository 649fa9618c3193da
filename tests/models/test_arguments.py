"""The arguments of a network: kept whole, as JSON holds them, and refused where they are out of range."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from gac_kernels import LIFSpec
from timm_gac.models.arguments import BLOCKS, ENCODERS, POOLS, check_model_args

# One change of each argument, against those of `test_gac_msresnet`.
CHANGES = {
    "block": "SpikingBlock",
    "layers": [1, 2, 1],
    "channels": [8, 12, 16],
    "strides": [2, 2, 2],
    "stem_width": 24,
    "stem_kernel": 7,
    "encoder": "direct",
    "gate": "temporal",
    "spec": LIFSpec(decay=0.25, reset="soft"),
    "num_steps": 3,
    "num_classes": 7,
    "in_chans": 2,
    "global_pool": "catavgmax",
    "drop_rate": 0.25,
    "drop_path_rate": 0.5,
    "scaled_init": True,
    "int8_convs": True,
    "neuron": "plif_channel",
}


def create(**arguments: object) -> torch.nn.Module:
    return timm.create_model("test_gac_msresnet", **arguments)


def assert_rebuilt(model: torch.nn.Module, changed: set[str]) -> None:
    arguments = json.loads(json.dumps(model.changed_args()))
    assert arguments.keys() == changed
    twin = create(**arguments)
    twin.load_state_dict(model.state_dict())
    frames = torch.randn(2, model.in_chans, 16, 16)
    for train in (True, False):
        torch.manual_seed(0)
        expected = model.train(train)(frames)
        torch.manual_seed(0)
        assert torch.equal(twin.train(train)(frames), expected)
    assert twin.model_args() == model.model_args()


@pytest.mark.parametrize("name", CHANGES)
def test_each_argument_rebuilds_the_network(name: str) -> None:
    assert_rebuilt(create(**{name: CHANGES[name]}), {name})


def test_all_arguments_together_and_what_was_changed_later() -> None:
    changes = CHANGES | {"encoder": "gac"}  # direct coding has no gate
    model = create(**changes)
    assert model.model_args().keys() == CHANGES.keys()
    assert_rebuilt(model, set(CHANGES) - {"encoder"})
    model.reset_classifier(5, "max")
    assert model.changed_args()["num_classes"] == 5 and model.changed_args()["global_pool"] == "max"
    assert_rebuilt(model, set(CHANGES) - {"encoder"})
    model = create(num_classes=0)
    model.prune_intermediate_layers([1])
    assert model.changed_args() == {"layers": [1, 0, 0], "num_classes": 0, "global_pool": ""}
    assert_rebuilt(model, {"layers", "num_classes", "global_pool"})
    model.prune_intermediate_layers([0])  # whose neurons no arguments take away
    with pytest.raises(ValueError, match="expected a network with a stage, got one that is pruned to its encoder"):
        model.model_args()


def test_registered_networks_have_no_changed_arguments() -> None:
    for name in timm.list_models(module="spiking_resnet"):
        assert timm.create_model(name, device="meta").changed_args() == {}, name


def test_neurons_of_two_specs_have_no_arguments() -> None:
    model = create()
    model.layer2[0].bn1.lif.spec = LIFSpec(threshold=0.5)
    with pytest.raises(ValueError, match="neurons of one spec, got 2"):
        model.model_args()


FIELDS = {
    "threshold": 1.0,
    "decay": 0.5,
    "surrogate": "triangle",
    "width": 1.0,
    "detach_reset": False,
    "reset": "hard",
}
WRONG = [
    *({"num_steps": value} for value in (0, 50_000, True, 2.0, "4", float("nan"))),
    *({"num_classes": value} for value in (-1, 10_000_000, 1.5)),
    *({"in_chans": value} for value in (0, 5000)),
    *({"stem_width": value} for value in (0, 8192)),
    *({"stem_kernel": value} for value in (0, 999)),
    *({"layers": value} for value in (5, (1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 100_000), "111", (1, 1, None))),
    *({"channels": value} for value in (5, (8, 8, 10**6), (8, 8), (0, 8, 8))),
    *({"strides": value} for value in ((1, 2, 0), (1, 2, 900), {})),
    *({"drop_rate": value} for value in (-0.1, 1.1, float("nan"), True, "0")),
    {"drop_path_rate": 2.0},
    *({"encoder": value} for value in ("rate", 1)),
    *({"gate": value} for value in ("none", 0.5)),
    {"encoder": "direct", "gate": "spatial"},
    *({"global_pool": value} for value in ("no", 1)),
    {"scaled_init": 1},
    {"int8_convs": 1},
    *({"block": value} for value in ("Block", torch.nn.ReLU, 3)),
    *({"spec": value} for value in (3, {"decay": 1.0}, FIELDS | {"decay": "x"}, FIELDS | {"more": 1})),
    *({"spec": FIELDS | {"decay": value}} for value in (2.0, float("nan"), True)),
    {"num_classes": 1_000_000, "channels": (8, 8, 512)},
]


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: "-".join(map(str, arguments.items()))[:60])
def test_what_is_out_of_range_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got .*: ") as caught:
        create(**arguments)
    assert len(str(caught.value)) < 500


def test_unknown_names_and_later_classifiers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"among num_steps, .* got 'file': remove it"):
        check_model_args({"file": "/etc/passwd"})
    model = create()
    with pytest.raises(ValueError, match="num_classes as an integer"):
        model.reset_classifier(10**7)
    check_model_args({"spec": FIELDS, "block": "MSBlock"})
    assert set(BLOCKS) == {"MSBlock", "SpikingBlock"} and set(ENCODERS) == {"gac", "direct"} and "fastavg" in POOLS


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_is_kept(pool: str) -> None:
    model = create(global_pool=pool, num_classes=3 if pool else 0)
    assert model.model_args()["global_pool"] == pool
    assert_rebuilt(model, {"num_classes"} | ({"global_pool"} if pool != "avg" else set()))
