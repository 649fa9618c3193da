"""Stops at the worst moments: in the middle of a checkpoint write, a disk that is full, gradients half added up."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from timm_gac.train import Recipe, checkpoints
from timm_gac.train.loop import RunOptions, Trainer, train

# Kills this very process at a given moment of the n-th checkpoint, then trains as usual where it is not reached.
CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from timm_gac.train import checkpoints
from timm_gac.train.__main__ import main
moment, left = sys.argv[1], int(sys.argv[2])
write, rename, rmtree = checkpoints._write, Path.rename, shutil.rmtree
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def at(place):
    global left
    if place == moment:
        left -= 1
        if left == 0:
            die()
def half_written(file, content):
    if file.name == checkpoints.TENSORS and moment == "in the tensors" and left == 1:
        write(file, content[: len(content) // 2])
    if file.name == checkpoints.TENSORS:
        at("in the tensors")
    if file.name == checkpoints.STATE:
        at("before the state")
    write(file, content)
def renamed(self, target):
    if self.name.startswith(".partial_"):
        at("before the rename")
    result = rename(self, target)
    if self.name.startswith(".partial_"):
        at("after the rename")
    return result
checkpoints._write, Path.rename = half_written, renamed
sys.exit(main(sys.argv[3:]))
"""
MOMENTS = ("in the tensors", "before the state", "before the rename", "after the rename")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(npz, out, *more):
    return ["cifar100", "--data", str(npz), "--model", "test_gac_msresnet", "--num-steps", "2", "--epochs", "3",
            "--batch-size", "16", "--eval-every", "100", "--crop-padding", "1", "--cpu", "--checkpoint-steps", "1",
            "--out", str(out), *more]  # fmt: skip


def start(code, *given, **options):
    return subprocess.run([sys.executable, *code, *given], capture_output=True, text=True, timeout=240, **options)


def tensors(out):
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def test_killed_while_a_checkpoint_is_written_nothing_is_lost(npz, tmp_path):
    assert start(["-m", "timm_gac.train"], *arguments(npz, tmp_path / "whole")).returncode == 0
    out, more, before = tmp_path / "killed", [], 0
    for moment in MOMENTS:
        done = start(["-c", CHILD], moment, "2", *arguments(npz, out, *more))
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        found = checkpoints.latest_checkpoint(out / "checkpoints")
        state = checkpoints.load_checkpoint(found).state
        assert state["step"] == before + (2 if moment == "after the rename" else 1), moment
        before, more = state["step"], ["--resume"]
    done = start(["-m", "timm_gac.train"], *arguments(npz, out, "--resume"))
    assert done.returncode == 0, done.stderr[-2000:]
    expected, got = tensors(tmp_path / "whole"), tensors(out)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list(out.rglob(".partial_*"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(npz, tmp_path):
    out = tmp_path / "run"
    assert start(["-m", "timm_gac.train"], *arguments(npz, tmp_path / "other")).returncode == 0
    size = (checkpoints.latest_checkpoint(tmp_path / "other" / "checkpoints") / checkpoints.TENSORS).stat().st_size

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    done = start(["-m", "timm_gac.train"], *arguments(npz, out, "--stop-after-minutes", "0.0000001"))
    assert done.returncode == 0
    kept = checkpoints.latest_checkpoint(out / "checkpoints")
    done = start(["-m", "timm_gac.train"], *arguments(npz, out, "--resume"), preexec_fn=full)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "earlier checkpoints are untouched" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert checkpoints.latest_checkpoint(out / "checkpoints") == kept
    assert start(["-m", "timm_gac.train"], *arguments(npz, out, "--resume")).returncode == 0
    expected, got = tensors(tmp_path / "other"), tensors(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_stop_waits_for_the_gradients_to_be_complete(npz, tmp_path):
    recipe = Recipe(model="test_gac_msresnet", num_steps=2, data=str(npz), epochs=3, batch_size=8, lr=0.05,
                    warmup_epochs=0, crop_padding=1, grad_accumulation=2, eval_every=3)  # fmt: skip
    options = RunOptions(out=tmp_path / "whole", cpu=True, checkpoint_steps=3)
    train(recipe, options)
    trainer = Trainer(recipe, replace(options, out=tmp_path / "parts"))
    trainer._must_stop = lambda: trainer.step >= 5
    assert trainer.run() == 0 and trainer.step == 6
    assert train(recipe, replace(options, out=tmp_path / "parts", resume=True)) == 0
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
