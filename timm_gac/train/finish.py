"""End of a run: the model folder, its evaluation, and the row of results."""

from __future__ import annotations

import copy
import csv
import errno
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..analysis.evaluate import Evaluation, evaluate, evaluate_state
from ..hub.config import CONFIG, write_config
from ..hub.folder import load_model, save_model_folder
from ..inference.quantize import quantize
from ..layers.convolution import SpikeConv2d
from ..runtime.dtypes import DTYPES
from ..runtime.files import append_csv, write_csv, write_json
from ..runtime.finite import names_not_finite
from ..runtime.provenance import PROVENANCE
from .recipes import Recipe
from .run import Run
from .runlog import RESULT_COLUMNS, environment

# Of the stored model. Between bfloat16 and float32 5 to 6 % of a network's answers differ, and its top-1 by up to 0.4
# points; so all rows of results have one format, the one that every machine has.
_EVAL_DTYPE = "float32"


def finish(run: Run, say: Callable[[str], None]) -> None:
    """Store the last epoch's weights, evaluate the stored model, write eval.json and the row of results.

    The stored model is evaluated in float32, whatever the training's precision, as ``timm-gac eval --no-fold`` does: so
    the run's figure is the one that users of its folder get. One trained in 8 bits is evaluated as `quantize` gives it,
    with the integers that were stored.

    Args:
        run: A run that has done its last step; every process takes part.
        say: Function that shows a line to the user.
    """
    folder = run.options.out / "model"
    trained = run.evaluation or run.test()
    if run.main:
        _store(run)
    run.accelerator.wait_for_everyone()
    stored = load_model(folder).to(run.device)
    if run.recipe.channels_last:
        stored = stored.to(memory_format=torch.channels_last)
    deployed = _in_integers(stored, run.main, say) if run.recipe.int8_convs else stored
    result = evaluate(deployed, run.loaders.test.batches(0))
    if run.main:
        weights = "stored file" if deployed is stored else "int8 network of the stored file"
        _report(run=run, trained=trained, stored=result, weights=weights, say=say)


def _in_integers(stored: Any, main: bool, say: Callable[[str], None]) -> Any:
    """The int8 network that `quantize` makes of a stored one; the stored one, and a line why, where it makes none.

    Both have the same weights, but other roundings of the sums behind a convolution flip spikes: of two networks of
    165 epochs on CIFAR-100 0.2 and 0.4 % of the answers differ, in float32. What is reported is what is deployed.
    """
    try:
        return quantize(stored)
    except ValueError as error:
        if main:
            say(f"evaluated as it was trained, not as an int8 network: {error}")
        return stored


def _store(run: Run) -> None:
    folder = run.options.out / "model"
    with evaluate_state(run.network, run.reported_state()):
        network: Any = copy.deepcopy(run.network)
    if hasattr(network, "_original_forward"):  # without accelerate's autocast around it
        network.forward = network._original_forward
    convs = [module for module in network.modules() if isinstance(module, SpikeConv2d) and module.int8]
    exact = [conv.weight.detach().to("cpu", copy=True).contiguous() for conv in convs]
    network = network.to("cpu", DTYPES[run.recipe.stored_dtype], memory_format=torch.contiguous_format)
    for conv, weight in zip(convs, exact, strict=True):
        conv.weight.data = weight  # which becomes integers: float16 would change some
    names = names_not_finite(network.state_dict().items())
    if names:  # finite in float32: `Run.read` has seen to that
        raise ValueError(
            f"expected weights within the range of {run.recipe.stored_dtype}, got larger ones in {names[0]}: go on "
            "with --resume --stored-dtype float32"
        )
    save_model_folder(network, folder)
    if run.loaders.label_names:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        write_config(folder / CONFIG, config | {"label_names": list(run.loaders.label_names)})


