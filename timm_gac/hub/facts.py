"""Facts about a model for its card: read from its model folder and run, never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gac_kernels import LIFSpec

from ..inference.integer import IntegerBlock, SpikeConv
from ..layers.encoder import GatedAttentionCoding
from ..models.blocks import MSBlock
from ..runtime.files import parse_json
from .config import CONFIG, license_of, read_config, short
from .dataset import DIGITS, dataset_name
from .folder import load_model

EVALUATIONS = ("eval.json", "demo.json")  # the trainer's evaluation, and the demonstration's result
ENERGY = "energy.json"  # of `timm-gac energy --out RUN`
LOG, RATES, GATE = "metrics.csv", "firing_rates.csv", "gate.csv"  # a row for each epoch
CURVE, RASTER, ENERGY_CHART = "curve.png", "spikes.png", "energy.png"
RATES_CHART, GATE_CHART = "firing_rates.png", "gate.png"
TABLES, PICTURES = (LOG, RATES, GATE), (CURVE, RASTER, ENERGY_CHART, RATES_CHART, GATE_CHART)
TRAINING = "training.json"  # the run's own config.json, whose name the model's takes in a repository
MAX_JSON_BYTES = 1 << 22
# Where a path of this machine begins, and the folders in it.
_ROOT = r"(?:~|\.{1,2}|[A-Za-z]:)?[\\/](?=[^\s\\/])"
_WHOLE_PATH = re.compile(rf"(local-dir:)?{_ROOT}.*")
_COMMANDS = ("timm-gac ", "python -m timm_gac")  # texts that may end with a file's name
_PATH_IN_TEXT = re.compile(rf"(?:^|(?<=[\s:=('\"])){_ROOT}(?:[^\s\\/]+[\\/])*")


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Attributes:
        architecture: Name of the registered model.
        num_classes: Number of classes.
        num_steps: Time steps T.
        parameters: Number of parameters, rounded ones too.
        gated: Whether its encoder is gated attention coding.
        membrane_shortcut: Whether its blocks have membrane shortcuts.
        spec: Its neuron; None of an ANN.
        preprocessing: Fields of pretrained_cfg that say how an image is prepared.
        license: ``license`` of the weights, ``license_name`` and ``license_link`` as far as its config names them.
        label_names: Names of the classes, empty if unknown.
        quantization: How the weights were rounded, empty where they were not.
        training: The run's configuration.
        evaluation: The evaluation's results.
        energy: The energy accounting's results.
        files: Extra files to publish, by their name in the repository.
        neuron: What of the neuron was learned, see ``neuron`` of `SpikingResNet`.
    """

    architecture: str
    num_classes: int
    num_steps: int
    parameters: int
    gated: bool
    membrane_shortcut: bool
    spec: LIFSpec | None
    preprocessing: Mapping[str, Any]
    license: Mapping[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    energy: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    neuron: str = "lif"

    @property
    def ann(self) -> bool:
        """Whether it is an ANN, without neurons that spike and time steps."""
        return self.spec is None

    @property
    def dataset(self) -> tuple[str, str] | None:
        """Id on the Hub ('' where there is none) and name of the data set, where the run says what its data was.

        A recipe's name of a data set is none: the recipe may have been given other data.
        """
        if "test_digits" in self.evaluation:
            return DIGITS
        for source in (self.evaluation, self.training):
            name = dataset_name(source.get("data"))
            if name is not None:
                return name
        return None if "recipe_name" in self.training else dataset_name(self.evaluation.get("dataset"))

    def accuracy(self, *names: str) -> float | None:
        """A measured accuracy as a fraction, under the first of these names that the evaluation has."""
        value = first(self.evaluation, *names)
        return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy as a fraction."""
        return self.accuracy("top1", "accuracy")

    @property
    def step_accuracies(self) -> list[float]:
        """Top-1 accuracy after 1 to T time steps."""
        values = first(self.evaluation, "top1_per_step", "step_top1", "per_step", "step_accuracy")
        values = list(values.values()) if isinstance(values, Mapping) else values
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            return []
        return [float(value) for value in values if 0 <= value <= 1]

    @property
    def firing_rates(self) -> dict[str, float]:
        """Spikes per neuron and time step, by layer."""
        rates = first(self.evaluation, "firing_rates", "firing_rate")
        if not isinstance(rates, Mapping):
            return {}
        return {
            str(name): float(rate) for name, rate in rates.items() if isinstance(rate, int | float) and 0 <= rate <= 1
        }


def first(source: Mapping[str, Any], *names: str) -> Any:
    """The first of these entries that is there."""
    return next((source[name] for name in names if name in source), None)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ValueError: The file is over 4 MiB or no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"over {MAX_JSON_BYTES:,} bytes")
        content = parse_json(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected {str(file)!r} as a JSON object, got {str(error)[:200]}: delete it or write it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected {str(file)!r} as a JSON object, got {type(content).__name__}: write it again")
    return content


def read_public(file: Path) -> dict[str, Any]:
    """A JSON object of a run as it may be published; empty where there is no such file.

    Paths of the machine shrink to their last part. The trainer's ``recipe``, which repeats other entries, is left out.

    Raises:
        ValueError: See `read_json`.
    """
    content = read_json(file)
    recipe = content.get("recipe")
    if isinstance(recipe, dict) and recipe.items() <= content.items():
        del content["recipe"]
    try:
        return {key: _without_folders(value) for key, value in content.items()}
    except RecursionError as error:
        raise ValueError(f"expected {str(file)!r} of less depth, got it nested too deeply: write it again") from error


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = _WHOLE_PATH.fullmatch(value)
    if whole or (value.endswith(".npz") and not value.startswith(_COMMANDS)):
        return ((whole and whole[1]) or "") + re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return _PATH_IN_TEXT.sub("", value)


def gather(folder: Path, run: Path) -> Facts:
    """The facts of a model folder and of the run around it.

    Args:
        folder: Model folder.
        run: Folder with what the run wrote; the model folder again where there is no run around it.

    Raises:
        ValueError: The folder is no model folder, a JSON file of the run is damaged, or its energy is that of another
            model.
    """
    config = read_config(folder)
    model: Any = load_model(folder)
    files = {
        name: run / name for name in (*EVALUATIONS, ENERGY, TRAINING, *TABLES, *PICTURES) if (run / name).is_file()
    }
    if run != folder and (run / CONFIG).is_file():
        files[TRAINING] = run / CONFIG
    training = read_public(files[TRAINING]) if TRAINING in files else {}
    evaluation = next((read_public(files[name]) for name in EVALUATIONS if name in files), {})
    energy = read_public(run / ENERGY)
    if energy:
        check_energy(energy, config["architecture"], model.num_steps)
    names = config.get("label_names") or first(training, "label_names", "class_names") or ()
    cfg = config.get("pretrained_cfg", {})
    shown = ("input_size", "crop_pct", "interpolation", "mean", "std")
    return Facts(
        architecture=config["architecture"],
        num_classes=config["num_classes"],
        num_steps=model.num_steps,
        parameters=sum(parameter.numel() for parameter in model.parameters())
        + sum(module.weight.numel() for module in model.modules() if isinstance(module, SpikeConv)),
        gated=isinstance(getattr(model, "encoder", None), GatedAttentionCoding),
        membrane_shortcut=any(
            isinstance(module, MSBlock) or (isinstance(module, IntegerBlock) and module.membrane_shortcut)
            for module in model.modules()
        ),
        spec=getattr(model, "spec", None),
        preprocessing={name: cfg[name] for name in shown if name in cfg},
        license=license_of(config),
        label_names=tuple(names) if isinstance(names, list | tuple) else (),
        quantization=config.get("quantization", {}),
        training=training,
        evaluation=evaluation,
        energy=energy,
        files=files,
        neuron=config.get("model_args", {}).get("neuron", "lif"),
    )


def check_energy(energy: Mapping[str, Any], architecture: str, num_steps: int) -> None:
    """Refuse an energy.json that was not measured on this model's trained weights.

    Raises:
        ValueError: It is of another network or T, of random weights, or was not written by `timm-gac energy`.
    """
    found = (energy.get("model"), energy.get("num_steps"))
    trained = energy.get("trained")
    if trained is None:  # not said: a file of an earlier version names random weights in words
        trained = not str(energy.get("weights", "")).startswith("random")
    if found != (architecture, num_steps) or not trained:
        raise ValueError(
            f"expected {ENERGY} of {architecture} with T={num_steps} and its trained weights, got {short(found[0])} "
            f"with T={short(found[1])} and weights {short(energy.get('weights'))}: measure it again with "
            "`timm-gac energy`"
        )
    tables: list[Any] = [energy.get(key) for key in ("energy_mj", "of_ann", "macs", "acs")]
    costs: Any = energy.get("costs", {})
    whole = all(isinstance(table, dict) and {"strict", "ann"} <= table.keys() == tables[0].keys() for table in tables)
    numbers = [value for table in tables if whole for value in table.values()]
    numbers += [energy.get("images"), *(costs.get(key, 0) for key in ("mac_pj", "ac_pj") if isinstance(costs, dict))]
    if not (whole and isinstance(costs, dict) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)):
        raise ValueError(f"expected {ENERGY} as `timm-gac energy --out` writes it, got another form: measure it again")
