"""The trainer on the CPU: a run leaves what is promised, learns, takes its options and refuses what it should."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_gac.analysis.evaluate import Evaluation
from timm_gac.cli.main import main
from timm_gac.models.training_options import TrainingOptions
from timm_gac.runtime.figures import new_figure
from timm_gac.train import RECIPES, Recipe, finish, runlog
from timm_gac.train.loop import Trainer, train
from timm_gac.train.optim import MovingAverage, create_optimizer, freeze_stages, learning_rate
from timm_gac.train.options import parse
from timm_gac.train.step import tet_loss
from toy_runs import options, weights


@pytest.fixture
def recipe(full_recipe: Recipe) -> Recipe:
    return full_recipe


def test_a_run_leaves_what_is_promised(recipe: Recipe, tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    assert train(recipe, options(tmp_path / "run", results=results, recipe_name="toy")) == 0
    run = tmp_path / "run"
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16]
    assert [bool(row["test_top1"]) for row in rows] == [False, True, False, True]
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"
    rates = list(csv.DictReader((run / "firing_rates.csv").open()))
    assert [row["epoch"] for row in rates] == ["2", "4"] and 0 < float(rates[0]["encoder"]) < 1
    assert json.loads((run / "config.json").read_text())["recipe"]["epochs"] == 4
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["images"] == 17 and len(evaluation["top1_per_step"]) == 2
    assert evaluation["top1"] == evaluation["top1_per_step"][-1]
    assert set(evaluation["firing_rates"]) >= {"encoder", "layer1.0.bn1"}
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    stored, average = load_file(run / "model" / "model.safetensors"), weights(run)
    assert all(torch.equal(value, average[f"ema.{name}"].to(value.dtype)) for name, value in stored.items())
    assert model.num_classes == 4 and stored["conv1.weight"].dtype == torch.bfloat16
    (row,) = csv.DictReader(results.open())
    assert float(row["top1"]) == pytest.approx(evaluation["top1"], abs=1e-4) and row["recipe"] == "toy"
    assert not list(run.rglob("*.p[kt]*"))  # no pickle
    with pytest.raises(ValueError, match="give --resume"):
        train(recipe, options(run))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        (dict(cutmix=1.0, label_smoothing=0.1), "Loss, targets mixed and smoothed"),
        (dict(mixup=0.2), "Loss, targets mixed"),
        (dict(label_smoothing=0.1), "Loss, targets smoothed"),
        (dict(), "Loss"),
    ],
)
def test_the_curve_says_what_the_targets_were(
    changes: dict, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(runlog, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    rows = [{"epoch": "1", "train_loss": "2.5", "test_top1": "0.25"}]
    runlog.write_curve(tmp_path / "curve.png", rows, Recipe(holdout=0.1, **changes))
    loss, accuracy = figures[0].axes
    assert loss.get_title() == title and accuracy.get_ylabel() == "top-1 on the validation set (%)"


def test_the_last_line_says_what_storing_changed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are trained in float32 and stored in fewer bits: the last epoch's line may have another accuracy."""
    evaluate = finish.evaluate

    def other(*given: Any, **options: Any) -> Evaluation:
        result = evaluate(*given, **options)
        return replace(result, top1=result.top1 + 0.25)

    monkeypatch.setattr(finish, "evaluate", other)
    train(replace(recipe, epochs=1, mix_off_epochs=0, warmup_epochs=0, eval_every=1), options(tmp_path))
    before = json.loads((tmp_path / "eval.json").read_text())["top1_before_storing"]
    assert f"; {before:.2%} before its weights were stored in bfloat16), firing rate" in capsys.readouterr().out


