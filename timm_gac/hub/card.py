"""The model card: README.md of a model repository, in the Hub's own form, with measured figures only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gac_kernels import LIFSpec

from ..layers.learned import NEURONS
from .dataset import DIGITS
from .facts import (
    CURVE,
    ENERGY,
    ENERGY_CHART,
    GATE,
    GATE_CHART,
    LOG,
    RASTER,
    RATES,
    RATES_CHART,
    TRAINING,
    Facts,
)
from .folder import WEIGHTS
from .remote import GOLDEN

# How the energy table names the conventions of timm_gac.energy.
CONVENTIONS = {"strict": "strict", "paper": "paper", "neurobench": "NeuroBench", "ann": "the same layers as an ANN"}
DEFAULT_LICENSE = "apache-2.0"
PAPER = "arXiv:2308.06582"
# What "other" stands for here: weights made of ImageNet's photographs.
OTHER_LICENSE: dict[str, Any] = {"license_name": "imagenet-terms", "license_link": "https://www.image-net.org/download"}
CITATION = """\
@inproceedings{qiu2024gac,
  title     = {Gated Attention Coding for Training High-performance and Efficient Spiking Neural Networks},
  author    = {Qiu, Xuerui and Zhu, Rui-Jie and Chou, Yuhong and Wang, Zhaorui and Deng, Liang-Jian and Li, Guoqi},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2024}
}"""


def write_card(facts: Facts, repo_id: str, license_id: str | None = None) -> str:
    """The card as text; sections about things that were not measured are left out.

    Args:
        facts: What is known of the model.
        repo_id: ``ORG/NAME`` that its snippets load.
        license_id: The Hub's identifier of the licence of the weights; that of the facts, else apache-2.0, where None.
    """
    name = repo_id.rpartition("/")[2]
    terms = {"license": DEFAULT_LICENSE, **facts.license} | ({"license": license_id} if license_id else {})
    facts = replace(facts, license=OTHER_LICENSE | terms if terms["license"] == "other" else terms)
    sections = [
        f"# {name}",
        _summary(facts),
        _usage(facts, repo_id),
        _model(facts),
        _results(facts),
        _firing_rates(facts),
        _energy(facts),
        _training(facts),
        _limits(facts),
        _verification(repo_id),
        _source(facts),
    ]
    header = card_data(facts, name).to_yaml()
    return f"---\n{header.strip()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def card_data(facts: Facts, name: str) -> ModelCardData:
    """The card's YAML header."""
    dataset, results = facts.dataset, []
    if dataset is not None:
        shared: dict[str, Any] = {
            "task_type": "image-classification",
            "dataset_type": dataset[0] or dataset[1],
            "dataset_name": dataset[1],
            "dataset_split": facts.evaluation.get("split", "test"),
        }
        accuracies = (("Top-1 accuracy", facts.top1), ("Top-5 accuracy", facts.accuracy("top5")))
        results = [
            EvalResult(metric_type="accuracy", metric_name=metric, metric_value=round(100 * value, 2), **shared)
            for metric, value in accuracies
            if value is not None
        ]
    tags = ["image-classification", "timm", "transformers"]
    tags += [] if facts.ann else ["spiking-neural-network", "neuromorphic"]
    terms: dict[str, Any] = dict(facts.license)
    return ModelCardData(
        **terms,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[*tags, "gated-attention-coding"] if facts.gated else tags,
        datasets=[dataset[0]] if dataset and dataset[0] else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _summary(facts: Facts) -> str:
    shortcut = "membrane shortcuts" if facts.membrane_shortcut else "plain spiking blocks"
    coding = "gated attention coding" if facts.gated else "direct coding"
    trained = f", trained on {facts.dataset[1]}" if facts.dataset else ""
    if facts.ann:
        return (
            f"An ordinary ResNet (`{facts.architecture}`, an ANN){trained}, of the shape of a spiking one and for "
            "comparison with it. It has ReLUs, and neither spikes nor time steps."
        )
    return (
        f"A spiking ResNet (`{facts.architecture}`) with {coding} and {shortcut}{trained}. It sees an image for "
        f"T = {facts.num_steps} time steps; its neurons send zeros and ones."
    )


def _usage(facts: Facts, repo_id: str) -> str:
    channels, height, width = facts.preprocessing.get("input_size", (3, 32, 32))
    if facts.quantization:
        return f"""\
## Use

The weights of the 3x3 convolutions are 8-bit integers with one scale per output channel. The integer network:

```python
import torch
from timm_gac.hub import fetch_model, load_model

model = load_model(fetch_model("{repo_id}"))
with torch.no_grad():
    logits = model(torch.randn(1, {channels}, {height}, {width}))  # (1, {facts.num_classes})
```

timm and transformers know no integer networks and refuse these weights."""
    per_step = f"(1, {facts.num_steps}, {facts.num_classes}): the logits of each time step"
    steps = "" if facts.ann else f"\n    steps = model.forward_steps(images)  # {per_step}"
    return f"""\
## Use

The models are registered by `import timm_gac`, without which neither library knows the architecture.

```python
import timm
import timm_gac
import torch

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
images = torch.randn(1, {channels}, {height}, {width})  # prepared by timm.data.create_transform
with torch.no_grad():
    logits = model(images)  # (1, {facts.num_classes}){steps}
```

Pin a revision with `hf-hub:{repo_id}@REVISION`. With transformers:

```python
import timm_gac
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{repo_id}")
```"""


def _table(heading: tuple[str, str], rows: Mapping[str, Any] | list[tuple[str, Any]]) -> str:
    pairs = list(rows.items()) if isinstance(rows, Mapping) else rows
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(key)} | {_cell(value)} |" for key, value in pairs)])


