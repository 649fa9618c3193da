"""The trainer on the CPU: it learns, stops and resumes bit for bit, survives kill -9, and refuses what it should."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from children import Child
from timm_gac.analysis.evaluate import Evaluation
from timm_gac.cli.main import main
from timm_gac.models.training_options import TrainingOptions
from timm_gac.train import RECIPES, Recipe, checkpoints, finish
from timm_gac.train.loop import Trainer, train
from timm_gac.train.optim import MovingAverage, create_optimizer, freeze_stages, learning_rate
from timm_gac.train.options import parse
from timm_gac.train.step import tet_loss
from toy_runs import options, same, weights

KILLS = int(os.environ.get("TIMM_GAC_KILLS", "2"))


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learnable toy set: 4 classes that differ in brightness."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 4
        noise = rng.integers(0, 40, (count, 3, 8, 8))
        return (noise + labels[:, None, None, None] * 70).astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = part(64), part(16)
    file = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return file


@pytest.fixture
def recipe(npz: Path) -> Recipe:
    return Recipe(
        model="test_gac_msresnet",
        num_steps=2,
        data=str(npz),
        dataset="toy",
        epochs=4,
        batch_size=16,
        lr=0.05,
        warmup_epochs=1,
        label_smoothing=0.1,
        cutmix=1.0,
        mix_probability=0.5,
        mix_off_epochs=2,
        ema_decay=0.9,
        report="ema",
        drop_rate=0.1,
        crop_padding=1,
        eval_every=2,
        stored_dtype="bfloat16",
    )


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
    assert evaluation["images"] == 16 and len(evaluation["top1_per_step"]) == 2
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


def test_a_finished_run_that_is_resumed_has_one_row(recipe: Recipe, tmp_path: Path) -> None:
    short, results = replace(recipe, epochs=1, mix_off_epochs=0, warmup_epochs=0), tmp_path / "results.csv"
    for resume in (False, True):
        train(short, options(tmp_path / "run", resume=resume, results=results))
        assert len(list(csv.DictReader(results.open()))) == 1
    another = tmp_path / "another.csv"  # which was not asked for before
    train(short, options(tmp_path / "run", resume=True, results=another))
    assert another.read_text() == (tmp_path / "run" / "result.csv").read_text()


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


@pytest.mark.parametrize("stop_at", [1, 5, 8, 15])
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    recipe: Recipe, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, options(tmp_path / "whole"))
    trainer = Trainer(recipe, options(tmp_path / "parts", checkpoint_steps=100))
    monkeypatch.setattr(trainer, "_must_stop", lambda: trainer.state.step == stop_at)
    assert trainer.run() == 0 and trainer.state.step == stop_at
    torch.manual_seed(99)
    assert train(recipe, options(tmp_path / "parts", resume=True)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [
        [row["train_loss"] for row in csv.DictReader((tmp_path / part / "metrics.csv").open())][-1]
        for part in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_noise_on_currents_is_resumed_bit_for_bit_and_absent_where_the_network_is_evaluated(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = replace(recipe, current_noise=0.2, drop_rate=0.0)
    train(noisy, options(tmp_path / "whole"))
    trainer = Trainer(noisy, options(tmp_path / "parts", checkpoint_steps=100))
    assert trainer.state.network.encoder.current_noise == trainer.state.network.layer1[0].bn1.lif.current_noise == 0.2
    monkeypatch.setattr(trainer, "_must_stop", lambda: trainer.state.step == 5)
    assert trainer.run() == 0
    first, second = trainer.state.test(), trainer.state.test()
    assert first.loss == second.loss
    torch.manual_seed(99)
    assert train(noisy, options(tmp_path / "parts", resume=True)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    train(replace(noisy, current_noise=0.0), options(tmp_path / "plain"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "plain"))
    model = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'model'}", pretrained=True)
    assert model.encoder.current_noise == 0.0  # the folder is as any other


@pytest.mark.parametrize("wrong", [-0.1, float("inf"), float("nan")])
def test_a_wrong_noise_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"expected .*current_noise"):
        Recipe(current_noise=wrong)


def test_a_model_without_noise_is_told_so(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TrainingOptions, "set_current_noise")
    with pytest.raises(ValueError, match=r"noise on currents, got 'test_gac_msresnet': give --current-noise 0"):
        train(replace(recipe, current_noise=0.1), options(tmp_path))


def arguments(recipe: Recipe, out: Path, *more: str) -> list[str]:
    fields = ("model", "num_steps", "data", "dataset", "epochs", "batch_size", "lr", "eval_every")
    given = [text for name in fields for text in ("--" + name.replace("_", "-"), str(getattr(recipe, name)))]
    return ["cifar100", *given, "--out", str(out), "--cpu", "--checkpoint-steps", "1", *more]


def test_sigterm_saves_and_kill_9_loses_no_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    """Killed at whatever it was doing, checkpoint writes included (there is one a step), it goes on each time."""
    long = replace(recipe, epochs=200, eval_every=200)
    more: list[str] = []
    steps = [0]
    for attempt in range(KILLS + 1):
        child = Child(arguments(long, tmp_path, *more), tmp_path / "stderr")
        deadline = time.monotonic() + 120
        while True:
            latest = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
            if latest is not None and int(latest.name.removeprefix("step_")) >= steps[-1] + 2:
                break
            assert child.running(), child.stderr()
            assert time.monotonic() < deadline
            time.sleep(0.01 + 0.003 * attempt)
        last = attempt == KILLS
        child.send(signal.SIGTERM if last else signal.SIGKILL)
        assert child.wait(60) == (128 + signal.SIGTERM if last else -signal.SIGKILL), child.stderr()
        found = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
        state = checkpoints.load_checkpoint(found).state  # verified: whole, and of this step
        assert state["step"] == int(found.name.removeprefix("step_"))
        assert state["step"] >= steps[-1] + 2
        steps.append(state["step"])
        more = ["--resume"]


def test_damaged_and_foreign_checkpoints_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    trainer = Trainer(recipe, options(tmp_path))
    trainer.stop_signal = signal.SIGINT
    assert trainer.run() == 130
    found = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"lr: 0\.05 became 0\.1"):
        train(replace(recipe, lr=0.1), options(tmp_path, resume=True))
    content = bytearray((found / checkpoints.TENSORS).read_bytes())
    content[-1] ^= 1
    (found / checkpoints.TENSORS).write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        train(recipe, options(tmp_path, resume=True))
    shutil.rmtree(found)
    found.mkdir()
    save_file({"a": torch.zeros(1)}, found / checkpoints.TENSORS)
    (found / checkpoints.STATE).write_text("{}")
    with pytest.raises(ValueError, match="foreign"):
        train(recipe, options(tmp_path, resume=True))
    with pytest.raises(ValueError, match="to resume from, got none"):
        train(recipe, options(tmp_path / "nothing", resume=True))


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = checkpoints.Checkpoint({"model.w": torch.ones(3)}, {"step": 1})
    first = checkpoints.save_checkpoint(tmp_path, 1, one, keep=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="earlier checkpoints are untouched"):
            checkpoints.save_checkpoint(tmp_path, 2, one, keep=2)
    assert checkpoints.latest_checkpoint(tmp_path) == first and not list(tmp_path.glob(".partial*"))
    for step in (2, 3):
        checkpoints.save_checkpoint(tmp_path, step, one, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_optimizer_state_comes_back_in_the_parameters_layout() -> None:
    """A file holds contiguous tensors, and fused optimisers refuse a buffer that lies otherwise than its parameter."""
    layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    recipe = Recipe()
    optimizer = create_optimizer(layer, recipe, torch.device("cpu"))
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    tensors, plain = checkpoints.optimizer_tensors(optimizer)
    flat = {name.removeprefix("optimizer."): tensor.contiguous() for name, tensor in tensors.items()}
    twin = create_optimizer(layer, recipe, torch.device("cpu"))
    checkpoints.restore_optimizer(twin, flat, plain)
    before, after = optimizer.state[layer.weight], twin.state[layer.weight]
    assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
    assert after["momentum_buffer"].stride() == layer.weight.stride()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_and_eager_steps_agree_and_resume(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph and eager steps give the same weights, also in a graphed run that was stopped and resumed.

    Spiking networks amplify a difference of one rounding within a few steps, so convolutions are deterministic here.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    eager = replace(recipe, drop_rate=0.0)
    graphed = replace(eager, cuda_graph=True)
    train(eager, options(tmp_path / "eager", cpu=False))
    train(graphed, options(tmp_path / "graph", cpu=False))
    trainer = Trainer(graphed, options(tmp_path / "parts", cpu=False))
    trainer._must_stop = lambda: trainer.state.step == 9
    trainer.run()
    assert train(graphed, options(tmp_path / "parts", cpu=False, resume=True)) == 0
    expected = weights(tmp_path / "eager")
    for part in ("graph", "parts"):
        for name, tensor in weights(tmp_path / part).items():
            if not name.startswith("rng"):
                torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
