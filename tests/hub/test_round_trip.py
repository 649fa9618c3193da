"""The whole way, with the real clients: train, publish, fetch in a fresh process, compare, verify, fine-tune."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loopback import WRITE_TOKEN, LoopbackHub, loopback_hub

pytest.importorskip("sklearn", reason="the round trip trains on scikit-learn's digits")
pytest.importorskip("accelerate", reason="the round trip trains with accelerate")

from timm_gac.cli.demo_config import DemoConfig
from timm_gac.cli.digits import create_demo_model, load_digits, run_demo
from timm_gac.hub import load_model

REPO = "me/gac-digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def run(arguments: list[str], hub: LoopbackHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the Hub's client set to the loopback server and an own cache, from before its first import."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    variables.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=280)


def test_train_publish_fetch_compare_verify_fine_tune(tmp_path: Path) -> None:
    assert create_demo_model(4).num_classes == 10
    trained = tmp_path / "digits"
    run_demo(DemoConfig(out=trained, epochs=2))
    images, labels = load_digits("test")[:16]
    with torch.no_grad():
        logits = load_model(trained)(images)
    expected = tmp_path / "expected.safetensors"
    save_file({"images": images, "labels": labels, "logits": logits}, expected)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))

    with loopback_hub() as hub:
        names = str(tmp_path / "names.txt")
        command = ["-m", "timm_gac.cli", "push", str(trained), "--repo-id", REPO, "--label-names", names]
        pushed = run(command, hub, tmp_path / "a", HF_TOKEN=WRITE_TOKEN)
        assert pushed.returncode == 0, pushed.stderr
        repository = hub.repositories[REPO]
        revision = repository.sha(len(repository.commits) - 1)
        files = set(repository.commits[-1])
        assert {"config.json", "model.safetensors", "golden.safetensors", "README.md", "demo.json"} < files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]

        child = str(Path(__file__).with_name("round_trip_child.py"))
        fetched = run([child, REPO, str(expected), revision], hub, tmp_path / "b")
        assert fetched.returncode == 0, fetched.stderr[-4000:]
        assert "timm\n" in fetched.stdout and "verified: me/gac-digits" in fetched.stdout
        for package in ("transformers", "segmentation_models_pytorch"):
            if importlib.util.find_spec(package):
                assert f"{package}\n" in fetched.stdout
        assert not [name for name in hub.downloads() if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        card = repository.commits[-1]["README.md"].decode()

    # The server is gone: the cache alone has to do, for the card's first snippet as for `verify`.
    snippet = re.findall(r"```python\n(.+?)```", card, re.DOTALL)[0]
    check = (
        f"from timm_gac import cli\nassert steps.shape == (1, 4, 10)\nraise SystemExit(cli.main(['verify', '{REPO}']))"
    )
    code = f"{snippet}\n{check}"
    offline = run(["-c", code], hub, tmp_path / "b", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr[-4000:]
    assert "verified" in offline.stdout