def _cell(value: Any) -> str:
    value = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return str(value).replace("|", "\\|").replace("\n", " ")


def _neuron(spec: LIFSpec, neuron: str) -> str:
    reset = "soft" if spec.soft_reset else "hard"
    detached = ", detached from the gradient" if spec.detach_reset else ""
    learnable = NEURONS.get(neuron)
    learned = f" at the start, both learned, one of each a {learnable}" if learnable else ""
    kind = "LIF" if spec.is_lif else f"`{spec.neuron}`"
    return (
        f"{kind}, threshold {spec.threshold:g}, decay {spec.decay:g}{learned}, {reset} reset{detached}; "
        f"surrogate gradient: {spec.surrogate}, width {spec.width:g}"
    )


def _model(facts: Facts) -> str:
    rows = [
        ("architecture", f"`{facts.architecture}`"),
        ("parameters", f"{facts.parameters:,}"),
        ("classes", facts.num_classes),
    ]
    if facts.spec is not None:
        rows[2:2] = [("time steps T", facts.num_steps), ("neuron", _neuron(facts.spec, facts.neuron))]
    if facts.quantization:
        rows.append(("quantisation", ", ".join(f"{key} {value}" for key, value in facts.quantization.items())))
    shown = {"input_size": "input (C, H, W)", "crop_pct": "crop", "interpolation": "interpolation"}
    rows += [(shown[key], value) for key, value in facts.preprocessing.items() if key in shown]
    rows += [(key, value) for key, value in facts.preprocessing.items() if key in ("mean", "std")]
    return "## Model\n\n" + _table(("", "value"), rows)


def _results(facts: Facts) -> str:
    rows = [
        (f"{metric} accuracy", f"{value:.2%}")
        for metric, value in (("top-1", facts.top1), ("top-5", facts.accuracy("top5")))
        if value is not None
    ]
    error = facts.accuracy("ece", "calibration_error")
    if error is not None:
        rows.append(("expected calibration error", f"{error:.4f}"))
    images = next((facts.evaluation[key] for key in ("images", "test_digits") if key in facts.evaluation), None)
    if rows and type(images) is int:
        rows.append(("images", f"{images:,}"))
    stored = facts.evaluation.get("stored_dtype")
    if rows and isinstance(stored, str):
        rows.append(("weights stored as", stored))
    for label, entry in (("evaluated in", "eval_dtype"), ("evaluated as", "weights")):
        value = facts.evaluation.get(entry)
        if rows and isinstance(value, str) and value != "stored file":
            rows.append((label, value))
    rows += [
        (f"top-1 accuracy after {step} of {facts.num_steps} time steps", f"{value:.2%}")
        for step, value in enumerate(() if facts.ann else facts.step_accuracies, start=1)
    ]
    if not rows:
        return ""
    split = facts.evaluation.get("split", "test")
    where = f" on the {split} set of {facts.dataset[1]}" if facts.dataset and facts.dataset != DIGITS else ""
    where = where or (" on held-out digits of scikit-learn" if facts.dataset == DIGITS else "")
    results = f"## Results\n\nMeasured{where} with these weights, one run.\n\n" + _table(("", "value"), rows)
    return "\n\n".join(part for part in (results, _parts(facts)) if part)


