"""The model card: a header that the Hub reads, measured figures only, code that runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import ModelCard

from gac_kernels import CIFAR
from timm_gac import quantize
from timm_gac.hub import save_model_folder
from timm_gac.hub.card import write_card
from timm_gac.hub.facts import Facts, check_energy, gather, read_public

FACTS = Facts(
    architecture="gac_msresnet18_cifar",
    num_classes=100,
    num_steps=4,
    parameters=12_679_362,
    gated=True,
    membrane_shortcut=True,
    spec=CIFAR,
    preprocessing={"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
)
ENERGY = {
    "model": "gac_msresnet18_cifar",
    "num_steps": 4,
    "weights": "of gac",
    "images": 256,
    "energy_mj": {"paper": 0.1234, "strict": 0.5, "ann": 1.5},
    "of_ann": {"paper": 0.0823, "strict": 1 / 3, "ann": 1.0},
    "macs": {"paper": 12.4, "strict": 2_000_000.0, "ann": 3e6},
    "acs": {"paper": 7.0, "strict": 8.0, "ann": 0.0},
    "layers": [{"layer": "conv1"}],
}
MEASURED = Facts(
    **{field: getattr(FACTS, field) for field in FACTS.__dataclass_fields__}
    | {
        "training": {
            "data": "cifar100",
            "epochs": 200,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "flip": True,
            "compile": False,
            "mixup": 0.0,
            "seed": 0,
        },
        "evaluation": {
            "top1": 0.801,
            "top5": 0.95,
            "ece": 0.031,
            "top1_per_step": [0.7, 0.75, 0.79, 0.801],
            "firing_rates": {"encoder": 0.123, "lif": 0.05},
            "images": 10_000,
        },
        "energy": ENERGY,
        "files": {"metrics.csv": Path("metrics.csv"), "curve.png": Path("curve.png")},
    }
)


def test_header_is_what_the_hub_reads() -> None:
    data = ModelCard(write_card(MEASURED, "me/x")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert data.datasets == ["uoft-cs/cifar100"] and "spiking-neural-network" in data.tags
    assert data.model_name == "x"
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {"Top-1 accuracy": 80.1, "Top-5 accuracy": 95.0}
    assert {result.dataset_type for result in data.eval_results} == {"uoft-cs/cifar100"}


def test_measured_figures_are_in_it() -> None:
    text = write_card(MEASURED, "me/x")
    for shown in (
        "80.10%",
        "95.00%",
        "0.0310",
        "after 1 of 4 time steps | 70.00%",
        "| `encoder` | 12.30% |",
        "10,000",
        "| paper | 12 | 7 | 0.1234 mJ | 8.2% |",
        "| strict | 2,000,000 | 8 | 0.5 mJ | 33.3% |",
        "on 256 images",
        "| optimizer.lr | 0.1 |",
        "| flip | yes |",
        "| seed | 0 |",
        "(curve.png)",
        "(metrics.csv)",
        "threshold 1, decay 0.5",
        "12,679,362",
    ):
        assert shown in text, shown
    assert "conv1" not in text, "layers stay in energy.json"
    assert "compile" not in text and "mixup" not in text, "what is off stays in training.json"


@pytest.mark.parametrize(
    ("training", "evaluation", "name"),
    [
        ({"data": "other.npz", "dataset": "cifar10", "recipe_name": "cifar10"}, {"dataset": "cifar10"}, "other.npz"),
        ({"data": "torch/cifar10", "dataset": "cifar100", "recipe_name": "x"}, {"dataset": "cifar100"}, "CIFAR-10"),
        ({"data": "hfds/uoft-cs/cifar100"}, {}, "CIFAR-100"),
        ({"data": "hfds/me/pets"}, {}, "pets"),
        ({"data": "", "dataset": "imagenet", "recipe_name": "imagenet"}, {"dataset": "imagenet"}, None),
        ({}, {"data": {"source": "a.npz", "images": 9, "classes": 3, "content": "f00d"}}, "a.npz (9 images, 3 classes"),
        ({}, {"data": "digits"}, "scikit-learn digits"),
    ],
)
def test_the_data_set_is_that_of_the_data(training: dict[str, Any], evaluation: dict[str, Any], name: str) -> None:
    facts = replace(MEASURED, training=training, evaluation={"top1": 0.93} | evaluation)
    assert (facts.dataset or ("", None))[1] == name or (facts.dataset and facts.dataset[1].startswith(name))
    if name and name.endswith("npz"):
        assert "CIFAR" not in write_card(facts, "me/x")


def test_what_was_not_measured_is_left_out() -> None:
    text = write_card(FACTS, "me/x")
    data = ModelCard(text).data
    assert data.eval_results is None and data.datasets is None
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Use", "Model", "Limits", "Verification", "Source"]
    assert "None" not in text and "nan" not in text.lower().replace("finance", "")


IN_FORCE = dict(
    gate="half", gate_lr=0.1, gate_decay=0.5, neuron="plif", neuron_lr=0.2, loss="tet", tet_lambda=0.05, cutmix=1.0,
    mix_probability=0.5, teacher="ann", distill_weight=0.7, distill_temperature=2.0, num_steps=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "training", "left_out"),
    [
        ({}, {}, set()),
        (dict(gated=False), {}, {"gate", "gate_lr", "gate_decay"}),
        (dict(neuron="lif"), {}, {"neuron_lr"}),
        (dict(neuron="ternary"), {}, {"neuron_lr"}),
        ({}, dict(loss="mean"), {"tet_lambda"}),
        ({}, dict(cutmix=0.0), {"cutmix", "mix_probability"}),
        ({}, dict(cutmix=0.0, mixup=0.2), {"cutmix"}),
        ({}, dict(teacher=None), {"teacher", "distill_weight", "distill_temperature"}),
        ({}, dict(distill_weight=0.0), {"teacher", "distill_weight", "distill_temperature"}),
        (
            dict(spec=None, gated=False, neuron="lif"),
            dict(loss="mean"),
            {"gate", "gate_lr", "gate_decay", "neuron", "neuron_lr", "tet_lambda", "num_steps"},
        ),
    ],
)
def test_settings_that_did_nothing_are_left_out(
    facts: dict[str, Any], training: dict[str, Any], left_out: set[str]
) -> None:
    card = write_card(replace(FACTS, **{"neuron": "plif"} | facts, training=IN_FORCE | training), "org/gac")
    table = card.partition("| recipe | value |")[2]
    assert {name for name in IN_FORCE if f"| {name} |" not in table} == left_out


def test_tables_and_pictures_by_epoch_are_shown_where_a_run_has_them() -> None:
    names = ("firing_rates.csv", "firing_rates.png", "gate.csv", "gate.png")
    text = write_card(replace(MEASURED, files={name: Path(name) for name in names}), "me/x")
    training = text.partition("## Training")[2].partition("\n## ")[0]
    for name in names:
        assert training.count(f"]({name})") == 1, name
        assert ("![" in training.partition(f"]({name})")[0].rpartition("\n")[2]) == name.endswith(".png"), name
        assert name not in write_card(MEASURED, "me/x")


def test_every_snippet_registers_the_models() -> None:
    snippets = re.findall(r"```python\n(.+?)```", write_card(FACTS, "me/x"), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")
        assert "import timm_gac\n" in snippet


@pytest.mark.parametrize("value", [80.1, "0.8", None, True, float("nan")])
def test_an_accuracy_that_is_no_fraction_is_not_published(value: object) -> None:
    facts = Facts(
        **{field: getattr(MEASURED, field) for field in FACTS.__dataclass_fields__} | {"evaluation": {"top1": value}}
    )
    assert "top-1 accuracy" not in write_card(facts, "me/x") or value is True


def test_facts_of_a_folder(model_folder: Path) -> None:
    facts = gather(model_folder, model_folder)
    assert (facts.architecture, facts.num_classes, facts.num_steps) == ("test_gac_msresnet", 3, 2)
    assert facts.gated and facts.membrane_shortcut and facts.spec == CIFAR and facts.top1 is None and facts.files == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "msresnet18_cifar"}, "got 'msresnet18_cifar' with T=4"),
        ({"num_steps": 6}, "with T=6"),
        ({"weights": "random (seed 0), batch-norm statistics of these images"}, "and its trained weights, got"),
        ({"trained": False}, "and its trained weights, got"),
        ({"macs": {}}, "as `timm-gac energy --out` writes it"),
        ({"energy_mj": None}, "as `timm-gac energy --out` writes it"),
    ],
)
def test_energy_of_another_model_is_refused(change: dict[str, Any], message: str) -> None:
    check_energy(ENERGY, "gac_msresnet18_cifar", 4)  # an earlier version's: without the field `trained`
    check_energy(ENERGY | {"trained": True, "weights": "random in name only"}, "gac_msresnet18_cifar", 4)
    with pytest.raises(ValueError, match=message):
        check_energy(ENERGY | change, "gac_msresnet18_cifar", 4)


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/me/my data/cifar100.npz", "cifar100.npz"),
        ("data/cifar100.npz", "cifar100.npz"),
        ("~/sets/imagenet/", "imagenet"),
        ("C:\\Users\\me\\x.npz", "x.npz"),
        ("local-dir:/home/me/runs/gac/model", "local-dir:model"),
        ("of /home/me/runs/gac", "of gac"),
        ("torch/cifar100", "torch/cifar100"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("3.1 images/s, 1 / 2", "3.1 images/s, 1 / 2"),
        ("2.14.1+cu130", "2.14.1+cu130"),
        (["/a/b", {"c": "/d/e"}], ["b", {"c": "e"}]),
        (0.5, 0.5),
    ],
)
def test_paths_of_the_machine_are_not_published(value: Any, published: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"lr": 1, "data": value, "recipe": {"lr": 1, "data": value}}))
    assert read_public(tmp_path / "x.json") == {"lr": 1, "data": published}


def test_card_of_a_quantised_network(tmp_path: Path) -> None:
    float_net = timm.create_model("test_gac_msresnet", num_classes=3)
    save_model_folder(quantize(float_net), tmp_path / "int8")
    facts = gather(tmp_path / "int8", tmp_path / "int8")
    total = sum(parameter.numel() for parameter in float_net.parameters())
    assert 0.95 * total < facts.parameters < total and facts.membrane_shortcut  # batch norms are folded away
    card = write_card(facts, "org/name")
    assert 'load_model(fetch_model("org/name"))' in card and card.count("## Use") == 1
    assert "| quantisation | scheme int8-weights-per-channel-on-grid, clip mse |" in card


def test_parts_of_the_test_set_and_other_sizes_are_shown() -> None:
    part = {
        "set": "Imagenette", "size": 160, "images": 3925, "top1": 0.9, "top5": 0.99,
        "top1_per_step": [0.6, 0.7, 0.8, 0.9],
    }  # fmt: skip
    parts = [part, part | {"top1_among_present_classes": 0.95, "present_classes": 10}]
    evaluation = {**MEASURED.evaluation, "parts_note": "Sizes.", "parts": parts}
    card = write_card(replace(MEASURED, evaluation=evaluation), "me/x")
    row = "| Imagenette | 160 | 3,925 | 90.00% | 99.00% | 60.00% | 70.00% | 80.00% | 90.00% |"
    assert f"{row}  |\n{row} 95.00% of 10 |\n\nSizes.\n" in card


def test_weights_of_imagenet_say_its_terms() -> None:
    card = write_card(MEASURED, "me/x", "other")
    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", "imagenet-terms") and "image-net.org" in data.license_link
    assert "not commercial" in card and "not commercial" not in write_card(MEASURED, "me/x")
