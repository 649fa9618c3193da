"""What is refused, or said, before a run begins: data, networks, rates, files, trackers, command lines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_gac.hub.folder import save_model_folder
from timm_gac.train import RECIPES, Recipe, setup
from timm_gac.train.__main__ import main
from timm_gac.train.loop import RunOptions, Trainer
from timm_gac.train.optim import learning_rate
from timm_gac.train.options import OWN_TABLES, parse
from timm_gac.train.sets import read_sets
from timm_gac.train.setup import create_accelerator, create_network, settled
from toy_runs import options


class Plain(torch.nn.Linear):
    """A network that is registered with timm, but not one of this package."""


def test_a_network_that_could_not_be_stored_is_refused_before_it_is_trained(recipe, tmp_path, monkeypatch):
    def create_model(name, **_):
        network = Plain(2, 2)
        network.pretrained_cfg = {"architecture": name}
        return network

    monkeypatch.setattr(setup.timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"expected a network made by timm\.create_model, of this package, got Plain"):
        create_network(replace(recipe, model="plain"), 4, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(label_names=np.array(["a", "b\nc", "d", "e"])),
            r"printable characters, got 'b\\nc'.*could not be stored",
        ),
        (dict(label_names=np.array(["a", "", "d", "e"])), "label names as a list of texts.*could not be stored"),
        (dict(label_names=np.array(["a" * 2**19, "b" * 2**19, "d", "e"])), "names of classes that fit into a config"),
        (
            dict(x_test=np.zeros((16, 3, 9, 9), np.uint8)),
            r"shape \(3, 8, 8\) in .*, got \(3, 9, 9\): give --image-size",
        ),
        (dict(x_test=np.zeros((16, 1, 8, 8), np.uint8)), r"got \(1, 8, 8\): store both with the same channels"),
        (dict(y_test=np.full(16, 6)), "test labels below 4, the number of classes of the training set of .*, got 6"),
        (
            dict(y_train=np.full(64, 10**9)),
            "labels below 1,000,000 in .*, got 1,000,000,000: number the classes from 0",
        ),
        (dict(y_train=np.zeros(64, int), y_test=np.zeros(16, int)), "images of two classes or more in .*, got 1, of"),
        (dict(y_train=np.full(64, 3)), "images of two classes or more in .*, got 1, of which a network learns nothing"),
        (
            dict(y_train=np.zeros(64, int), label_names=np.array(["a", "b", "c", "d"])),
            "images of two classes or more in .*, got 1, of which a network learns nothing",
        ),
    ],
)
def test_data_whose_run_could_not_be_stored_or_tested_is_refused_before_it(recipe, tmp_path, changes, said):
    images, labels = np.zeros((64, 3, 8, 8), np.uint8), np.arange(64) % 4
    sets = dict(x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16]) | changes
    np.savez(tmp_path / "data.npz", **sets)
    with pytest.raises(ValueError, match=said) as caught:
        Trainer(replace(recipe, data=str(tmp_path / "data.npz")), options(tmp_path / "run"))
    assert len(str(caught.value)) < 500 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "stream"])
@pytest.mark.parametrize("data", ["folder", "torch/cifar10"])
def test_pictures_of_one_class_are_refused_before_a_run(recipe, tmp_path, monkeypatch, data, stream):
    """A network of one class gives each picture the right answer, and learns nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        folder = tmp_path / "pictures" / split / "cat"
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8), (60 * index,) * 3).save(folder / f"{index}.png")
    if data != "folder":  # a data set of torchvision, without its files
        source = ImageFolder(tmp_path / "pictures" / "train")
        monkeypatch.setattr(timm.data, "create_dataset", lambda *given, **options: source)
    given = replace(recipe, data=data, data_dir=str(tmp_path / "pictures"), stream=stream, num_workers=0, batch_size=2)
    with pytest.raises(ValueError, match=rf"images of two classes or more in '{data}' in '.*pictures', got 1, of"):
        Trainer(given, options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [dict(), dict(holdout=0.5)], ids=["test set", "holdout"])
def test_a_test_set_of_one_class_is_no_reason_to_refuse(recipe, tmp_path, changes):
    images, labels = np.zeros((64, 3, 8, 8), np.uint8), np.arange(64) % 2
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16] * 0)
    sets = read_sets(replace(recipe, data=str(tmp_path / "data.npz"), **changes), False)
    assert sets[0].num_classes == 2


def test_images_of_another_size_are_taken_with_an_image_size(recipe, tmp_path):
    images, labels = np.zeros((64, 3, 8, 8), np.uint8), np.arange(64) % 4
    other = np.zeros((16, 3, 9, 9), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=other, y_test=labels[:16])
    sets = read_sets(replace(recipe, data=str(tmp_path / "data.npz"), image_size=8), False)
    assert sets[1].images.shape == (16, 3, 8, 8)


