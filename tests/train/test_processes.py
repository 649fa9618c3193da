"""Several processes, on CPUs (gloo) and on GPUs (NCCL, where there are two): the same gradients as one, resume with
another number, a killed rank, the exchange of a graphed step, divided weights, and the benchmark of scaling."""

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
import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import shared_step
from timm_gac.bench.ops import relative_error
from timm_gac.bench.processes import GRADIENT_TOLERANCE, launch
from timm_gac.hub import save_model_folder
from timm_gac.train import Recipe, checkpoints
from timm_gac.train.__main__ import main
from timm_gac.train.setup import create_accelerator

CONFIGS = Path(__file__).parents[2] / "examples" / "launch"
RANKS = Path(__file__).parents[1] / "runtime" / "ranks.py"


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WHERE = ["cpu", pytest.param("gpus", marks=two_gpus)]
RUN = ["--epochs", "2", "--lr", "0.001"]


@pytest.fixture(scope="module", params=WHERE)
def where(request):
    """What the processes train on: gloo and one CPU, or NCCL and a GPU each."""
    return request.param


def arguments(where, npz, out, batch, *more):
    return [
        "cifar100",
        "--data",
        str(npz),
        "--model",
        "test_gac_msresnet",
        "--num-steps",
        "2",
        "--sync-bn",
        "--batch-size",
        str(batch),
        "--crop-padding",
        "1",
        "--warmup-epochs",
        "0",
        "--eval-every",
        "100",
        "--ema-decay",
        "0.9",
        "--out",
        str(out),
        *(["--cpu"] if where == "cpu" else []),
        *more,
    ]


def command(where, processes, *given):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [sys.executable, "-m", *(launcher if processes > 1 else []), "timm_gac.train", *arguments(where, *given)]


def environment(where):
    # TensorFloat-32 rounds so coarsely that runs with other batches would part at once.
    # On CPUs accelerate's barriers still name a GPU for each process, which one GPU is too few for: none is visible.
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    of_device = on_cpu if where == "cpu" else {"NVIDIA_TF32_OVERRIDE": "0"}
    return os.environ | of_device | {"OMP_NUM_THREADS": "1"}


def run(warm_python, where, processes, *given):
    """Train to the end; on CPUs without starts of Python, which torchrun's are in the test that kills a rank."""
    if processes == 1 and where == "cpu":
        assert main(arguments(where, *given)) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        return
    if where == "cpu":
        done = warm_python([str(RANKS), "-m", "timm_gac.train", *arguments(where, *given)], env=environment(where))
    else:
        done = subprocess.run(
            command(where, processes, *given), env=environment(where), capture_output=True, text=True, timeout=240
        )
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(out):
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def processes_of(out):
    return json.loads((out / "config.json").read_text())["processes"]


