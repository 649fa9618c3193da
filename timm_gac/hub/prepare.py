"""Preparing a model repository from a run or a model folder: only the files that are published."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from ..data.labels import known_label_names
from ..runtime.files import check_new_folder, scratch_folder, write_json, write_text
from .card import DEFAULT_LICENSE, write_card
from .config import CONFIG, LICENSE_KEYS, check_labels, read_config, short, write_config
from .facts import EVALUATIONS, Facts, gather, read_public
from .folder import WEIGHTS, refuse_run_folder
from .golden import write_golden
from .remote import CARD, model_folder

MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class PublishConfig:
    """What `push` publishes, and where.

    Args:
        repo_id: Repository on the Hub, ORG/NAME.
        private: Make a new repository private.
        dry_run: Write the folder and show its files; nothing is sent.
        out: Folder to keep what is published in; push/NAME in a dry run where left out.
        overwrite: Replace files that are there already, on the Hub and in the folder.
        label_names: Names of the classes: cifar10, cifar100, or a text file with the name of one class a line, in
            order. Where left out: those of the run, or of the data set it names, if known.
        dataset: Name of the training data, such as cifar100, where the run does not say it.
        license: Licence of the weights, as the Hub spells it. Where left out: that of the model's config, else
            apache-2.0.
    """

    repo_id: str
    private: bool = False
    dry_run: bool = False
    out: Path | None = None
    overwrite: bool = False
    label_names: str | None = None
    dataset: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
            valid = self.repo_id.count("/") == 1
        except ValueError:  # HFValidationError
            valid = False
        if not valid:
            raise ValueError(f"expected repo_id as ORG/NAME, got {self.repo_id!r}: such as your-name/gac-digits")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", self.license):
            raise ValueError(
                f"expected license as the Hub spells it, got {short(self.license)}: in lower case and without spaces, "
                "such as mit, apache-2.0 or other"
            )
        if self.dataset is not None and not (self.dataset.isprintable() and self.dataset.strip()):
            raise ValueError(f"expected dataset as one printable line, got {short(self.dataset)}: such as cifar100")


def prepare_folder(source: Path, out: Path, config: PublishConfig) -> list[Path]:
    """Write the repository of a model: config, weights, golden tensors, card and what the run measured.

    Only these files are taken: config.json and model.safetensors; of a run also its configuration (as training.json),
    eval.json, energy.json, metrics.csv, firing_rates.csv, gate.csv, and the pictures curve.png, energy.png, spikes.png,
    firing_rates.png and gate.png. Nothing else of the source is published, and no path of this machine.

    Args:
        source: Run folder of the trainer (with ``model/`` in it), or a model folder.
        out: Folder to write; new or empty, unless ``config.overwrite``. It is replaced file by file at the end, so a
            failure leaves it as it was.
        config: What to publish.

    Returns:
        The files written, in the order of their names.

    Raises:
        ValueError: The source is no model folder, its files are damaged, ``out`` is not empty or is a run folder, or
            the labels do not fit.
    """
    folder = model_folder(source)  # first: `out` may be a folder that the user has not named
    check_new_folder(out, config.overwrite, "choose another --out or --overwrite")
    refuse_run_folder(out, "what is published", "--out")
    facts = _complete(gather(folder, source), config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out) as stage:
        labels = {"label_names": list(facts.label_names)} if facts.label_names else {}
        write_config(stage / CONFIG, _with_license(read_config(folder), facts.license) | labels)
        shutil.copyfile(folder / WEIGHTS, stage / WEIGHTS)
        for name, file in facts.files.items():
            if file.suffix == ".json":
                said = {"data": config.dataset} if config.dataset and name in EVALUATIONS else {}
                write_json(stage / name, read_public(file) | said)
            else:
                shutil.copyfile(file, stage / name)
        read_config(stage)  # a folder that no loader takes is not to be published
        write_golden(folder, stage)
        write_text(stage / CARD, write_card(facts, config.repo_id))
        out.mkdir(exist_ok=True)
        names = sorted(file.name for file in stage.iterdir())
        for name in names:
            (stage / name).replace(out / name)
    return [out / name for name in names]


def _complete(facts: Facts, config: PublishConfig) -> Facts:
    """The facts, completed by what the user says and by class names of known data sets."""
    if config.dataset is not None:
        facts = replace(facts, evaluation={**facts.evaluation, "data": config.dataset})
    if config.license is not None:
        named = dict(facts.license) if config.license == "other" else {}
        facts = replace(facts, license=named | {"license": config.license})
    labels = facts.label_names
    if config.label_names is not None:
        labels = known_label_names(config.label_names) or read_labels(Path(config.label_names))
    elif not labels and facts.dataset is not None:
        known = known_label_names(facts.dataset[1])
        labels = known if len(known) == facts.num_classes else ()
    if labels:
        check_labels(labels, facts.num_classes)
    return replace(facts, label_names=tuple(labels))


def _with_license(config: dict[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in LICENSE_KEYS}
    license_id = named.get("license", DEFAULT_LICENSE)
    cfg = config.get("pretrained_cfg", {}) | {"license": license_id}
    return config | {"pretrained_cfg": cfg} | {key: named[key] for key in LICENSE_KEYS if key in named}


def read_labels(file: Path) -> tuple[str, ...]:
    """The names of the classes in a text file, one a line.

    Raises:
        ValueError: There is no such file, or it is no UTF-8 text of at most 1 MiB, or has no names.
    """
    if not file.is_file():
        raise ValueError(
            f"expected label names as cifar10, cifar100 or a text file, got {str(file)!r}, which is none: check it"
        )
    content = file.read_bytes()
    try:
        if len(content) > MAX_LABEL_BYTES:
            raise ValueError(f"{len(content):,} bytes")
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"expected label names as a short UTF-8 text, got {file.name!r} ({error})") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise ValueError(f"expected the name of one class a line, got {file.name!r} without any: write them, in order")
    return names
