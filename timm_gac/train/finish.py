"""The end of a run: the model folder, its own evaluation, and the row of results."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch

from ..evaluate import Evaluation, evaluate, evaluate_state
from ..hub.folder import CONFIG, load_model, save_model_folder, write_config
from ..runtime.dtypes import AUTOCAST, DTYPES
from ..runtime.files import append_csv, write_json
from ..runtime.provenance import PROVENANCE
from .runlog import RESULT_COLUMNS, environment

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = ["finish"]


def finish(trainer: Trainer) -> None:
    """Store the last epoch's weights, evaluate the stored file, write eval.json and the row of results."""
    folder = trainer.options.out / "model"
    trained = trainer.evaluation or trainer.test()
    if trainer.main:
        _store(trainer)
    trainer.accelerator.wait_for_everyone()
    stored = load_model(folder).to(trainer.device)
    if trainer.recipe.channels_last:
        stored = stored.to(memory_format=torch.channels_last)
    result = evaluate(stored, trainer.loaders.test.batches(0), amp_dtype=AUTOCAST[trainer.recipe.precision])
    if trainer.main:
        _report(trainer, trained, result)


def _store(trainer: Trainer) -> None:
    folder, recipe = trainer.options.out / "model", trainer.recipe
    state = trainer.average.state if trainer.average is not None and recipe.report == "ema" else None
    with evaluate_state(trainer.network, state):
        network: Any = copy.deepcopy(trainer.network)
    if hasattr(network, "_original_forward"):  # what accelerate put around it belongs to the run
        network.forward = network._original_forward
    network = network.to("cpu", DTYPES[recipe.stored_dtype], memory_format=torch.contiguous_format)
    save_model_folder(network, folder)
    if trainer.loaders.label_names:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        write_config(folder / CONFIG, config | {"label_names": list(trainer.loaders.label_names)})


def _report(trainer: Trainer, trained: Evaluation, stored: Evaluation) -> None:
    recipe, where = trainer.recipe, environment(trainer.device, trainer.recipe.precision)
    write_json(
        trainer.options.out / "eval.json",
        stored.to_dict()
        | {
            "dataset": recipe.dataset, "split": "test", "precision": recipe.precision, "weights": "stored file",
            "stored_dtype": recipe.stored_dtype, "top1_before_storing": trained.top1, "epoch": recipe.epochs,
            "reported": recipe.report, **where,
        },
    )  # fmt: skip
    speeds = sorted(float(row["images_per_s"]) for row in trainer.rows)
    row: dict[str, Any] = {
        "model": recipe.model, "dataset": recipe.dataset, "recipe": trainer.options.recipe_name,
        "top1": f"{stored.top1:.4f}", "top5": f"{stored.top5:.4f}", "epochs": recipe.epochs,
        "minutes": f"{trainer.minutes:.2f}", "images_per_s": f"{speeds[len(speeds) // 2]:.0f}" if speeds else "",
        "num_steps": recipe.num_steps, "batch_size": recipe.batch_size * trainer.accelerator.num_processes,
        "precision": recipe.precision, "reported": recipe.report, "seed": recipe.seed,
    }  # fmt: skip
    row |= {name: where[name] for name in (*PROVENANCE, "timm", "accelerate")}
    append_csv(trainer.options.out / "result.csv", RESULT_COLUMNS, [row])
    if trainer.options.results is not None:
        append_csv(trainer.options.results, RESULT_COLUMNS, [row])
    steps = ", ".join(f"{accuracy:.2%}" for accuracy in stored.top1_per_step)
    trainer.progress.say(
        f"done in {trainer.minutes:.1f} minutes: top-1 {stored.top1:.2%} of {stored.images:,} test images (after 1 to "
        f"{recipe.num_steps} steps: {steps}), firing rate {stored.firing_rate:.3f}; model in "
        f"{trainer.options.out / 'model'}"
    )
