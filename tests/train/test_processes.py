"""Several processes (gloo, torchrun): the same gradients as one, resume with another number, and a killed rank."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from timm_gac.train import Recipe, checkpoints
from timm_gac.train.setup import create_accelerator

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def command(npz, out, processes, batch, *more):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [
        sys.executable, "-m", *(launcher if processes > 1 else []), "timm_gac.train", "cifar100", "--data", str(npz),
        "--model", "test_gac_msresnet", "--num-steps", "2", "--sync-bn", "--batch-size", str(batch), "--crop-padding",
        "1", "--warmup-epochs", "0", "--eval-every", "100", "--ema-decay", "0.9", "--out", str(out), "--cpu", *more,
    ]  # fmt: skip


def environment():
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(*given):
    done = subprocess.run(command(*given), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(out):
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def processes_of(out):
    return json.loads((out / "config.json").read_text())["processes"]


def assert_close(got, expected, rtol, atol):
    names = [name for name in expected if not name.startswith("rng")]
    assert {name for name in got if not name.startswith("rng")} == set(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory):
    """Runs of four steps in two epochs, a checkpoint each step: by one process, and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        more = ["--epochs", "2", "--lr", "0.001", "--checkpoint-steps", "1", "--keep-checkpoints", "9"]
        run(npz, folder / str(processes), processes, 32 // processes, *more)
        assert processes_of(folder / str(processes)) == processes
    return folder


def test_two_processes_have_the_gradients_and_statistics_of_one_with_the_doubled_batch(whole):
    first = [load_file(whole / name / "checkpoints" / "step_00000001" / checkpoints.TENSORS) for name in ("1", "2")]
    buffers = [name for name in first[0] if name.endswith("momentum_buffer")]  # the gradient itself, after one step
    assert len(buffers) > 20 and sum(first[0][name].abs().sum() for name in buffers) > 1
    assert first[0]["model.bn1.running_mean"].abs().max() > 0
    assert_close(first[1], first[0], rtol=1e-3, atol=1e-5)


def test_two_processes_end_where_one_does(whole):
    assert_close(tensors(whole / "2"), tensors(whole / "1"), rtol=1e-2, atol=1e-4)
    one, two = (json.loads((whole / name / "eval.json").read_text()) for name in ("1", "2"))
    assert one["images"] == two["images"] == 17  # odd: the processes' parts differ in size
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert two["firing_rates"] == pytest.approx(one["firing_rates"], rel=1e-2)
    rows = [next(csv.DictReader((whole / name / "result.csv").open())) for name in ("1", "2")]
    assert rows[0]["batch_size"] == rows[1]["batch_size"] == "32"


@pytest.mark.parametrize(("before", "after", "step"), [(2, 1, 3), (1, 2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(whole, npz, tmp_path, before, after, step):
    out = tmp_path / "run"
    shutil.copytree(whole / str(before), out)
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    more = ["--epochs", "2", "--lr", "0.001", "--resume"]
    refused = subprocess.run(
        command(npz, out, 1, 8, *more), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert refused.returncode == 2 and "batches of 32 images in all" in refused.stderr
    run(npz, out, after, 32 // after, *more)
    assert processes_of(out) == after
    assert checkpoints.latest_checkpoint(out / "checkpoints").name == "step_00000004"
    assert_close(tensors(out), tensors(whole / str(before)), rtol=1e-2, atol=1e-4)


def test_a_killed_rank_ends_the_job_with_an_error(npz, tmp_path):
    given = command(npz, tmp_path, 2, 16, "--epochs", "5000", "--checkpoint-steps", "2")
    errors = (tmp_path / "errors").open("w+")
    job = subprocess.Popen(given, env=environment(), stderr=errors, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while checkpoints.latest_checkpoint(tmp_path / "checkpoints") is None:
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()[-3000:]
            time.sleep(0.1)
        assert processes_of(tmp_path) == 2
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        victim = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(int(victim), signal.SIGKILL)
        assert job.wait(timeout=90) not in (0, None)
    finally:
        job.kill()
    found = checkpoints.latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoints.load_checkpoint(found).state["processes"] == 2


def test_configurations_of_accelerate_load():
    expected = {"one_gpu": ("NO", 1, 1), "several_gpus": ("MULTI_GPU", 2, 1), "several_nodes": ("MULTI_GPU", 16, 2),
                "fsdp2": ("FSDP", 2, 1)}  # fmt: skip
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(expected)
    for name, (kind, processes, machines) in expected.items():
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.fsdp_config["fsdp_version"] == 2


def test_divided_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="with DDP, got FSDP"):
        create_accelerator(Recipe(), tmp_path, (), cpu=True)
