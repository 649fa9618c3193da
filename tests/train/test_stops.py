"""Stops at the worst moments: in the middle of a checkpoint write, a disk that is full, gradients half added up."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from children import MOMENTS, Child, die_writing, limit_file_size
from timm_gac.train import Recipe, checkpoints
from timm_gac.train.loop import RunOptions, Trainer, train

# How often each moment of a write is died at: TIMM_GAC_KILLS=20 are five rounds of the four.
ROUNDS = max(1, int(os.environ.get("TIMM_GAC_KILLS", "0")) // len(MOMENTS))


def arguments(npz, out, *more):
    return [
        "cifar100",
        "--data",
        str(npz),
        "--model",
        "test_gac_msresnet",
        "--num-steps",
        "2",
        "--epochs",
        str(3 * ROUNDS),
        "--batch-size",
        "16",
        "--eval-every",
        "100",
        "--crop-padding",
        "1",
        "--cpu",
        "--checkpoint-steps",
        "1",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture
def start(tmp_path):
    """Runs a trainer to its end: its exit status, and what it wrote to stderr."""

    def run(given, before=None, *of_before):
        child = Child(given, tmp_path / "stderr", before, of_before)
        return child.wait(), child.stderr()

    return run


def tensors(out):
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def test_killed_while_a_checkpoint_is_written_nothing_is_lost(npz, tmp_path, start):
    assert start(arguments(npz, tmp_path / "whole")) == (0, "")
    out, more, before = tmp_path / "killed", [], 0
    for moment in MOMENTS * ROUNDS:
        status, errors = start(arguments(npz, out, *more), die_writing, moment, 2)
        assert status == -signal.SIGKILL, errors[-2000:]
        found = checkpoints.latest_checkpoint(out / "checkpoints")
        state = checkpoints.load_checkpoint(found).state
        assert state["step"] == before + (2 if moment == "after the rename" else 1), moment
        assert bool(list(out.rglob(".partial_*"))) is (moment != "after the rename")
        before, more = state["step"], ["--resume"]
    assert start(arguments(npz, out, "--resume")) == (0, "")
    expected, got = tensors(tmp_path / "whole"), tensors(out)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list(out.rglob(".partial_*"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(npz, tmp_path, start):
    out = tmp_path / "run"
    assert start(arguments(npz, tmp_path / "other")) == (0, "")
    size = (checkpoints.latest_checkpoint(tmp_path / "other" / "checkpoints") / checkpoints.TENSORS).stat().st_size
    assert start(arguments(npz, out, "--stop-after-minutes", "0.0000001")) == (0, "")
    kept = checkpoints.latest_checkpoint(out / "checkpoints")
    status, errors = start(arguments(npz, out, "--resume"), limit_file_size, size // 2)
    assert status == 2 and "Traceback" not in errors
    assert "earlier checkpoints are untouched" in errors and len(errors.strip().splitlines()) == 1
    assert checkpoints.latest_checkpoint(out / "checkpoints") == kept
    assert start(arguments(npz, out, "--resume")) == (0, "")
    expected, got = tensors(tmp_path / "other"), tensors(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.skipif(os.name != "posix", reason="needs signals of POSIX")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_ends_a_run_with_a_checkpoint_unless_it_is_to_be_ignored(nohup, npz, tmp_path, monkeypatch):
    recipe = Recipe(model="test_gac_msresnet", num_steps=1, data=str(npz), epochs=1, batch_size=16, crop_padding=1)
    trainer = Trainer(recipe, RunOptions(out=tmp_path, cpu=True))
    step = trainer.state.train_step._run

    def closed_in_the_second(*batch):
        step(*batch)
        if trainer.state.step == 1:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(trainer.state.train_step, "_run", closed_in_the_second)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        assert trainer.run() == (0 if nohup else 128 + signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.step == (4 if nohup else 2)
    assert checkpoints.latest_checkpoint(tmp_path / "checkpoints") is not None


def test_a_signal_in_the_last_step_does_not_make_a_finished_run_a_stopped_one(npz, tmp_path, monkeypatch):
    recipe = Recipe(model="test_gac_msresnet", num_steps=1, data=str(npz), epochs=1, batch_size=64, crop_padding=1)
    trainer = Trainer(replace(recipe, warmup_epochs=0), RunOptions(out=tmp_path, cpu=True))
    step = trainer.state.train_step._run

    def interrupted(*batch):
        step(*batch)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.state.train_step, "_run", interrupted)
    assert trainer.run() == 0 and (tmp_path / "result.csv").exists()


def test_a_stop_waits_for_the_gradients_to_be_complete(npz, tmp_path):
    recipe = Recipe(
        model="test_gac_msresnet",
        num_steps=2,
        data=str(npz),
        epochs=3,
        batch_size=8,
        lr=0.05,
        warmup_epochs=0,
        crop_padding=1,
        grad_accumulation=2,
        eval_every=3,
    )
    options = RunOptions(out=tmp_path / "whole", cpu=True, checkpoint_steps=3)
    train(recipe, options)
    trainer = Trainer(recipe, replace(options, out=tmp_path / "parts"))
    trainer._must_stop = lambda: trainer.state.step >= 5
    assert trainer.run() == 0 and trainer.state.step == 6
    assert train(recipe, replace(options, out=tmp_path / "parts", resume=True)) == 0
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
