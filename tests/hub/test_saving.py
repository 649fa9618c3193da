"""What was saved is what loads: every argument, the licence, and networks that cannot be rebuilt are refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import SafetensorError
from torch import nn

import timm_gac
from timm_gac.hub import PublishConfig, load_model, open_network, prepare_folder, save_model_folder, save_quantized
from warm import WarmPython

KILLED = """
import os, signal, sys, timm
from pathlib import Path
from timm_gac.hub import PublishConfig, folder, prepare
name = {"save": "check_config", "publish": "write_golden"}[sys.argv[1]]
where = {"save": folder, "publish": prepare}[sys.argv[1]]
setattr(where, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
if sys.argv[1] == "save":
    folder.save_model_folder(timm.create_model("test_gac_msresnet"), Path(sys.argv[2]))
prepare.prepare_folder(Path(sys.argv[3]), Path(sys.argv[2]), PublishConfig("org/name"))
"""
TERMS = {"license": "other", "license_name": "my-terms", "license_link": "https://example.org/terms"}


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "max"},
        {"global_pool": "catavgmax", "drop_rate": 0.25, "drop_path_rate": 0.1},
        {"in_chans": 1, "num_steps": 3, "stem_kernel": 7, "encoder": "direct"},
        {"layers": (1, 2, 1), "channels": (16, 24, 32), "strides": (1, 1, 2), "stem_width": 8, "block": "SpikingBlock"},
        {"spec": timm_gac.IMAGENET, "scaled_init": True},
        {"num_classes": 0},
    ],
)
@pytest.mark.parametrize("save", [save_model_folder, save_quantized])
def test_every_argument_survives(options: dict[str, Any], save: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", **{"num_classes": 3} | options)
    images = torch.randn(4, model.in_chans, 32, 32)
    with torch.no_grad():
        for _ in range(5):
            model(images)
        model.eval()
        loaded = load_model(save(model, tmp_path / "saved"))
        expected = model if save is save_model_folder else timm_gac.quantize(model)
        assert loaded.model_args() == model.model_args()
        torch.testing.assert_close(loaded(images), expected(images))
    again = load_model(save_model_folder(loaded, tmp_path / "again"))
    assert again.model_args() == model.model_args()


def test_networks_that_a_folder_cannot_rebuild_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=3).eval()
    changed = timm.create_model("test_gac_msresnet", num_classes=3)
    changed.fc = nn.Sequential(changed.fc)
    broken = timm.create_model("test_gac_msresnet", num_classes=3)
    broken.conv1.weight.data[0] = torch.nan
    for network, message in (
        (timm_gac.fuse_for_inference(model), "got one that is folded"),
        (changed, "expected a network as timm.create_model builds it, got one with another 'fc"),
        (broken, "expected finite weights to save, got NaN, infinity or a negative variance in conv1.weight"),
        (nn.Linear(2, 2), "expected a network made by timm.create_model, of this package, got Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model_folder(network, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_licence_goes_along(
    make_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model_folder(load_model(make_folder(tmp_path / "own")), tmp_path / "terms", **TERMS)
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    assert "my-terms, https://example.org/terms" in caplog.text
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg["license"] == "other"
    for made in (save_model_folder(model, tmp_path / "again"), save_quantized(model, tmp_path / "int8")):
        config = json.loads((made / "config.json").read_text())
        assert {key: config.get(key) for key in ("license_name", "license_link")} == {
            key: TERMS[key] for key in ("license_name", "license_link")
        }
        assert config["pretrained_cfg"]["license"] == "other"
    prepare_folder(folder, tmp_path / "push", PublishConfig("me/x", dry_run=True))
    card = (tmp_path / "push" / "README.md").read_text()
    assert all(f"{key}: {value}" in card for key, value in TERMS.items()) and "[my-terms](https://example.org" in card
    assert json.loads((tmp_path / "push" / "config.json").read_text())["license_name"] == "my-terms"
    prepare_folder(folder, tmp_path / "mit", PublishConfig("me/x", dry_run=True, license="mit"))
    assert "my-terms" not in (tmp_path / "mit" / "README.md").read_text()
    assert "license_name" not in json.loads((tmp_path / "mit" / "config.json").read_text())


def test_a_run_folder_opens_whatever_lies_beside_the_model(model_folder: Path, tmp_path: Path) -> None:
    """A run's own config.json, a recipe, has no architecture."""
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "test_gac_msresnet", "epochs": 1}))
    for source in (tmp_path / "run", tmp_path / "run" / "model"):
        assert open_network(str(source)).label_names == ()
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text()) | {"label_names": ["a", "b", "c"]}
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(config))
    assert open_network(str(tmp_path / "run")).label_names == ("a", "b", "c")