def test_a_network_too_large_for_a_folder_is_refused_before_it_is_trained(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"at most 33,554,432 values over all time steps.*could not be stored in the"):
        Trainer(replace(recipe, num_steps=1024, image_size=64), options(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((name, math.inf, f"expected a finite {name}") for name in ("lr", "weight_decay", "tet_lambda", "clip_grad")),
        ("mixup", math.inf, "expected a finite mixup, got inf"),
        ("warmup_epochs", math.nan, "expected warmup_epochs of at least 0, got nan"),
        ("layer_decay", math.nan, "expected layer_decay > 0, got nan"),
        ("layer_decay", 0.0, r"expected layer_decay > 0, got 0\.0"),
        ("layer_decay", -1.0, r"expected layer_decay > 0, got -1\.0"),
        ("min_lr", 0.2, r"expected min_lr of at most lr=0\.1, got 0\.2"),
        ("momentum", 1.0, r"expected momentum in \[0, 1\), got 1\.0"),
        ("num_workers", -1, "expected num_workers of at least 0, got -1"),
    ],
)
def test_rates_that_nothing_learns_with_are_refused(recipe, name, value, said):
    with pytest.raises(ValueError, match=said):
        replace(recipe, **{name: value})


@pytest.mark.parametrize("name", OWN_TABLES)
def test_a_table_of_results_is_none_of_the_runs_own(tmp_path, name):
    with pytest.raises(ValueError, match=rf"expected a table for --results, got .*{name}', a file of the run itself"):
        options(tmp_path / "run", results=tmp_path / "other" / ".." / "run" / name)
    assert options(tmp_path / "run", results=tmp_path / name).results is not None


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [setup.LoggerType.TENSORBOARD])
    setup.check_trackers(["tensorboard", "all"])
    with pytest.raises(ValueError, match="expected an installed tracker, got 'wandb', which is not"):
        setup.check_trackers(["tensorboard", "wandb"])


def test_another_model_than_that_of_the_initial_weights_is_refused(recipe, tmp_path):
    save_model_folder(timm.create_model("test_msresnet", num_classes=2), tmp_path)
    given = replace(recipe, init=str(tmp_path), model="gac_msresnet18_cifar")
    with pytest.raises(
        ValueError, match=r"weights of gac_msresnet18_cifar, which --model names, got .* of test_msresnet:"
    ):
        settled(given, "digits")
    for model, name in (("test_gac_msresnet", "digits"), ("test_msresnet", "digits"), ("gac_msresnet34", "custom")):
        assert settled(replace(given, model=model), name).model == "test_msresnet"
    assert settled(given, "digits", resumed=True).model == "test_msresnet"


def test_a_recipe_is_shown(capsys):
    assert main(["cifar100_fast", "--epochs", "100", "--show"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "recipe cifar100_fast" and len(said) == 1 + len(RECIPES["cifar100_fast"].to_dict())
    assert any(line.split() == ["epochs", "100", "(recipe:", "165)"] for line in said)
    assert any(line.split() == ["lr", "0.1"] for line in said)


def test_a_cpu_says_at_once_what_it_cannot_do(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="expected a CUDA device, got none"):
            Trainer(Recipe(), RunOptions(out=tmp_path, device="cuda"))
    asked = replace(RECIPES["cifar100_fast"], precision="float16")
    with pytest.raises(ValueError, match=r"for cuda_graph and precision float16.*--no-cuda-graph --precision float32"):
        create_accelerator(asked, tmp_path, (), cpu=True)
    with pytest.raises(
        ValueError, match=r"for cuda_graph, got a CPU: give --no-cuda-graph --precision .*recipe digits"
    ):
        create_accelerator(RECIPES["cifar100_fast"], tmp_path, (), cpu=True)


def test_an_empty_word_is_not_the_current_folder(capsys):
    assert main(["digits", "--out", ""]) == 2
    assert "error: expected a path after '--out', got an empty word" in capsys.readouterr().err


def test_command_lines_of_beginners(capsys):
    recipe, run = parse(["cifar100_fast", "--epochs", "3", "--device", "cpu"], "train")
    assert (recipe.epochs, recipe.mix_off_epochs, recipe.warmup_epochs) == (3, 0, 3.0) and run.on_cpu
    assert max(learning_rate(recipe, step, 10) for step in range(30)) == pytest.approx(0.1)
    assert learning_rate(recipe, 14, 10) == pytest.approx(0.1) and learning_rate(recipe, 25, 10) < 0.05
    assert parse(["cifar10", "--cpu"], "train")[1].on_cpu and not parse(["cifar10"], "train")[1].on_cpu
    for wrong in (["--device", "cuda:1"], ["--cpu", "--device", "cuda"]):
        with pytest.raises(ValueError, match="device"):
            parse(["cifar10", *wrong], "train")
    for wrong, meant in ((["--epoch", "3"], "--epochs"), (["--drop", "0.1"], "--drop-rate")):
        with pytest.raises(SystemExit):
            parse(["cifar10", *wrong], "train")
        assert meant in capsys.readouterr().err
