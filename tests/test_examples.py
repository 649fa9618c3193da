"""The example scripts run as their users run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_gac  # noqa: F401 (registers the models)
from warm import WarmPython

ROOT = Path(__file__).parents[1]
# Runs a script from known random numbers: of unseeded runs, one in a few learns too late to be judged.
SEEDED = (
    "import runpy, sys, torch; torch.manual_seed(0); del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Handwritten zeros and ones as a folder of pictures."""
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    for label in (0, 1):
        for index, pixels in enumerate(images[labels == label][:48]):
            folder = tmp_path / "pictures" / ("train" if index < 32 else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            grey = (pixels.reshape(8, 8) * 15.9).astype("uint8")
            Image.fromarray(grey).convert("RGB").resize((32, 32)).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def few(digits: Path, tmp_path: Path) -> Path:
    """Two training pictures and one validation picture of each of these classes."""
    folder = tmp_path / "few"
    for picture in digits.glob("*/*/*.png"):
        if picture.stem in ("0", "1", "32"):
            target = folder / picture.relative_to(digits)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture.read_bytes())
    return folder


def test_finetune(digits: Path, warm_python: WarmPython, tmp_path: Path) -> None:
    script = ROOT / "examples" / "finetune.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80
    command = [
        "-c", SEEDED, str(script), str(digits), "--model", "test_gac_msresnet", "--epochs", "5",
        "--num-steps", "3", "--batch-size", "4", "--lr", "0.005", "--out", str(tmp_path / "tuned"),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = warm_python(command, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"saved in {tmp_path / 'tuned'}" in done.stdout
    shares = [float(share) for share in re.findall(r"top-1 ([\d.]+)% of 32", done.stdout)]
    assert len(shares) == 5 and shares[-1] > 70, done.stdout  # zeros and ones: a coin would get half of them
    model = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True)
    assert model.num_steps == 3 and model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["label_names"] == ["0", "1"]
    assert "test_gac_msresnet from random weights, classes 0, 1" in done.stdout
    assert not list((tmp_path / "tuned").glob("*.bin"))


def test_finetune_keeps_size_and_licence_of_weights(few: Path, warm_python: WarmPython, tmp_path: Path) -> None:
    """gac_msresnet18 without weights is a network for 224 pixels: what is saved must say how it was trained."""
    command = [
        str(ROOT / "examples" / "finetune.py"), str(few), "--model", "gac_msresnet18", "--pretrained",
        "--freeze", "--epochs", "1", "--num-steps", "2", "--batch-size", "2", "--out", str(tmp_path / "tuned"),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = warm_python(command, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["num_classes"] == 2 and config["label_names"] == ["0", "1"]
    published = timm.get_pretrained_cfg("gac_msresnet18.in293").to_dict()
    for key in ("input_size", "crop_pct", "license"):
        expected = published[key]
        assert config["pretrained_cfg"][key] == (list(expected) if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([], "expected a new folder as --out, got {out}, which is there: choose another"),
        (["nope"], "expected a folder of pictures, got nope: check the path"),
        (["--model", "nope"], "Unknown model (nope)"),
        (["--model", "local-dir:nope"], "Config file not found: nope/config.json"),
        (["--model", "ann_resnet18_cifar", "--pretrained"], "No pretrained weights exist for ann_resnet18_cifar"),
        (["--model", "test_ann_resnet", "--num-steps", "3"], "expected no num_steps for test_ann_resnet"),
    ],
    ids=["out", "folder", "model", "model folder", "weights", "steps"],
)
def test_finetune_says_what_is_wrong_in_one_line(
    changed: list[str], said: str, few: Path, warm_python: WarmPython, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    if not changed:
        out.mkdir()
    given = changed if changed == ["nope"] else [str(few), *changed]
    command = [str(ROOT / "examples" / "finetune.py"), *given, "--out", str(out)]
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = warm_python(command, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith(said.format(out=out)), done.stderr


@pytest.mark.parametrize(
    ("gone", "status", "said"),
    [
        ("train/1", 2, "expected val classes that train has, got 1 too: rename or remove these"),
        ("*/1", 2, "expected train pictures of two classes or more, got only 0: add another"),
        ("val/1", 0, "warning: val has no picture of 1, so top-1 says nothing of these"),
        ("val", 2, "expected the folders train and val in {folder}, got one or none of them: make both"),
    ],
)
def test_finetune_names_classes_of_one_set_alone(
    gone: str, status: int, said: str, few: Path, warm_python: WarmPython, tmp_path: Path
) -> None:
    for folder in list(few.glob(gone)):
        shutil.rmtree(folder)
    command = [
        str(ROOT / "examples" / "finetune.py"), str(few), "--model", "test_ann_resnet",
        "--epochs", "1", "--batch-size", "1", "--out", str(tmp_path / "tuned"),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = warm_python(command, env=env)
    assert done.returncode == status, done.stderr[-2000:]
    assert said.format(folder=few) in (done.stderr if status else done.stdout).splitlines()
    assert (tmp_path / "tuned").exists() == (status == 0)


def test_finetune_an_ann(few: Path, warm_python: WarmPython, tmp_path: Path) -> None:
    """It has no time steps to be told, nor to be stored."""
    command = [
        str(ROOT / "examples" / "finetune.py"), str(few), "--model", "test_ann_resnet",
        "--epochs", "1", "--batch-size", "2", "--out", str(tmp_path / "tuned"),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = warm_python(command, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    model = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True)
    assert type(model).__name__ == "ANNResNet" and model.num_classes == 2


def test_own_neuron() -> None:
    """It passes its checks in plain PyTorch, or on a GPU in Triton too, and learns; its page shows the same code."""
    script = ROOT / "examples" / "own_neuron.py"
    text = script.read_text(encoding="utf-8")
    page = (ROOT / "docs" / "your_own_neuron.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 3 and all(block.rstrip() in text for block in shown[:2])
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert "agree with their definitions" in done.stdout and losses[1] < 0.7 * losses[0], done.stdout