def assert_close(where, got, expected, rtol, atol):
    """Every number on CPUs; every tensor as a whole on GPUs, where single spikes may differ.

    There a convolution of another batch rounds otherwise, which flips a neuron at its threshold now and then. That the
    equations are the same is shown in float64, by `test_gradients_are_those_of_one_process`.
    """
    names = [name for name in expected if not name.startswith("rng")]
    assert {name for name in got if not name.startswith("rng")} == set(names)
    for name in names:
        if where == "cpu":
            torch.testing.assert_close(
                got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif expected[name].is_floating_point():
            assert relative_error(got[name], expected[name]) <= 50 * rtol, name


@pytest.fixture(scope="module")
def whole(warm_python, where, npz, tmp_path_factory):
    """Runs of four steps in two epochs, a checkpoint each step: by one process, and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        more = [*RUN, "--checkpoint-steps", "1", "--keep-checkpoints", "9"]
        run(warm_python, where, processes, npz, folder / str(processes), 32 // processes, *more)
        assert processes_of(folder / str(processes)) == processes
    return folder


def test_two_processes_have_the_gradients_and_statistics_of_one_with_the_doubled_batch(where, whole):
    first = [load_file(whole / name / "checkpoints" / "step_00000001" / checkpoints.TENSORS) for name in ("1", "2")]
    buffers = [name for name in first[0] if name.endswith("momentum_buffer")]  # the gradient itself, after one step
    assert len(buffers) > 20 and sum(first[0][name].abs().sum() for name in buffers) > 1
    assert first[0]["model.bn1.running_mean"].abs().max() > 0
    assert_close(where, first[1], first[0], rtol=1e-3, atol=1e-5)


def test_two_processes_end_where_one_does(where, whole):
    assert_close(where, tensors(whole / "2"), tensors(whole / "1"), rtol=1e-2, atol=1e-4)
    one, two = (json.loads((whole / name / "eval.json").read_text()) for name in ("1", "2"))
    assert one["images"] == two["images"] == 17  # odd: the processes' parts differ in size
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert two["firing_rates"] == pytest.approx(one["firing_rates"], rel=1e-2)
    gates = [list(csv.DictReader((whole / name / "gate.csv").open())) for name in ("1", "2")]
    assert [[row["epoch"] for row in rows] for rows in gates] == [["2"], ["2"]]  # of two, by the main process alone
    rows = [next(csv.DictReader((whole / name / "result.csv").open())) for name in ("1", "2")]
    assert rows[0]["batch_size"] == rows[1]["batch_size"] == "32"


def part_of(whole, out, before, step):
    """The run of ``before`` processes as it was after a step."""
    shutil.copytree(whole / str(before), out)
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize(("before", "after", "step"), [(2, 1, 3), (1, 2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(warm_python, where, whole, npz, tmp_path, before, after, step):
    out = tmp_path / "run"
    part_of(whole, out, before, step)
    run(warm_python, where, after, npz, out, 32 // after, *RUN, "--resume")
    assert processes_of(out) == after
    assert checkpoints.latest_checkpoint(out / "checkpoints").name == "step_00000004"
    assert_close(where, tensors(out), tensors(whole / str(before)), rtol=1e-2, atol=1e-4)


def test_processes_draw_other_noise_and_a_resumed_one_the_same(warm_python, where, npz, tmp_path):
    noise = ["--current-noise", "0.2"]
    more = [*RUN, *noise, "--checkpoint-steps", "1", "--keep-checkpoints", "9"]
    run(warm_python, where, 2, npz, tmp_path / "2", 16, *more)
    expected = tensors(tmp_path / "2")
    kind = "cpu" if where == "cpu" else "cuda"
    assert not torch.equal(expected[f"rng.0.{kind}"], expected[f"rng.1.{kind}"])
    part_of(tmp_path, tmp_path / "run", 2, 2)
    run(warm_python, where, 2, npz, tmp_path / "run", 16, *RUN, *noise, "--resume")
    found = tensors(tmp_path / "run")
    if where == "cpu":
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    else:
        assert_close(where, found, expected, rtol=1e-2, atol=1e-4)


def test_two_processes_have_the_gradients_of_one_with_a_teacher(warm_python, where, whole, npz, tmp_path):
    """Of a teacher that is sure of its answers, which changes them much."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_ann_resnet", num_classes=4)
    with torch.no_grad():
        teacher.fc.weight *= 20
    save_model_folder(teacher, tmp_path / "teacher")
    for processes in (1, 2):
        more = [*RUN, "--checkpoint-steps", "1", "--keep-checkpoints", "9"]
        more += ["--teacher", str(tmp_path / "teacher"), "--distill-temperature", "1"]
        run(warm_python, where, processes, npz, tmp_path / str(processes), 32 // processes, *more)
    files = [path / "checkpoints" / "step_00000001" for path in (tmp_path / "1", tmp_path / "2", whole / "1")]
    one, two, alone = (load_file(file / checkpoints.TENSORS) for file in files)
    assert_close(where, two, one, rtol=1e-3, atol=1e-5)
    buffers = [name for name in one if name.endswith("momentum_buffer")]  # the gradient itself, after one step
    change = sum((one[name] - alone[name]).norm() for name in buffers) / sum(alone[name].norm() for name in buffers)
    assert change > 0.2


def test_another_batch_of_all_processes_is_refused(whole, npz, tmp_path, capsys):
    part_of(whole, tmp_path / "run", 2, 3)
    assert main(arguments("cpu", npz, tmp_path / "run", 8, *RUN, "--resume")) == 2
    assert "batches of 32 images in all" in capsys.readouterr().err


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=two_gpus)], ids=["eager", "graph"])
def test_a_killed_rank_ends_the_job_with_an_error(where, npz, tmp_path, graph):
    if graph and where == "cpu":
        pytest.skip("CUDA graphs need GPUs")
    more = ["--epochs", "5000", "--checkpoint-steps", "8" if graph else "2", *(["--cuda-graph"] if graph else [])]
    errors = (tmp_path / "errors").open("w+")
    given = command(where, 2, npz, tmp_path, 16, *more)
    job = subprocess.Popen(given, env=environment(where), stderr=errors, stdout=subprocess.DEVNULL)
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


