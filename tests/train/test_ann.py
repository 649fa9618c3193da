"""An ANN of a spiking network's shape trains by the same recipes, and leaves nothing of steps, neurons and spikes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_gac import cli
from timm_gac.hub import load_model, prepare_folder, save_model_folder, save_quantized
from timm_gac.hub.prepare import PublishConfig
from timm_gac.models import ANNResNet
from timm_gac.train import Recipe
from timm_gac.train.loop import Trainer, train
from toy_runs import options, weights


@pytest.fixture
def recipe(npz: Path) -> Recipe:
    return Recipe(
        model="test_ann_resnet",
        data=str(npz),
        dataset="toy",
        epochs=4,
        batch_size=16,
        lr=0.05,
        warmup_epochs=1,
        loss="tet",
        ema_decay=0.9,
        report="ema",
        drop_rate=0.1,
        crop_padding=1,
        eval_every=2,
        stored_dtype="float32",
    )


def test_a_run_leaves_nothing_of_steps_and_spikes(
    recipe: Recipe, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ann"
    assert train(replace(recipe, epochs=8), options(out)) == 0
    said = capsys.readouterr().out
    assert "firing rate" not in said and "steps:" not in said and "top-1" in said
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["firing_rate"] for row in rows] == [""] * 8 and float(rows[-1]["test_top1"]) >= 0.75  # chance is 0.25
    assert not (out / "firing_rates.csv").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["num_steps"] == config["recipe"]["num_steps"] == 1 and config["recipe"]["loss"] == "mean"
    (row,) = csv.DictReader((out / "result.csv").open())
    assert row["num_steps"] == "1" and row["model"] == "test_ann_resnet"
    evaluation = json.loads((out / "eval.json").read_text())
    assert evaluation["top1_per_step"] == [evaluation["top1"]] and evaluation["firing_rates"] == {}
    average = weights(out)
    loaded = load_model(out / "model")
    assert isinstance(loaded, ANNResNet)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, average[f"ema.{name}"]), name
    answers, report = tmp_path / "answers.npz", tmp_path / "eval.json"
    given = ["eval", str(out), "--data", str(npz), "--answers", str(answers), "--json", str(report), "--device", "cpu"]
    assert cli.main(given) == 0
    text = capsys.readouterr().out
    assert "steps" not in text and "spikes" not in text
    read = np.load(answers)
    assert read["answers"].shape == (17, 1) and read["answers"].dtype == read["labels"].dtype == np.uint8
    assert (read["answers"][:, -1] == read["labels"]).mean() == pytest.approx(evaluation["top1"])
    assert "mean_firing_rate" not in json.loads(report.read_text())
    prepare_folder(out, tmp_path / "published", PublishConfig(repo_id="org/ann"))
    card = (tmp_path / "published" / "README.md").read_text()
    assert "time step" not in card.replace("neither spikes nor time steps", "") and "Firing rates" not in card
    of_neurons = ("num_steps", "gate", "neuron", "gate_lr", "neuron_lr", "tet_lambda")
    assert "| loss | mean |" in card and not any(f"| {name} |" in card for name in of_neurons)
    assert "arXiv:1512.03385" in card and "The method is that of Qiu" not in card
    assert cli.main(["push", str(out), "--repo-id", "org/ann", "--dry-run", "--out", str(tmp_path / "dry")]) == 0
    assert "energy" not in capsys.readouterr().out  # no command measures that of an ANN
    picture = Path(__file__).parents[2] / "examples" / "pictures" / "apple.png"
    assert cli.main(["predict", str(picture), "--model", str(out), "--device", "cpu"]) == 0
    assert f"{out}, 4 classes" in capsys.readouterr().out
    assert cli.main(["bench", "model", "--model", "test_ann_resnet", "--device", "cpu"]) == 2
    assert "expected a spiking network for a benchmark, got test_ann_resnet, an ANN" in capsys.readouterr().err


def test_tet_is_plain_cross_entropy(recipe: Recipe, tmp_path: Path) -> None:
    """Without its regulariser, whose weight a recipe may have: an ANN has no threshold."""
    runs = {"tet": replace(recipe, tet_lambda=0.0), "mean": replace(recipe, loss="mean")}
    for name, changed in runs.items():
        train(replace(changed, epochs=2), options(tmp_path / name))
    tet, mean = weights(tmp_path / "tet"), weights(tmp_path / "mean")
    assert all(torch.equal(tet[name], mean[name]) for name in mean)


def test_stopped_and_resumed_is_bit_for_bit_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, options(tmp_path / "whole"))
    trainer = Trainer(recipe, options(tmp_path / "parts", checkpoint_steps=100))
    monkeypatch.setattr(trainer, "_must_stop", lambda: trainer.state.step == 6)
    assert trainer.run() == 0
    assert train(recipe, options(tmp_path / "parts", resume=True)) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_fine_tuning_takes_its_weights(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, epochs=1), options(tmp_path / "first"))
    start = f"local-dir:{tmp_path / 'first' / 'model'}"
    changes = dict(init=start, model="gac_msresnet18_cifar", freeze_stages=2, layer_decay=0.7, loss="tet")
    tuned = Trainer(replace(recipe, **changes), options(tmp_path / "second")).state
    assert isinstance(tuned.network, ANNResNet) and tuned.recipe.num_steps == 1
    stored = load_file(tmp_path / "first" / "model" / "model.safetensors")
    assert torch.equal(tuned.network.fc.weight, stored["fc.weight"])
    learning = {name.split(".")[0] for name, weight in tuned.network.named_parameters() if weight.requires_grad}
    assert learning == {"layer2", "layer3", "fc"}
    assert tuned.recipe.model == "test_ann_resnet"  # which the initial weights brought
    run = Trainer(replace(recipe, **changes | {"init": str(tmp_path / "first")}), options(tmp_path / "third")).state
    assert torch.equal(run.network.fc.weight, stored["fc.weight"])


def test_initial_weights_that_are_none(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_quantized(timm.create_model("test_gac_msresnet").eval(), tmp_path / "integers")
    for given, said in (
        (str(tmp_path / "nope"), "expected a model folder, ORG/NAME on the Hub or .* and no such folder exists"),
        (f"local-dir:{tmp_path / 'nope'}", "expected a model or run folder, got .*, which does not exist"),
        (str(tmp_path / "empty"), "or a run folder with model/ in it, got .*empty' without config.json and"),
        (str(tmp_path / "integers"), "expected initial weights in floating point, got 8-bit ones"),
        ("test_ann_resnet", "expected initial weights, got 'test_ann_resnet' .*: give a name.tag"),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(replace(recipe, init=given), options(tmp_path / "out"))


def test_a_folder_with_the_name_of_a_model_is_told_apart(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test_ann_resnet.best").mkdir()
    with pytest.raises(ValueError, match=r"the folder of that name is '\./test_ann_resnet\.best'"):
        Trainer(replace(recipe, init="test_ann_resnet.best"), options(tmp_path / "out"))


def test_resuming_without_the_initial_weights_says_what_they_are_for(recipe: Recipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    save_model_folder(timm.create_model("test_ann_resnet", num_classes=4).eval(), start)
    tuned = replace(recipe, init=str(start))
    trainer = Trainer(tuned, options(tmp_path / "out"))
    trainer._must_stop = lambda: trainer.state.step == 2  # type: ignore[method-assign]
    assert trainer.run() == 0
    start.rename(tmp_path / "elsewhere")
    said = "expected the initial weights that this run began with, .*'.*start'.*; put them back where they were"
    with pytest.raises(ValueError, match=said):
        Trainer(tuned, options(tmp_path / "out", resume=True))
    (tmp_path / "elsewhere").rename(start)
    assert train(tuned, options(tmp_path / "out", resume=True)) == 0


def test_what_initial_weights_bring_is_recorded(recipe: Recipe, tmp_path: Path) -> None:
    """Model, gate and neuron of a spiking network, where the recipe names an ANN and plain neurons."""
    spiking = timm.create_model("test_gac_msresnet", num_classes=4, num_steps=2, gate="half", neuron="plif")
    save_model_folder(spiking, tmp_path / "start")
    tuned = replace(recipe, init=f"local-dir:{tmp_path / 'start'}", num_steps=2, epochs=1)
    trainer = Trainer(tuned, options(tmp_path / "run"))
    trainer.stop_signal = 15
    assert trainer.run() == 128 + 15
    assert train(tuned, options(tmp_path / "run", resume=True)) == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    for settings in (recorded, recorded["recipe"]):
        assert [settings[name] for name in ("model", "gate", "neuron")] == ["test_gac_msresnet", "half", "plif"]
    (row,) = csv.DictReader((tmp_path / "run" / "result.csv").open())
    assert row["model"] == "test_gac_msresnet"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gate="half"), r"gate='half', got test_ann_resnet, an ANN: leave --gate out"),
        (dict(neuron="plif"), "neuron='plif', got test_ann_resnet, an ANN: leave --neuron out"),
        (dict(num_steps=6), "num_steps=6, got test_ann_resnet, an ANN: leave --num-steps out"),
        (dict(gate_lr=0.1), r"gate_lr=0\.1, got test_ann_resnet, an ANN: leave --gate-lr out"),
        (dict(gate_decay=1.0), r"gate_decay=1\.0, got test_ann_resnet, an ANN: leave --gate-decay out"),
        (dict(neuron_lr=0.1), r"neuron_lr=0\.1, got test_ann_resnet, an ANN: leave --neuron-lr out"),
        (dict(tet_lambda=0.1), r"tet_lambda=0\.1, got test_ann_resnet, an ANN: leave --tet-lambda out"),
        (dict(pack_spikes=True), "pack_spikes=True, got test_ann_resnet, an ANN: give --no-pack-spikes"),
        (dict(int8_convs=True), "int8_convs=True, got test_ann_resnet, an ANN: give --no-int8-convs"),
        (dict(current_noise=0.1), "current_noise=0.1, got test_ann_resnet, an ANN: leave --current-noise out"),
    ],
)
def test_what_only_spiking_networks_have_is_refused(
    recipe: Recipe, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"expected a spiking network for {message}"):
        train(replace(recipe, **changes), options(tmp_path))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="adamw", lr=1e-3, clip_grad=1.0),
        dict(grad_accumulation=2, precision="bfloat16", report="model"),
        dict(sync_bn=True, drop_path_rate=0.2, channels_last=False),
    ],
)
def test_options_of_a_recipe_run(recipe: Recipe, tmp_path: Path, changes: dict) -> None:
    assert train(replace(recipe, epochs=2, **changes), options(tmp_path)) == 0