def _parts(facts: Facts) -> str:
    """Further measurements: of parts of the test set, and at other sizes."""
    parts = facts.evaluation.get("parts")
    if not isinstance(parts, list) or not parts:
        return ""
    steps = range(1, facts.num_steps + 1)
    lines = [
        "| set | pixels | images | top-1 | top-5 | "
        + " | ".join(f"step {step}" for step in steps)
        + " | own classes |",
        "|---|---|---|---|---|" + "---|" * facts.num_steps + "---|",
    ]
    try:
        for part in parts:
            own = part.get("top1_among_present_classes")
            cells = [part["set"], part["size"], f"{part['images']:,}", f"{part['top1']:.2%}", f"{part['top5']:.2%}"]
            cells += [f"{value:.2%}" for value in part["top1_per_step"]]
            cells.append("" if own is None else f"{own:.2%} of {part['present_classes']}")
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected parts of eval.json with set, size, images and accuracies, got {error!r}") from error
    note = facts.evaluation.get("parts_note", "")
    return "\n".join(lines) + (f"\n\n{note}" if note else "")


def _firing_rates(facts: Facts) -> str:
    if not facts.firing_rates:
        return ""
    rows = {f"`{layer}`": f"{rate:.2%}" for layer, rate in facts.firing_rates.items()}
    encoder = "; of the gated encoder, the share of its values above 0" if facts.gated else ""
    picture = f"\n\n![Spikes of some neurons of each layer]({RASTER})" if RASTER in facts.files else ""
    return (
        f"## Firing rates\n\nSpikes per neuron and time step{encoder}.\n\n" + _table(("layer", "rate"), rows) + picture
    )


def _energy(facts: Facts) -> str:
    energy = facts.energy
    if not energy:
        return ""
    costs = energy.get("costs", {})
    rows = [
        f"| {title} | {energy['macs'][name]:,.0f} | {energy['acs'][name]:,.0f} | {energy['energy_mj'][name]:.4g} mJ "
        f"| {energy['of_ann'][name]:.1%} |"
        for name, title in CONVENTIONS.items()
        if name in energy["energy_mj"]
    ]
    lines = ["| counted as | MACs | ACs | energy per image | of the ANN's |", "|---|---|---|---|---|", *rows]
    picture = f"\n\n![Energy by kind of layer, and firing rates]({ENERGY_CHART})" if ENERGY_CHART in facts.files else ""
    return (
        f"## Energy\n\nEstimated from the operations counted on {energy['images']:,} images, at "
        f"{costs.get('mac_pj', 4.6):.2g} pJ a multiply-accumulate (MAC) and {costs.get('ac_pj', 0.9):.2g} pJ an "
        f"accumulate (AC) ({costs.get('name', '45nm-float32')}; memory traffic, norms and neurons left out); not "
        "measured on a chip. *Strict*: a MAC wherever a layer's input is real-valued. *Paper*: as the paper counts, "
        "shortcuts as accumulates and the encoder's attention not at all. *NeuroBench*: what is zero costs nothing. "
        f"By layer and time step: [{ENERGY}]({ENERGY}).\n\n" + "\n".join(lines) + picture
    )


def _recipe(tree: Mapping[str, Any], prefix: str = "", depth: int = 2) -> list[tuple[str, str]]:
    """The recipe's fields that are in force, with dotted names where they are nested; 0 and off are left out."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and depth > 1:
            rows += _recipe(value, f"{name}.", depth - 1)
        elif value is True:
            rows.append((name, "yes"))
        elif isinstance(value, int | float) and (value or key == "seed"):
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
        elif isinstance(value, str) and 0 < len(value) <= 80:
            rows.append((name, value))
    return rows


def _of_no_effect(facts: Facts) -> set[str]:
    """Entries of a run's configuration that its table leaves out: they did nothing, or a sentence says them."""
    run, names = facts.training, {"distilled_from"}
    if facts.ann:
        names |= {"num_steps", "neuron"}
    if not facts.gated:
        names |= {"gate", "gate_lr", "gate_decay"}
    if not NEURONS.get(facts.neuron):
        names |= {"neuron_lr"}
    if run.get("loss") != "tet":
        names |= {"tet_lambda"}
    if not run.get("mixup") and not run.get("cutmix"):
        names |= {"mix_probability"}
    if not run.get("teacher") or not run.get("distill_weight"):
        names |= {"teacher", "distill_weight", "distill_temperature"}
    return names


