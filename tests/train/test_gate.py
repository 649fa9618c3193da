"""The gate by epoch: what a run writes, what it warns of, and that watching changes nothing of the run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from gac_kernels import LIFSpec
from timm_gac.analysis.gate import GateStatistics, gate_statistics
from timm_gac.hub import PublishConfig, calibrate, prepare_folder, save_model_folder
from timm_gac.layers.encoder import ConstantScore, DirectCoding, GatedAttentionCoding
from timm_gac.train import Recipe, run
from timm_gac.train.gate import COLUMNS, FirstKept, measure_gate, watch_gate
from timm_gac.train.loop import Trainer, train
from toy_runs import options, same, weights

pytest.importorskip("matplotlib", reason="draws with matplotlib")


@pytest.fixture
def recipe(npz: Path) -> Recipe:
    return Recipe(
        model="test_gac_msresnet",
        num_steps=2,
        data=str(npz),
        dataset="toy",
        epochs=3,
        batch_size=16,
        lr=0.05,
        warmup_epochs=1,
        ema_decay=0.9,
        report="ema",
        drop_rate=0.1,
        current_noise=0.1,
        crop_padding=1,
        eval_every=1,
        stored_dtype="float32",
    )


def network(**arguments) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=3, **arguments)
    return calibrate(model, [torch.randn(8, 3, 16, 16)])


def table(out: Path) -> list[dict[str, str]]:
    with (out / "gate.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_last_row_is_the_gate_of_the_network_that_is_stored(recipe: Recipe, tmp_path: Path):
    """The moving average, which is evaluated too; its 17 images are measured in two parts."""
    trainer = Trainer(recipe, options(tmp_path))
    assert trainer.run() == 0
    rows = table(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and list(rows[0]) == ["epoch", *COLUMNS]
    images = torch.cat([part for part, _ in trainer.state.loaders.test.batches(0)])
    stored = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    found = gate_statistics(stored, [images])
    assert found.images == 17
    for name in COLUMNS:
        assert float(rows[-1][name]) == pytest.approx(getattr(found, name), rel=1e-4, abs=1e-6), name
    assert (tmp_path / "gate.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_run_wrote_by_epoch_is_published_and_the_card_shows_it(recipe: Recipe, tmp_path: Path):
    folder, out = tmp_path / "run", tmp_path / "out"
    assert train(replace(recipe, epochs=1, warmup_epochs=0), options(folder)) == 0
    save_model_folder(network(), folder / "model")  # its neurons fire; after so few steps the trained ones hardly do
    written = {file.name for file in folder.iterdir() if file.suffix in (".csv", ".png")}
    assert {"gate.csv", "gate.png", "firing_rates.csv", "firing_rates.png", "metrics.csv", "curve.png"} <= written
    published = {file.name for file in prepare_folder(folder, out, PublishConfig(repo_id="org/gate"))}
    card = (out / "README.md").read_text()
    written.remove("result.csv")  # a row for tables of several runs
    assert written - published == set()
    for name in written:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
        assert f"({name})" in card, name


def test_a_run_that_is_watched_is_bit_for_bit_the_same(recipe: Recipe, tmp_path: Path, monkeypatch):
    def metrics(out: Path) -> list[dict[str, str]]:
        with (out / "metrics.csv").open(newline="") as stream:
            return [
                {name: x for name, x in row.items() if name not in ("images_per_s", "minutes")}
                for row in csv.DictReader(stream)
            ]

    train(recipe, options(tmp_path / "watched"))
    monkeypatch.setattr(run, "measure_gate", lambda network, images: None)
    train(recipe, options(tmp_path / "alone"))
    assert same(weights(tmp_path / "watched"), weights(tmp_path / "alone"))
    assert metrics(tmp_path / "watched") == metrics(tmp_path / "alone")
    assert not (tmp_path / "alone" / "gate.csv").exists()


def test_a_resumed_run_has_the_table_of_one_that_was_not_stopped(recipe: Recipe, tmp_path: Path):
    train(recipe, options(tmp_path / "whole"))
    trainer = Trainer(recipe, options(tmp_path / "parts", checkpoint_steps=100))
    trainer._must_stop = lambda: trainer.state.step == 6
    trainer.run()
    assert len(table(tmp_path / "parts")) == 1
    train(recipe, options(tmp_path / "parts", resume=True))
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


class Own(nn.Module):
    """An encoder of one's own."""

    def forward(self, stem: torch.Tensor) -> torch.Tensor:
        return stem.sigmoid().expand(2, *stem.shape)


