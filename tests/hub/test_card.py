"""The model card: a header that the Hub reads, measured figures only, code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gac_kernels import CIFAR
from timm_gac.hub.card import write_card
from timm_gac.hub.facts import Facts, gather

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
MEASURED = Facts(
    **{field: getattr(FACTS, field) for field in FACTS.__dataclass_fields__}
    | {
        "training": {"data": "cifar100", "epochs": 200, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluation": {
            "top1": 0.801, "top5": 0.95, "ece": 0.031, "top1_per_step": [0.7, 0.75, 0.79, 0.801],
            "firing_rates": {"encoder": 0.123, "lif": 0.05}, "images": 10_000,
        },
        "energy": {"snn_mj": 0.1234, "ann_mj": 1.5, "layers": {"conv1": 3}},
        "files": {"metrics.csv": Path("metrics.csv"), "curve.png": Path("curve.png")},
    }
)  # fmt: skip


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
        "80.10%", "95.00%", "0.0310", "after 1 of 4 time steps | 70.00%", "| `encoder` | 12.30% |", "10,000",
        "| snn_mj | 0.1234 |", "| optimizer.lr | 0.1 |", "(curve.png)", "(metrics.csv)", "threshold 1, decay 0.5",
        "12,679,362",
    ):  # fmt: skip
        assert shown in text, shown
    assert "conv1" not in text, "layers stay in energy.json"


def test_what_was_not_measured_is_left_out() -> None:
    text = write_card(FACTS, "me/x")
    data = ModelCard(text).data
    assert data.eval_results is None and data.datasets is None
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Use", "Model", "Limits", "Verification", "Source"]
    assert "None" not in text and "nan" not in text.lower().replace("finance", "")


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
