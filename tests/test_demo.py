"""The demonstration, cut short: files, reload, and refusal to write over what it did not make."""

from __future__ import annotations

import json

import pytest
import timm
from safetensors import safe_open
from timm_gac import demo


def test_short_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "REQUIRED_ACCURACY", 0.3)
    out = tmp_path / "demo"
    demo.run_demo(demo.DemoConfig(out=out, epochs=3))
    result = json.loads((out / "demo.json").read_text())
    assert result["reload_equal"] and result["accuracy"] >= 0.3 and result["epochs"] == 3
    assert (out / "spikes.png").read_bytes().startswith(b"\x89PNG")
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    with safe_open(out / "model.safetensors", "pt") as stored:
        for name, value in model.state_dict().items():
            assert value.equal(stored.get_tensor(name)), name


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new, an empty or an earlier demo's folder"):
        demo.run_demo(demo.DemoConfig(out=tmp_path, epochs=1))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