@two_gpus
def test_two_gpus_train_in_a_graph_as_they_do_without(warm_python, npz, tmp_path):
    losses = []
    for more in ([], ["--cuda-graph"]):
        out = tmp_path / f"run{len(losses)}"
        run(warm_python, "gpus", 2, npz, out, 16, "--epochs", "4", "--lr", "0.001", "--checkpoint-steps", "3", *more)
        assert checkpoints.latest_checkpoint(out / "checkpoints").name == "step_00000008"  # captured in the fifth
        losses.append([float(row["train_loss"]) for row in csv.DictReader((out / "metrics.csv").open())])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.fixture(scope="module")
def shared(where, tmp_path_factory):
    """Figures of what two processes did together, and where the benchmark's row is."""
    folder = tmp_path_factory.mktemp("shared")
    launch(shared_step.together, str(folder), 2, where == "gpus")
    return json.loads((folder / "figures.json").read_text()) | {"csv": folder / "scaling.csv"}


def test_one_all_reduce_trains_as_ddp_does(where, shared):
    figures = shared["exchange"]
    assert figures["ddp"] == [True, False] and figures["captured"] == (where == "gpus")
    assert figures["same_weights"]
    assert figures["difference"] <= (1e-6 if where == "cpu" else 1e-3)  # of what training moved


def test_fsdp2_gives_the_losses_and_weights_of_a_whole_network(shared):
    figures = shared["sharded"]
    assert 0.4 < figures["share"] < 0.6 and len(set(figures["whole"])) == 3
    assert figures["divided"] == pytest.approx(figures["whole"], rel=1e-5)
    assert figures["largest_difference"] <= 1e-5


def test_gradients_are_those_of_one_process(shared):
    figures = shared["gradients"]
    assert len(figures["right"]) >= 4 and max(figures["right"].values()) <= GRADIENT_TOLERANCE
    assert min(figures["without_exchange"], figures["without_sync"]) > 1e-2  # what a wrong step would give


def test_the_benchmark_of_scaling_writes_its_row(shared):
    (row,) = csv.DictReader(shared["csv"].open())
    assert (row["status"], row["provider"], row["batch_norm"], row["commit"]) == ("ok", "all_reduce", "sync", "abc")
    assert float(row["gradient_error"]) <= GRADIENT_TOLERANCE
    one, both = float(row["images_per_s_one"]), float(row["images_per_s"])
    assert both == pytest.approx(2 * 4 * 1e3 / float(row["median_ms"]), rel=1e-4)
    assert float(row["scaling"]) == pytest.approx(both / one, rel=1e-4)
    assert float(row["efficiency"]) == pytest.approx(both / one / 2, rel=1e-4)


@two_gpus
def test_fine_tuning_under_fsdp2_stores_a_whole_network(tmp_path):
    for split, count in (("train", 16), ("val", 8)):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (32, 32), (200 * label + index,) * 3)
                picture.save(tmp_path / split / str(label) / f"{index}.png")
    given = ["--config_file", str(CONFIGS / "fsdp2.yaml"), str(CONFIGS.parent / "finetune.py"), str(tmp_path)]
    given += ["--model", "test_gac_msresnet", "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "tuned")]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run([*launcher, *given], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    model = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
    assert torch.isfinite(model(torch.rand(1, 3, 32, 32))).all()


def test_configurations_of_accelerate_load():
    expected = {
        "one_gpu": ("NO", 1, 1),
        "several_gpus": ("MULTI_GPU", 2, 1),
        "several_nodes": ("MULTI_GPU", 16, 2),
        "fsdp2": ("FSDP", 2, 1),
    }
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(expected)
    for name, (kind, processes, machines) in expected.items():
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.fsdp_config["fsdp_version"] == 2


def test_divided_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="with DDP, got FSDP"):
        create_accelerator(Recipe(), tmp_path, (), cpu=True)


def test_graphs_need_nccl_between_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    with pytest.raises(ValueError, match="expected NCCL between the processes for cuda_graph, got otherwise"):
        create_accelerator(Recipe(cuda_graph=True), tmp_path, (), cpu=True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cuda:nccl")
    assert create_accelerator(Recipe(cuda_graph=True), tmp_path, (), cpu=True).num_processes == 2
