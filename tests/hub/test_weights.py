"""The published weights in hub/models: they load offline by name, are what they were, and read pictures."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_gac  # noqa: F401 (registers the models)
from timm_gac.hub import verify
from warm import WarmPython

ROOT = Path(__file__).parents[2]
NAMES = (
    *("gac_msresnet18_cifar.cifar100", "msresnet18_cifar.cifar100"),
    *("gac_msresnet34.in293", "gac_msresnet34.tiny_imagenet", "gac_msresnet18.in293"),
)
PARTS = ROOT.parent / "shared" / "data" / "cifar100"
CHILD = """
import sys, timm, timm_gac
try:
    timm.create_model("gac_msresnet18_cifar.cifar100", pretrained=True)
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("name", NAMES)
def test_golden_output_and_report(name: str) -> None:
    folder = ROOT / "hub" / "models" / name
    assert verify(folder).passed
    report = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    with (ROOT / "results" / "training.csv").open(newline="", encoding="utf-8") as stream:
        runs = [row for row in csv.DictReader(stream) if f"{row['model']}.{row['dataset']}" == name]
    assert any(float(run["top1"]) == pytest.approx(report["top1"], abs=5e-5) for run in runs)
    assert f"value: {100 * report['top1']:.2f}" in (folder / "README.md").read_text(encoding="utf-8")
    assert f"{report['top1']:.2%}".replace("%", " %") in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_as_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in float32, though the weights are stored as float16."""
    folder = ROOT / "hub" / "models" / name
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    # A torchaudio built for another CUDA than torch makes transformers unimportable; no model here needs it.
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    transformers = pytest.importorskip("transformers", minversion="5")
    images = load_file(folder / "golden.safetensors")["input"].float()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = theirs(pixel_values=images).logits
        assert logits.dtype == torch.float32
        assert torch.equal(logits, ours(images))


def test_photographs_have_classes_and_terms(caplog: pytest.LogCaptureFixture) -> None:
    """Untrained, the model has ImageNet's 1000 classes; trained, those of its weights, whose terms loading tells."""
    untrained = timm.create_model("gac_msresnet34")
    assert untrained.num_classes == 1000 and sum(value.numel() for value in untrained.parameters()) == 21_932_984
    assert untrained.pretrained_cfg["input_size"] == (3, 224, 224)
    assert not caplog.records
    for name, classes in (("gac_msresnet34", 293), ("gac_msresnet34.tiny_imagenet", 200)):
        caplog.clear()
        model = timm.create_model(name, pretrained=True)
        cfg = model.pretrained_cfg
        assert model.num_classes == len(cfg["label_names"]) == classes and cfg["license"] == "other"
        assert "n02124075 Egyptian cat" in cfg["label_names"]
        assert "not commercial" in caplog.text
    caplog.clear()
    other = timm.create_model("gac_msresnet34", pretrained=True, num_classes=10)
    assert other.num_classes == 10 and not other.pretrained_cfg.get("label_names")
    folder = ROOT / "hub" / "models" / "gac_msresnet34.in293"
    assert "license: other" in (folder / "README.md").read_text(encoding="utf-8")
    assert not [file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".webp")]


def test_reads_pictures() -> None:
    """Fifty pictures of the test set's first sheet; its classes come in order."""
    if not PARTS.is_dir():
        pytest.skip(f"the CIFAR-100 sheets are not in {PARTS}")
    files = {}
    for part in sorted(PARTS.glob("part*.tar")):
        with tarfile.open(part) as archive:
            for member in archive.getmembers():
                if member.name == "labels.npz" or member.name.startswith("test_"):
                    content = archive.extractfile(member)
                    assert content is not None
                    files[member.name] = content.read()
    labels = torch.from_numpy(np.load(io.BytesIO(files["labels.npz"]))["y_test"][:1000:20].astype(np.int64))
    sheet = Image.open(io.BytesIO(files[min(name for name in files if name.startswith("test_"))])).convert("RGB")
    tiles = np.asarray(sheet).reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)[::20]
    model = timm.create_model(NAMES[0], pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in ((torch.tensor(tiles) / 255 - mean) / std).split(25)])
    assert (answers == labels).float().mean() > 0.75


def test_from_a_wheel_without_connection(warm_python: WarmPython, tmp_path: Path) -> None:
    """Outside of a clone a sentence says at once where the weights are; a folder of model folders serves them."""
    for package in (ROOT / "timm_gac", ROOT / "kernels" / "torch-ext" / "gac_kernels"):
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"}
    done = warm_python(["-c", CHILD], env=env, cwd=tmp_path)
    assert done.returncode == 1
    assert "expected weights of gac_msresnet18_cifar.cifar100 on this machine, got none" in done.stderr, done.stderr
    assert "set TIMM_GAC_MODELS to its hub/models" in done.stderr
    done = warm_python(["-c", CHILD], env=env | {"TIMM_GAC_MODELS": str(ROOT / "hub" / "models")}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1000:]


def test_tracked_tree_stays_small() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 300 * 2**20
