"""The demonstration, shortened: what it writes, what it checks, and whose files it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file

from timm_gac.cli import digits
from timm_gac.cli.demo_config import DemoConfig
from timm_gac.cli.digits import create_demo_model, load_digits, run_demo, shift
from timm_gac.cli.evaluate import EvaluateConfig, run_evaluate
from timm_gac.data import open_test_set
from timm_gac.inference.record import record_spikes

# One epoch is far from enough for the 95 %: the status says so.
SHORT = {"epochs": 1, "num_steps": 3, "batch_size": 256}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    out = tmp_path_factory.mktemp("demo") / "made"
    console = Console(record=True, width=100, quiet=True)
    status = run_demo(DemoConfig(out=out, **SHORT), console)
    return out, status, console.export_text()


def test_files_and_result(finished: tuple[Path, int, str]) -> None:
    out, status, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "demo.json",
        "model.safetensors",
        "spikes.png",
    ]
    result = json.loads((out / "demo.json").read_text())
    assert status == (0 if result["accuracy"] >= 0.95 else 1)
    assert result["reload_equal"] is True and result["num_steps"] == 3 and result["test_digits"] == 360
    assert set(result["firing_rates"]) >= {"encoder", "lif", "layer1.0.bn1", "layer3.0.bn2"}
    assert all(0 <= rate <= 1 for rate in result["firing_rates"].values()) and result["firing_rates"]["encoder"] > 0


def test_reload_rebuilds_the_network_from_the_folder_alone(finished: tuple[Path, int, str]) -> None:
    out, _, _ = finished
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"]["num_steps"] == 3 and config["model_args"]["in_chans"] == 1
    assert "num_classes" not in config["model_args"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert (model.num_steps, model.num_classes, model.conv1.in_channels) == (3, 10, 1)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 8, 8)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    images, labels = load_digits("test").tensors
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(json.loads((out / "demo.json").read_text())["accuracy"])


def test_raster_is_a_picture_with_content(finished: tuple[Path, int, str]) -> None:
    pixels = imread(finished[0] / "spikes.png")[..., :3]
    assert min(pixels.shape[:2]) > 500 and pixels.std() > 0.1


def test_runs_again_over_its_own_folder_only(finished: tuple[Path, int, str], tmp_path: Path) -> None:
    digits.check_folder(finished[0], overwrite=False)
    digits.check_folder(tmp_path, overwrite=False)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        run_demo(DemoConfig(out=tmp_path))
    with pytest.raises(ValueError, match="file"):
        digits.check_folder(tmp_path / "thesis.tex", overwrite=True)
    digits.check_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_eval_has_the_digits_that_the_demonstration_tests(finished: tuple[Path, int, str]) -> None:
    """`eval demo --data digits` is the next command of the documentation: not a digit of training is in it."""
    config = EvaluateConfig(data="digits", device="cpu", fold=False)
    result = run_evaluate(str(finished[0]), config, Console(quiet=True))
    demo = json.loads((finished[0] / "demo.json").read_text())
    assert (result.images, result.top1) == (demo["test_digits"], pytest.approx(demo["accuracy"]))
    cfg = create_demo_model(1).pretrained_cfg
    seen = torch.cat([images for images, _ in open_test_set("digits", cfg, num_classes=10).batches(0)])
    assert torch.equal(seen, load_digits("test").tensors[0])


def test_status_tells_of_other_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    create, quiet = timm.create_model, Console(quiet=True)
    monkeypatch.setattr(digits, "train", lambda model, *_: model.eval())
    monkeypatch.setattr(digits, "REQUIRED_ACCURACY", 0.0)
    monkeypatch.setattr(digits, "draw_raster", lambda *_: tmp_path)
    assert run_demo(DemoConfig(out=tmp_path / "same"), quiet) == 0

    def create_another(name: str, **options: Any) -> torch.nn.Module:
        model = create(name, **options)
        with torch.no_grad():
            model.fc.bias.add_(0.01)
        return model

    monkeypatch.setattr(timm, "create_model", create_another)
    assert run_demo(DemoConfig(out=tmp_path / "other"), quiet) == 1


def test_split_has_all_classes_and_is_disjoint() -> None:
    (train_images, train_labels), (test_images, test_labels) = (
        load_digits(split).tensors for split in ("train", "test")
    )
    assert (len(train_images), len(test_images)) == (1437, 360)
    assert train_images.min() == -1 and train_images.max() == pytest.approx(1)
    assert test_labels.bincount().min() >= 26 and train_labels.bincount().min() >= 126
    seen = {image.numpy().tobytes() for image in train_images}
    assert not [1 for image in test_images if image.numpy().tobytes() in seen]


def test_shift_moves_by_at_most_one_pixel() -> None:
    image = torch.full((64, 1, 8, 8), -1.0)
    image[:, 0, 3, 4] = 1.0
    moved = shift(image)
    assert moved.shape == image.shape and (moved == 1).sum() == 64
    rows, columns = (moved == 1).nonzero()[:, 2], (moved == 1).nonzero()[:, 3]
    assert set(rows.tolist()) == {2, 3, 4} and set(columns.tolist()) == {3, 4, 5}


def test_recorded_spikes_are_binary_and_hooks_are_removed() -> None:
    model = create_demo_model(2).eval()
    with record_spikes(model) as recording, torch.no_grad():
        model(torch.randn(3, 1, 8, 8))
    assert all(spikes.shape[0] == 6 for spikes in recording.spikes.values())
    for name, spikes in recording.spikes.items():
        assert name == "encoder" or set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert not any(module._forward_hooks for module in model.modules())
