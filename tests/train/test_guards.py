"""What could silently ruin a run: NaN, a second trainer, other data, damaged checkpoints, leftovers of another run."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from children import Child
from damage import fuzz
from timm_gac.hub.folder import save_model_folder
from timm_gac.train import checkpoints
from timm_gac.train.__main__ import main
from timm_gac.train.finite import NotFiniteError, count_not_finite
from timm_gac.train.lock import RunLock
from timm_gac.train.loop import RunOptions, Trainer, train
from timm_gac.train.runlog import read_metrics
from timm_gac.train.sets import read_sets
from timm_gac.train.setup import create_network
from timm_gac.train.step import TrainStep


def options(out: Path, **changes: object) -> RunOptions:
    return RunOptions(out=out, device="cpu", **changes)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.latest_checkpoint(out / "checkpoints") / checkpoints.TENSORS)


def test_frozen_stages_keep_every_tensor(recipe, tmp_path):
    trainer = Trainer(replace(recipe, freeze_stages=2, epochs=2, eval_every=1, ema_decay=0.9), options(tmp_path))
    before = {name: tensor.clone() for name, tensor in trainer.state.network.state_dict().items()}
    trainer.run()
    changed = {
        name.split(".")[0]
        for name, tensor in trainer.state.network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert {"layer2", "fc"} <= changed and not changed & {"conv1", "bn1", "encoder", "layer1"}


def test_the_last_step_updates_with_what_has_accumulated(recipe, tmp_path):
    """Four steps: with 8 to accumulate one update of their mean, as with 4; with 3 a second one of a single step."""
    for count in (8, 4, 3):
        train(replace(recipe, grad_accumulation=count), options(tmp_path / str(count)))
    few, equal, rest = (tensors(tmp_path / str(count)) for count in (8, 4, 3))
    assert all(torch.equal(few[name], equal[name]) for name in few)
    torch.manual_seed(0)
    assert few["optimizer.0.momentum_buffer"].norm() > 0
    assert not torch.equal(few["model.fc.weight"], rest["model.fc.weight"])


def test_runs_of_a_process_have_settings_of_their_own(recipe, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    for precision in ("float32", "bfloat16"):
        assert train(replace(recipe, precision=precision), options(tmp_path / precision)) == 0
    assert AcceleratorState._shared_state == {}


def test_a_run_in_a_thread_and_no_second_one_beside_it(recipe, tmp_path):
    trainer, codes, seen = Trainer(recipe, options(tmp_path / "a")), list[int](), list[str]()
    tick = trainer._tick

    def during() -> None:
        with pytest.raises(ValueError, match="one training run at a time"):
            Trainer(recipe, options(tmp_path / "b"))
        seen.append("refused")
        tick()

    trainer._tick = during
    thread = threading.Thread(target=lambda: codes.append(trainer.run()))
    thread.start()
    thread.join(120)
    assert codes == [0] and seen
    older = Trainer(recipe, options(tmp_path / "c"))
    Trainer(recipe, options(tmp_path / "d"))
    with pytest.raises(ValueError, match="got an older one"):
        older.run()


def test_what_is_not_finite_is_counted_on_a_device_of_any_name():
    found = [torch.tensor([1.0, float("nan")]), torch.tensor(float("-inf")), torch.ones(2), torch.arange(3)]
    assert [count_not_finite(found, torch.device(name)).item() for name in ("cpu", "cpu:1")] == [2, 2]
    assert count_not_finite([torch.empty(0)], torch.device("cpu")) == 0


def poison(trainer: Trainer, place: str) -> None:
    network = trainer.state.network
    if place == "statistic":
        network.bn1.running_mean[0] = float("nan")
    elif place == "weight":
        network.fc.bias.data[0] = float("inf")
    elif place == "loss":
        trainer.state.train_step.sums[0] = float("nan")
    elif place == "momentum":
        trainer.state.raw_optimizer.state[network.fc.bias]["momentum_buffer"][0] = float("nan")
    else:
        trainer.state.average.state["bn1.running_var"][0] = float("inf")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("statistic", "in bn1.running_mean"),
        ("weight", "in fc.bias"),
        ("loss", "a loss of nan"),
        ("momentum", "in momentum_buffer of fc.bias"),
        ("average", "in average of bn1.running_var"),
    ],
)
def test_nan_and_infinity_stop_a_run_and_no_checkpoint_holds_them(recipe, tmp_path, monkeypatch, place, said):
    recipe = replace(recipe, epochs=2, ema_decay=0.9)
    trainer = Trainer(recipe, options(tmp_path, checkpoint_steps=1, keep_checkpoints=1))
    run_step = TrainStep.__call__

    def step(self, images, targets, number):
        run_step(self, images, targets, number)
        if number == 4:
            poison(trainer, place)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "__call__", step)
        with pytest.raises(NotFiniteError, match=r"^expected finite numbers, got ") as caught:
            trainer.run()
    message = str(caught.value)
    assert said in message and "between steps 4 and 5 (epoch 2)" in message and len(message) < 500
    assert "step_00000004" in message
    kept = tensors(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values() if tensor.is_floating_point())
    assert train(recipe, options(tmp_path, resume=True)) == 0


def test_without_a_checkpoint_the_log_interval_finds_nan(recipe, tmp_path):
    trainer = Trainer(recipe, options(tmp_path, log_steps=2))
    trainer.state.network.bn1.running_var[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"between steps 0 and 2 \(epoch 1\): there is no checkpoint before it"):
        trainer.run()


def test_a_checkpoint_with_nan_is_refused(recipe, tmp_path):
    trainer = Trainer(recipe, options(tmp_path))
    trainer.run()
    trainer.state.network.fc.bias.data[0] = float("nan")
    trainer.state.save()
    with pytest.raises(ValueError, match=r"damaged or foreign one \(NaN or infinity in fc\.bias\)"):
        train(recipe, options(tmp_path, resume=True))


def test_weights_beyond_the_stored_dtype_are_refused_and_stored_in_another(recipe, tmp_path):
    trainer = Trainer(recipe, options(tmp_path))
    with torch.no_grad():
        trainer.state.network.bn1.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"range of float16, got larger ones in bn1\.running_var.*--stored-dtype"):
        trainer.run()
    assert train(replace(recipe, stored_dtype="float32"), options(tmp_path, resume=True)) == 0


def test_a_stop_at_the_end_of_an_epoch_leaves_its_row_and_its_loss(recipe, tmp_path):
    recipe = replace(recipe, epochs=3, eval_every=1)
    train(recipe, options(tmp_path / "whole"))
    trainer = Trainer(recipe, options(tmp_path / "parts"))
    trainer._must_stop = lambda: trainer.state.step == 4
    assert trainer.run() == 0 and trainer.state.step == 4
    with (tmp_path / "parts" / "metrics.csv").open() as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1"]
    assert checkpoints.latest_checkpoint(tmp_path / "parts" / "checkpoints").name == "step_00000004"
    train(recipe, options(tmp_path / "parts", resume=True))
    names = ("epoch", "step", "train_loss", "train_match", "test_loss", "test_top1")
    tables = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "metrics.csv").open() as stream:
            tables.append([[row[column] for column in names] for row in csv.DictReader(stream)])
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def arguments(npz: Path, out: Path, *more: str) -> list[str]:
    fields = ["--data", str(npz), "--model", "test_gac_msresnet", "--num-steps", "1", "--batch-size", "16"]
    return ["cifar100", *fields, "--device", "cpu", "--checkpoint-steps", "1", "--out", str(out), *more]


def test_a_damaged_metrics_file_costs_rows_and_not_the_run(recipe, tmp_path):
    out, recipe = tmp_path / "run", replace(recipe, epochs=3)
    trainer = Trainer(recipe, options(out, checkpoint_steps=1))
    trainer._must_stop = lambda: trainer.state.step == 9
    trainer.run()
    file = out / "metrics.csv"
    header, first, second = file.read_bytes().splitlines(keepends=True)
    longer, shorter, word = first.strip() + b",1\r\n", first[:6] + b"\r\n", first.replace(b",", b",x", 3)
    for damaged in (b"\xff\xfe" + header, b"", b"a,b\r\n1,2\r\n"):
        file.write_bytes(damaged)
        assert read_metrics(file, 9) == []
    file.write_bytes(b"".join([header, longer, shorter, word, b"\r\n", second]))
    assert train(recipe, options(out, resume=True)) == 0
    with file.open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["2", "3"]


def test_a_table_that_cannot_be_written_in_the_end_says_which_and_how_to_go_on(recipe, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    table = tmp_path / "all.csv"
    with monkeypatch.context() as patched:
        patched.setattr("timm_gac.train.finish.append_csv", full)
        with pytest.raises(
            OSError, match=r"cannot add the run's row to .*all\.csv .*No space left.*--results.*--resume"
        ):
            train(recipe, options(tmp_path / "run", results=table))
    assert train(recipe, options(tmp_path / "run", results=table, resume=True)) == 0
    assert len(table.read_text().splitlines()) == 2


def test_one_trainer_a_folder(recipe, npz, tmp_path, capsys):
    out = tmp_path / "run"
    child = Child(arguments(npz, out, "--epochs", "5000"), tmp_path / "stderr")
    deadline = time.monotonic() + 120
    while checkpoints.latest_checkpoint(out / "checkpoints") is None:
        assert child.running() and time.monotonic() < deadline, child.stderr()
        time.sleep(0.05)
    assert main(arguments(npz, out, "--epochs", "5000", "--resume")) == 2
    said = capsys.readouterr().err
    assert f"held by process {child.process.pid} on" in said and len(said.splitlines()) == 1
    child.send(signal.SIGKILL)  # a dead process holds nothing
    assert child.wait() == -signal.SIGKILL
    lock = RunLock(out)
    with pytest.raises(ValueError, match=rf"another run of this process \({os.getpid()}\)"):
        Trainer(recipe, options(out))
    lock.release()
    lock.release()
    RunLock(out).release()
    assert not (out / ".lock").exists() and (out / "checkpoints").is_dir()


def test_a_folder_is_taken_away_again_only_where_it_is_new_and_empty(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in ("empty", "new", "new/deep"):
        with pytest.raises(ValueError, match=r"expected an \.npz file"):
            Trainer(replace(recipe, data="none.npz"), options(tmp_path / out))
    assert list(tmp_path.glob("[en]*")) == [tmp_path / "empty"]
    lock = RunLock(tmp_path / "new" / "deep")
    (tmp_path / "new" / "other").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_a_run_goes_on_with_its_own_data_only(recipe, tmp_path):
    npz, out = tmp_path / "data.npz", tmp_path / "run"
    rng, labels = np.random.default_rng(0), np.arange(64) % 4

    def store(images: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> None:
        np.savez(npz, x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16], **more)

    images = rng.integers(0, 255, (64, 3, 8, 8)).astype(np.uint8)
    store(images, labels)
    recipe = replace(recipe, data=str(npz), epochs=2)
    trainer = Trainer(recipe, options(out))
    trainer._must_stop = lambda: trainer.state.step == 2
    trainer.run()
    other = images.copy()
    other[40, 1, 2, 3] ^= 1
    names = np.array(["a", "b", "c", "d"])
    for change, said in (
        (lambda: store(other, labels), "content of the train set"),
        (lambda: store(images[:32], labels[:32]), "images of the train set: 64 became 32"),
        (lambda: store(images, labels % 3), "classes of the train set: 4 became 3"),
        (lambda: store(images[:, :, :4, :4], labels), "shape of the train set"),
        (lambda: store(images, labels, label_names=names), "label_names of the train set"),
    ):
        change()
        with pytest.raises(ValueError, match="expected the data that this run began with") as caught:
            train(recipe, options(out, resume=True))
        assert said in str(caught.value) and len(str(caught.value)) < 500
    store(images, labels)
    assert train(recipe, options(out, resume=True)) == 0


def test_classes_are_matched_by_name(recipe, tmp_path):
    from PIL import Image

    for split, classes in (("train", "abc"), ("test", "bc")):
        for label in classes:
            for index in range(4):
                (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
                picture = Image.new("RGB", (8, 8), (60 * "abc".index(label),) * 3)
                picture.save(tmp_path / split / label / f"{index}.png")
    sets = read_sets(replace(recipe, data="folder", data_dir=str(tmp_path), num_workers=0), False)
    assert sets[0].label_names == sets[1].label_names == ("a", "b", "c")
    assert sets[1].labels.tolist() == [1] * 4 + [2] * 4


def test_damaged_checkpoints_are_refused_in_a_sentence(recipe, tmp_path):
    trainer = Trainer(replace(recipe, ema_decay=0.9), options(tmp_path))
    trainer.run()
    outcomes = fuzz(trainer.state, seed=0, count=40)
    assert sum(outcomes.values()) == 40 and outcomes["nest: refused"] and outcomes["flip_bit: refused"]


@pytest.mark.parametrize(("stored", "given"), [(1, 3), (3, 1), (1, 1), (4, 3)])
def test_weights_for_other_channels_are_adapted(recipe, tmp_path, stored, given):
    first = timm.create_model("test_gac_msresnet", num_classes=2, num_steps=1, in_chans=stored)
    save_model_folder(first, tmp_path)
    network = create_network(replace(recipe, init=f"local-dir:{tmp_path}"), 2, given)
    assert network.conv1.weight.shape[1] == given
    if stored == given:
        assert torch.equal(network.conv1.weight, first.conv1.weight)
    assert torch.equal(network.fc.weight, first.fc.weight)
    assert network(torch.zeros(1, given, 16, 16)).isfinite().all()


def test_a_run_without_its_config_says_what_to_do(recipe, tmp_path):
    trainer = Trainer(recipe, options(tmp_path))
    trainer.run()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json in .*: put it back, or begin anew in another --out"):
        Trainer(recipe, options(tmp_path, resume=True))


def test_gate_and_neuron_of_initial_weights_stay_and_are_named(recipe, tmp_path, caplog):
    save_model_folder(timm.create_model("test_gac_msresnet", num_classes=2, gate="spatial", neuron="plif"), tmp_path)
    network = create_network(replace(recipe, init=f"local-dir:{tmp_path}"), 2, 3)
    assert network.encoder.learned is not None
    assert "Kept gate 'spatial'" in caplog.text and "Kept neuron 'plif'" in caplog.text


def test_the_recipe_for_a_cpu_runs(tmp_path):
    pytest.importorskip("sklearn")
    assert main(["digits", "--epochs", "1", "--num-steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0


def test_a_disk_that_is_full_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_gac.train.loop.write_metrics", full)
    with pytest.raises(OSError, match=r"cannot be written.*No space left.*--resume"):
        train(recipe, options(tmp_path))


def test_a_run_goes_on_when_nobody_reads_its_output(recipe, tmp_path, monkeypatch, capsys):
    """As with ``| head``, and with ``| tee log``, which Ctrl-C ends sooner than the run."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert train(replace(recipe, epochs=2, eval_every=1), options(tmp_path)) == 0
    assert (tmp_path / "model").is_dir() and (tmp_path / "checkpoints" / "step_00000008").is_dir()
    assert capsys.readouterr().err == "no output any more (Broken pipe): the run goes on, see metrics.csv\n"