@pytest.mark.parametrize("encoder", ["half", "open", "direct", "own"])
def test_without_a_learned_gate_there_is_no_file(recipe: Recipe, tmp_path: Path, encoder: str):
    recipe = replace(recipe, gate=encoder if encoder in ("half", "open") else "full", ema_decay=0.0, report="model")
    trainer = Trainer(recipe, options(tmp_path))
    if encoder in ("direct", "own"):
        trainer.state.network.encoder = DirectCoding(2) if encoder == "direct" else Own()
    trainer._must_stop = lambda: trainer.state.step == 4
    trainer._save = lambda: None
    assert trainer.run() == 0
    assert (tmp_path / "firing_rates.csv").exists() and not [*tmp_path.glob("gate.*")]


def test_only_the_first_images_are_kept_and_no_batch_is_asked_for_twice():
    batches = [(torch.full((6, 1), float(index)), torch.arange(6)) for index in range(3)]
    kept = FirstKept(iter(batches), 4)
    assert [images[0, 0].item() for images, _ in kept] == [0, 1, 2]
    assert torch.equal(kept.images, torch.zeros(4, 1))
    several = FirstKept(iter(batches), 14)
    assert several.images is None and len([*several]) == 3
    assert torch.equal(several.images, torch.tensor([0.0] * 6 + [1.0] * 6 + [2.0] * 2)[:, None])
    none = FirstKept(iter(batches), 0)
    assert len([*none]) == 3 and none.images is None