def _training(facts: Facts) -> str:
    parts = []
    lesson = facts.training.get("distilled_from")
    if isinstance(lesson, Mapping):
        parts.append(_lesson(lesson))
    of_no_effect = _of_no_effect(facts)
    rows = _recipe({key: value for key, value in facts.training.items() if key not in of_no_effect})
    if rows:
        table = _table(("recipe", "value"), rows)
        kept = (
            f"\n\nWhat is 0 or off is left out here; [{TRAINING}]({TRAINING}) has all."
            if TRAINING in facts.files
            else ""
        )
        parts.append(table + kept)
    if LOG in facts.files:
        parts.append(f"The log of each epoch is in [{LOG}]({LOG}).")
    if CURVE in facts.files:
        parts.append(f"![Loss and accuracy by epoch]({CURVE})")
    for table, kept, chart, shown in (
        (RATES, "The firing rates", RATES_CHART, "Firing rate of each layer by epoch"),
        (GATE, "What the gate did on some images", GATE_CHART, "Gate and scores by epoch"),
    ):
        if table in facts.files:
            parts.append(f"{kept} at each evaluation: [{table}]({table}).")
        if chart in facts.files:
            parts.append(f"![{shown}]({chart})")
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _lesson(lesson: Mapping[str, Any]) -> str:
    """From which network a model was distilled, and how."""
    steps = f", T = {lesson['num_steps']}" if "num_steps" in lesson else ", an ANN"
    return (
        f"It was distilled (Hinton et al., arXiv:1503.02531) from `{_cell(lesson.get('name'))}` "
        f"(`{_cell(lesson.get('architecture'))}`{steps}): {_cell(lesson.get('weight'))} of its loss is the divergence "
        f"from that teacher's probabilities at temperature {_cell(lesson.get('temperature'))}. So its accuracy is not "
        "that of training on labels alone."
    )


def _limits(facts: Facts) -> str:
    _, height, width = facts.preprocessing.get("input_size", (3, 32, 32))
    steps = f"- It was trained for T = {facts.num_steps}."
    if facts.gated:
        steps += " Another number of time steps loads, with resampled temporal attention, and needs fine-tuning."
    lines = [
        f"- It sorts images of {height}x{width} pixels into {facts.num_classes} classes and always names one of them, "
        "whatever the image shows.",
    ]
    if not facts.ann:
        lines += [
            steps,
            "- A GPU rounds differently from a CPU; a membrane near its threshold may then spike on one of them only, "
            "so single logits can differ.",
        ]
    lines += [
        "- It has not been examined for bias or robustness to other data: do not use it for decisions about people.",
    ]
    if facts.license.get("license") == "other":
        lines.append(_terms(facts.license))
    return "## Limits\n\n" + "\n".join(lines)


def _terms(named: Mapping[str, str]) -> str:
    if named["license_link"] != OTHER_LICENSE["license_link"]:
        return f"- The weights have a licence of their own: [{named['license_name']}]({named['license_link']})."
    return (
        "- It was trained on photographs of ImageNet, whose terms allow research and teaching that is not "
        f"commercial: see {OTHER_LICENSE['license_link']}. The weights come under the same terms; the code is "
        "Apache-2.0."
    )


def _source(facts: Facts) -> str:
    if facts.ann:
        return (
            "## Source\n\nIts architecture is that of He et al., CVPR 2016 (arXiv:1512.03385), as timm has it, in the "
            f"sizes of spiking networks after Qiu et al., AAAI 2024 ({PAPER})."
        )
    return f"## Source\n\nThe method is that of Qiu et al., AAAI 2024 ({PAPER}).\n\n```bibtex\n{CITATION}\n```"


def _verification(repo_id: str) -> str:
    return (
        f"## Verification\n\n`timm-gac verify {repo_id}` downloads the repository, rebuilds the network and compares "
        f"its logits with those in `{GOLDEN}`, and `{WEIGHTS}` with the checksum kept there."
    )