def test_a_run_in_bfloat16_reports_what_eval_of_its_folder_gives(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in float32. The toy network hardly fires and bfloat16 changes little here, so the dtype is looked at too."""
    evaluate, dtypes = finish.evaluate, []

    def watched(*given: Any, amp_dtype: torch.dtype | None = None, **others: Any) -> Evaluation:
        dtypes.append(amp_dtype)
        return evaluate(*given, amp_dtype=amp_dtype, **others)

    monkeypatch.setattr(finish, "evaluate", watched)
    short = replace(recipe, epochs=1, mix_off_epochs=0, warmup_epochs=0, precision="bfloat16")
    train(short, options(tmp_path / "run"))
    assert dtypes == [None]
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    (row,) = csv.DictReader((tmp_path / "run" / "result.csv").open())
    assert (report["precision"], report["eval_dtype"], row["eval_dtype"]) == ("bfloat16", "float32", "float32")
    command = ["eval", str(tmp_path / "run"), "--data", recipe.data, "--no-fold", "--device", "cpu"]
    assert main([*command, "--json", str(tmp_path / "eval.json")]) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert evaluated["top1_per_step"] == report["top1_per_step"]
    assert evaluated["loss"] == pytest.approx(report["loss"], rel=1e-6)


def test_it_learns(recipe: Recipe, tmp_path: Path) -> None:
    easy = replace(
        recipe,
        epochs=12,
        cutmix=0.0,
        mix_probability=0.0,
        drop_rate=0.0,
        warmup_epochs=0,
        mix_off_epochs=0,
        eval_every=12,
    )
    train(easy, options(tmp_path))
    assert json.loads((tmp_path / "eval.json").read_text())["top1"] >= 0.75  # chance is 0.25


@pytest.mark.parametrize("wrong", [-0.1, float("inf"), float("nan")])
def test_a_wrong_noise_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"expected .*current_noise"):
        Recipe(current_noise=wrong)


def test_a_model_without_noise_is_told_so(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TrainingOptions, "set_current_noise")
    with pytest.raises(ValueError, match=r"noise on currents, got 'test_gac_msresnet': give --current-noise 0"):
        train(replace(recipe, current_noise=0.1), options(tmp_path))


def test_schedule_average_freezing_and_groups() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2, lr=0.4, min_lr=0.1)
    rates = [learning_rate(recipe, step, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.02) and rates[19] == pytest.approx(0.4) and rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.25) and rates[100] == pytest.approx(0.1)
    network = timm.create_model("test_gac_msresnet", num_classes=4)
    average = MovingAverage(network, 0.75)
    before = average.state["fc.weight"].clone()
    with torch.no_grad():
        network.fc.weight.add_(1.0)
    average.set_step(10_000)
    average.update()
    torch.testing.assert_close(average.state["fc.weight"], before + 0.25)
    freeze_stages(network, 2)
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert "conv1" not in trained and "encoder" not in trained and "layer1" not in trained and "fc" in trained
    with pytest.raises(ValueError, match="freeze_stages"):
        freeze_stages(network, 9)
    decayed = create_optimizer(network, Recipe(layer_decay=0.5), torch.device("cpu")).param_groups
    assert len({group.get("lr_scale", 1.0) for group in decayed}) > 2
    for group in create_optimizer(network, Recipe(), torch.device("cpu")).param_groups:
        assert all((parameter.ndim > 1) or not group["weight_decay"] for parameter in group["params"])


def test_tet_loss_by_hand() -> None:
    steps = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    targets = torch.tensor([[1.0, 0.0]])
    entropies = [np.log(2.0), np.log(1 + np.exp(-1.0))]
    expected = 0.9 * np.mean(entropies) + 0.1 * np.mean([1.0, 1.0, 0.0, 1.0])
    assert tet_loss(steps, targets, 0.1, 1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss="tet"),
        dict(optimizer="adamw", lr=1e-3, clip_grad=1.0),
        dict(grad_accumulation=2, precision="bfloat16", report="model"),
    ],
)
def test_options_of_a_recipe_run(recipe: Recipe, tmp_path: Path, changes: dict) -> None:
    assert train(replace(recipe, epochs=2, eval_every=2, **changes), options(tmp_path)) == 0


def test_fine_tuning_takes_another_classifier_and_t(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, epochs=2, eval_every=2), options(tmp_path / "first"))
    start = f"local-dir:{tmp_path / 'first' / 'model'}"
    tuned = Trainer(replace(recipe, init=start, num_steps=3, freeze_stages=1), options(tmp_path / "second"))
    stored = load_file(tmp_path / "first" / "model" / "model.safetensors")
    assert torch.equal(tuned.state.network.conv1.weight, stored["conv1.weight"].float())
    assert tuned.state.network.num_steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=0), "epochs"),
        (dict(lr=0), "lr > 0"),
        (dict(loss="l2"), "loss out of"),
        (dict(report="ema"), "ema_decay > 0"),
        (dict(cutmix=-1.0), "cutmix"),
        (dict(mix_off_epochs=999), "mix_off"),
    ],
)
def test_bad_recipes_are_a_sentence(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_graphs_are_refused_where_there_can_be_none(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a CUDA device"):
        train(replace(recipe, cuda_graph=True), options(tmp_path))


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    given = ["cifar100_fast", "--epochs", "3", "--no-flip", "--out", "x", "--trackers", "tensorboard"]
    recipe, run = parse([*given, "--layer-decay", "0.7", "--mix-off-epochs", "1"], "train")
    assert recipe == replace(RECIPES["cifar100_fast"], epochs=3, flip=False, layer_decay=0.7, mix_off_epochs=1)
    assert run.out == Path("x") and run.trackers == ("tensorboard",) and run.recipe_name == "cifar100_fast"
    with pytest.raises(SystemExit):
        parse(["--help"], "train")
    assert "--mix-probability" in capsys.readouterr().out
    recipe, run = parse(["--dataset", "cifar10", "cifar100", "--trackers", "tensorboard", "wandb", "--cpu"], "train")
    assert recipe == replace(RECIPES["cifar100"], dataset="cifar10") and run.recipe_name == "cifar100"
    assert run.trackers == ("tensorboard", "wandb") and run.cpu
    with pytest.raises(ValueError, match="expected epochs of at least 1, got 0"):
        parse(["cifar10", "--epochs", "0"], "train")
    for wrong in (["cifar1"], ["cifar10", "--no-such-field", "1"], []):
        with pytest.raises(SystemExit, match="2"):
            parse(wrong, "train")