def _report(run: Run, trained: Evaluation, stored: Evaluation, weights: str, say: Callable[[str], None]) -> None:
    recipe, out = run.recipe, run.options.out
    where = environment(run.device, recipe.precision)
    about = {
        "dataset": recipe.dataset,
        "data": {"source": _source(recipe)} | run.data[recipe.eval_split],
        "split": recipe.eval_split,
        "precision": recipe.precision,
        "eval_dtype": _EVAL_DTYPE,
        "weights": weights,
        "stored_dtype": recipe.stored_dtype,
        "top1_before_storing": trained.top1,
        "epoch": recipe.epochs,
        "reported": recipe.report,
        **run.lesson(),
    }
    write_json(out / "eval.json", stored.to_dict() | about | where)
    row = _result_row(run, stored) | {name: where[name] for name in (*PROVENANCE, "timm", "accelerate")}
    # The table first: a run that is killed in between and resumed has its row twice there, and loses none.
    if (table := run.options.results) is not None and not _is_in(table, out / "result.csv", row):
        try:
            append_csv(table, RESULT_COLUMNS, [row])
        except (OSError, ValueError) as error:
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"cannot add the run's row to {table} ({error}): mend that, or give another --results, and go on with "
                "--resume",
            ) from error
    write_csv(out / "result.csv", RESULT_COLUMNS, [row])
    notes = []
    if stored.firing_rates:  # an ANN has none, nor steps
        accuracies = ", ".join(f"{accuracy:.2%}" for accuracy in stored.top1_per_step)
        notes.append(f"after 1 to {recipe.num_steps} steps: {accuracies}")
    own = "" if recipe.precision == _EVAL_DTYPE else f"in {recipe.precision}, "
    if weights != "stored file":
        notes.append(f"{trained.top1:.2%} in training's own arithmetic")
    elif trained.top1 != stored.top1:
        notes.append(f"{trained.top1:.2%} {own}before its weights were stored in {recipe.stored_dtype}")
    said = f" ({'; '.join(notes)})" if notes else ""
    said += f", firing rate {stored.firing_rate:.3f}" if stored.firing_rates else ""
    say(
        f"done in {run.minutes:.1f} minutes: top-1 {stored.top1:.2%} of {stored.images:,} {recipe.eval_split} images "
        f"in {_EVAL_DTYPE}{said}; model in {out / 'model'}"
    )


def _is_in(table: Path, own: Path, row: dict[str, Any]) -> bool:
    """Whether a run that was done before, by its own file, has its row in the table, and the same accuracy again."""
    if not (table.exists() and own.exists()):
        return False
    before, rows = ([*csv.DictReader(file.read_text(encoding="utf-8").splitlines())] for file in (own, table))
    return any(old in rows and old["top1"] == row["top1"] and old["top5"] == row["top5"] for old in before)


def _source(recipe: Recipe) -> str:
    """What the data is called in a model card: a folder by its own name."""
    in_folder = recipe.data in ("", "folder", "image_folder") and recipe.data_dir
    return Path(recipe.data_dir or "").resolve().name if in_folder else recipe.data


def _result_row(run: Run, stored: Evaluation) -> dict[str, Any]:
    recipe, lesson, speeds = run.recipe, run.lesson(), [float(row["images_per_s"]) for row in run.rows]
    return {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "recipe": run.options.recipe_name + (f", distilled from {lesson['distilled_from']['name']}" if lesson else ""),
        "top1": f"{stored.top1:.4f}",
        "top5": f"{stored.top5:.4f}",
        "epochs": recipe.epochs,
        "minutes": f"{run.minutes:.2f}",
        "images_per_s": f"{statistics.median_high(speeds):.0f}" if speeds else "",
        "num_steps": recipe.num_steps,
        "batch_size": recipe.batch_size * run.accelerator.num_processes,
        "precision": recipe.precision + ", int8 convolutions" * recipe.int8_convs,
        "reported": recipe.report,
        "seed": recipe.seed,
        "eval_dtype": _EVAL_DTYPE,
        "split": recipe.eval_split,
        "command": run.options.command,
    }