def test_modes_and_random_numbers_stay_as_they_were():
    model = network().train()
    model.conv1.eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = measure_gate(model, torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert found.images == 5 and torch.equal(torch.get_rng_state(), state)
    assert model.training and model.bn1.training and not model.conv1.training
    assert measure_gate(model, torch.randn(1, 3, 16, 16)) is None and measure_gate(model, None) is None


@pytest.mark.parametrize("neuron", ["plif", "ternary", "integer", "adaptive"])
def test_other_neurons_have_a_gate_too(neuron: str):
    found = measure_gate(network(neuron=neuron), torch.randn(4, 3, 16, 16))
    assert 0 < found.mean < 1 and found.std > 0
    assert (found.firing_level is None) == (found.above_level is None) == (neuron != "plif")


def test_event_frames():
    frames = torch.randn(20, 4, 3, 16, 16)
    found = measure_gate(network(), frames)
    assert found.images == 20 and 0 < found.between_images < 1 and len(found.temporal) == 4


class Scaled(nn.Module):
    """A score many times as large."""

    def __init__(self, score: nn.Module, factor: float) -> None:
        super().__init__()
        self.score, self.factor = score, factor

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.score(*inputs) * self.factor


def test_gates_that_ran_away_or_died_are_warned_of_once(tmp_path: Path):
    recipe, images = Recipe(), torch.randn(8, 3, 16, 16)
    model = network()
    healthy = measure_gate(model, images)
    assert watch_gate(tmp_path, 1, healthy, recipe) == []
    spatial = model.encoder.spatial
    model.encoder.spatial = Scaled(spatial, 1e6)
    ran_away = measure_gate(model, images)
    (line,) = watch_gate(tmp_path, 2, ran_away, recipe)
    assert line.startswith(f"warning: {ran_away.shut:.1%} of the gate is shut (under 0.01)")
    assert "try --gate-lr 0.1, --gate-decay 1, --gate spatial, or direct coding" in line
    assert watch_gate(tmp_path, 3, ran_away, recipe) == []
    model.encoder.spatial = Scaled(spatial, 0.0)
    died = measure_gate(model, images)
    assert died.mean == 0.5 and died.std == died.between_images == 0
    (line,) = watch_gate(tmp_path, 4, died, recipe)
    assert line.startswith("warning: the gate is the same for all images, 0.50 on average")
    assert "try --gate-lr 0.1, --gate spatial, or direct coding" in line
    for epoch, gate in ((5, died), (6, healthy), (7, died), (8, ran_away)):
        assert watch_gate(tmp_path, epoch, gate, recipe) == []
    assert len(watch_gate(tmp_path, 4, died, recipe)) == 1  # resumed before it was told
    assert [row["epoch"] for row in table(tmp_path)] == ["1", "2", "3", "4"]


def test_a_mask_of_channels_that_is_not_saturated_is_a_constant_too(tmp_path: Path):
    model = network()

    class Channels(nn.Module):
        def forward(self, stem: torch.Tensor) -> torch.Tensor:
            return torch.linspace(-1, 1, stem.shape[1])[:, None, None].expand_as(stem)

    model.encoder.temporal, model.encoder.spatial = ConstantScore(1.0), Channels()
    assert measure_gate(model, torch.randn(8, 3, 16, 16)) is None  # nothing of it is learned
    found = gate_statistics(model, [torch.randn(8, 3, 16, 16)])
    assert found.std > 0.1 and found.between_images < 1e-9
    tuned = Recipe(gate="spatial", gate_lr=0.1, gate_decay=0.5)
    (line,) = watch_gate(tmp_path, 1, found, tuned)
    assert "in a new run try --gate-decay 0, or direct coding" in line
    (line,) = watch_gate(tmp_path / "other", 1, replace(found, shut=0.5, open=0.495), replace(tuned, gate_decay=1.0))
    assert line.endswith("in a new run try direct coding, a model without gac_ in its name")


def test_a_gate_that_is_not_finite_is_no_constant_one(tmp_path: Path):
    """And hides no warning of a later one that is constant."""
    images = torch.randn(8, 3, 16, 16)
    broken, constant = network(), network()
    nn.init.constant_(broken.encoder.spatial.conv_b.weight, float("nan"))
    nn.init.zeros_(constant.encoder.spatial.conv_b.weight)
    found = measure_gate(broken, images)
    assert math.isnan(found.mean) and math.isnan(found.std) and math.isnan(found.between_images)
    assert watch_gate(tmp_path, 1, found, Recipe()) == []
    assert table(tmp_path)[0]["std"] == "nan"
    assert len(watch_gate(tmp_path, 2, measure_gate(constant, images), Recipe())) == 1


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda text: b"", ["3"]),
        (lambda text: text + b"\r\n", ["1", "2", "3"]),
        (lambda text: text[:-30], ["1", "3"]),
        (lambda text: text + b"2,0.5\r\n", ["1", "2", "3"]),
        (lambda text: text.replace(b"2,", b"two,"), ["1", "3"]),
        (lambda text: b"epoch,mean\r\n1,0.5\r\n", ["3"]),
        (lambda text: b"\xff\xfe" + text, ["3"]),
        (lambda text: text + b'"' + b"1" * 200_000, ["3"]),
    ],
    ids=["empty", "line", "cut", "short", "word", "columns", "bytes", "field"],
)
def test_a_damaged_table_costs_rows_and_not_the_run(tmp_path: Path, damage: Callable[[bytes], bytes], kept: list[str]):
    gate = measure_gate(network(), torch.randn(8, 3, 16, 16))
    for epoch in (1, 2):
        watch_gate(tmp_path, epoch, replace(gate, mean=0.25, temporal=()), Recipe())
    file = tmp_path / "gate.csv"
    file.write_bytes(damage(file.read_bytes()))
    assert watch_gate(tmp_path, 3, gate, Recipe()) == []
    assert [row["epoch"] for row in table(tmp_path)] == kept


class Foreign(nn.Module):
    """A network that is not of this package, with its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = GatedAttentionCoding(3, 2, LIFSpec())

    def forward_intermediates(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]


def test_a_network_of_ones_own_is_not_measured():
    """Its `forward_intermediates` may take other arguments, and run no encoder."""
    assert measure_gate(Foreign(), torch.randn(8, 3, 16, 16)) is None


def test_the_trainer_says_it(recipe: Recipe, tmp_path: Path, monkeypatch, capsys):
    def collapsed(network: nn.Module, images: torch.Tensor) -> GateStatistics:
        return replace(gate_statistics(network.eval(), [images]), std=0.0)

    monkeypatch.setattr(run, "measure_gate", collapsed)
    train(recipe, options(tmp_path))
    assert capsys.readouterr().out.count("warning: the gate is the same for all images") == 1
