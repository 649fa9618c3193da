"""What cannot be written or is not installed is said before the work, not after it."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from timm_gac import cli

LATE = [
    ["demo", "--out", "OUT"],
    ["energy", "test_gac_msresnet", "--data", "digits", "--out", "OUT"],
    ["inspect", "test_gac_msresnet", "a.png", "--out", "OUT"],
    ["anytime", "test_gac_msresnet", "--data", "digits", "--out", "OUT"],
    ["eval", "test_gac_msresnet", "--data", "digits", "--json", "OUT/a.json"],
    ["gate", "test_gac_msresnet", "--data", "digits", "--json", "OUT/a.json"],
    ["predict", "a.png", "--model", "test_gac_msresnet", "--json", "OUT/a.json"],
    ["convert", "a.pth", "OUT"],
    ["quantize", "test_gac_msresnet", "OUT"],
]


@pytest.mark.parametrize("out", ["/proc/nowhere", "FILE/below"])
@pytest.mark.parametrize("arguments", LATE, ids=lambda arguments: arguments[0])
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list[str], out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_gac.hub.open_network", None)  # opening a network is work already
    monkeypatch.setattr("timm_gac.hub.convert_checkpoint", None)
    monkeypatch.setattr("timm_gac.cli.digits.train", None)
    (tmp_path / "file").touch()
    place = out.replace("FILE", str(tmp_path / "file"))
    assert cli.main([word.replace("OUT", place) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert "choose another" in error and error.count("\n") == 1 and [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("arguments", LATE[:4], ids=lambda arguments: arguments[0])
def test_a_missing_package_is_said_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_gac.hub.open_network", None)
    monkeypatch.setattr("timm_gac.cli.digits.train", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([word.replace("OUT", str(tmp_path / "out")) for word in arguments]) == 2
    assert "'matplotlib'" in (error := capsys.readouterr().err) and "pip install matplotlib" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "missing", "end"),
    [
        (
            ["demo"],
            ("matplotlib", "sklearn", "accelerate"),
            "packages 'matplotlib', 'sklearn', 'accelerate' for this, got none: "
            "pip install matplotlib scikit-learn accelerate\n",
        ),
        (["demo"], ("sklearn",), "package 'sklearn' for this, got none: pip install scikit-learn\n"),
        (
            ["export", "test_gac_msresnet", "a.onnx"],
            ("onnx", "onnxscript", "onnxruntime"),
            "packages 'onnx', 'onnxscript', 'onnxruntime' for this, got none: pip install \"timm-gac[export]\"\n",
        ),
    ],
    ids=["demo", "one", "extra"],
)
def test_all_missing_packages_are_named_at_once(
    given: list[str],
    missing: tuple[str, ...],
    end: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    monkeypatch.chdir(tmp_path)
    assert cli.main(given) == 2
    assert capsys.readouterr().err.endswith(end)


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    errors = capsys.readouterr().err
    # PyPI's name of the package: an extra of this one is no remedy outside of a clone.
    assert "expected scikit-learn" in errors and "pip install scikit-learn" in errors and "timm-gac[" not in errors