def test_untrained_network_names_its_published_weights() -> None:
    opened = open_network("gac_msresnet34")
    with pytest.raises(ValueError, match=r"such as gac_msresnet34\.in293 or gac_msresnet34\.tiny_imagenet, or a model"):
        opened.require_trained()


def test_a_full_disk_is_an_os_error_and_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own, which no command expects."""
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    save_model_folder(model, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("timm_gac.hub.folder.save_for_hf", full)
    with pytest.raises(OSError, match=r"model folder .*saved not written .*No space left.*: free some space") as caught:
        save_model_folder(timm.create_model("test_gac_msresnet", num_classes=2), tmp_path / "saved")
    assert caught.value.errno == 28
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.skipif(os.name != "posix", reason="signals and locks are POSIX's")
@pytest.mark.parametrize("killed", ["save", "publish"])
def test_what_a_kill_leaves_beside_a_folder_goes_with_the_next_try(
    killed: str, model_folder: Path, warm_python: WarmPython, tmp_path: Path
) -> None:
    def write() -> None:
        if killed == "save":
            save_model_folder(timm.create_model("test_gac_msresnet"), tmp_path / "out")
        else:
            prepare_folder(model_folder, tmp_path / "out", PublishConfig("org/name"))

    assert warm_python(["-c", KILLED, killed, str(tmp_path / "out"), str(model_folder)]).returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert any(file.name == "config.json" for file in leftover.iterdir())
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["test_gac_msresnet", "test_ann_resnet"])
def test_numbers_of_numpy_are_stored(name: str, tmp_path: Path) -> None:
    steps = {} if "ann" in name else {"num_steps": np.int64(3)}
    model: Any = timm.create_model(
        name, num_classes=np.int64(5), in_chans=np.int32(2), drop_rate=np.float32(0.5), **steps
    )
    folder = save_model_folder(model, tmp_path / "first")
    assert json.loads((folder / "config.json").read_bytes())["num_classes"] == 5
    model.reset_classifier(np.int64(7) if steps else 7)  # that of the ANN is timm's own
    loaded: Any = load_model(save_model_folder(model, tmp_path / "second"))
    assert (loaded.num_classes, loaded.in_chans, loaded.drop_rate) == (7, 2, 0.5)


def test_a_network_opens_by_a_path_and_on_the_device_that_is_there(model_folder: Path) -> None:
    opened = open_network(model_folder, device="auto")
    assert opened.network.conv1.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    for arguments, message in (
        ({"device": "nothing"}, "expected a device of this machine, got 'nothing'"),
        ({"seed": 2**64}, "expected seed as an integer"),
        ({"seed": None}, "expected seed as an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            open_network(model_folder, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected model as a name or a path, got 3"):
        open_network(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("file", {}, "expected a folder for the model, got .*file', a file or below one"),
        ("file/model", {}, "expected a folder for the model, got .*model', a file or below one"),
        ("new", {"model_args": ["num_steps"]}, "expected model_args as a dict, got"),
    ],
)
def test_where_nothing_can_be_saved(name, changes, message, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        save_model_folder(timm.create_model("test_gac_msresnet"), tmp_path / name, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
