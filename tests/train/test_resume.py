"""A run that was stopped goes on bit for bit: checkpoints, and what kill -9, damage and a full disk do to them."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from children import Child
from timm_gac.train import Recipe, checkpoints
from timm_gac.train.loop import Trainer, train
from timm_gac.train.optim import create_optimizer
from toy_runs import options, same, weights

KILLS = int(os.environ.get("TIMM_GAC_KILLS", "2"))


@pytest.fixture
def recipe(full_recipe: Recipe) -> Recipe:
    return full_recipe


def test_a_finished_run_that_is_resumed_has_one_row(recipe: Recipe, tmp_path: Path) -> None:
    short, results = replace(recipe, epochs=1, mix_off_epochs=0, warmup_epochs=0), tmp_path / "results.csv"
    for resume in (False, True):
        train(short, options(tmp_path / "run", resume=resume, results=results))
        assert len(list(csv.DictReader(results.open()))) == 1
    another = tmp_path / "another.csv"  # which was not asked for before
    train(short, options(tmp_path / "run", resume=True, results=another))
    assert another.read_text() == (tmp_path / "run" / "result.csv").read_text()


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
