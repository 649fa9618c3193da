"""Names of classes: published weights bring them, from the config.json beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from timm_gac.models import weights

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": NAMES}))
    return tmp_path


def opened(folder: Path, **options: object) -> object:
    overlay = dict(file=str(folder / "model.safetensors"), num_classes=3)
    return timm.create_model("test_gac_msresnet", pretrained=True, pretrained_cfg_overlay=overlay, **options)


def test_a_file_has_them_beside_it(stored: Path) -> None:
    model = opened(stored)
    assert model.pretrained_cfg["label_names"] == model.default_cfg["label_names"] == NAMES
    assert not opened(stored, num_classes=5).pretrained_cfg.get("label_names")
    features = opened(stored, features_only=True)  # no classes, so no names
    assert not features.pretrained_cfg.get("label_names")
    model.reset_classifier(3)
    assert "label_names" not in model.pretrained_cfg


@pytest.mark.parametrize("config", ["", "[1]", "{}", '{"label_names": "abc"}', '{"label_names": [1, 2, 3]}', "\xff"])
def test_weights_load_beside_a_damaged_config(stored: Path, config: str) -> None:
    (stored / "config.json").write_bytes(config.encode("latin1"))
    assert not opened(stored).pretrained_cfg.get("label_names")


def test_the_hub_has_them_beside_the_weights(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(stored / name)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    model = timm.create_model("test_gac_msresnet", num_classes=3)
    published = {"hf_hub_id": "timm-gac/x", "tag": "t"}
    model.pretrained_cfg = model.pretrained_cfg | published
    weights.describe_weights(model)
    assert model.pretrained_cfg["label_names"] == NAMES and asked == [("timm-gac/x", "config.json")]
    # Neither a folder, nor where it is not reachable.
    asked.clear()
    model.pretrained_cfg = published | {"source": "local-dir"}
    weights.describe_weights(model)
    assert asked == [] and "label_names" not in model.pretrained_cfg

    def offline(repository: str, name: str) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(weights, "hf_hub_download", offline)
    model.pretrained_cfg = published
    weights.describe_weights(model)
    assert "label_names" not in model.pretrained_cfg
