"""Golden tensors: they pass for the weights they were made with, and fail for anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from timm_gac import cli
from timm_gac.hub import load_model, verify, write_golden
from timm_gac.hub.golden import WEIGHTS_SHA, golden_images, sha256


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder with golden tensors."""
    shutil.copytree(model_folder, tmp_path / "folder")
    write_golden(tmp_path / "folder")
    return tmp_path / "folder"


def change(file: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]], metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file(how(safetensors.torch.load_file(file)), file, metadata)


def test_verify_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(folder)
    assert result.passed and result.difference < 1e-9 and result.images == 4 and result.same_classes
    assert cli.main(["verify", str(folder)]) == 0
    assert "verified" in capsys.readouterr().out


def test_images_are_repeatable_and_differ() -> None:
    images = golden_images((3, 16, 16))
    assert torch.equal(images, golden_images((3, 16, 16)))
    assert images.std() > 0.5 and (images[0] - images[1]).abs().max() > 0.5


@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn1.running_mean", "layer3.0.conv2.weight", "fc.bias"])
def test_a_changed_weight_fails_even_with_its_checksum(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, golden = folder / "model.safetensors", folder / "golden.safetensors"
    change(weights, lambda tensors: tensors | {name: tensors[name] + 0.05}, {"format": "pt"})
    assert not verify(folder).passed and not verify(folder).same_weights
    change(golden, lambda tensors: tensors, {WEIGHTS_SHA: sha256(weights)})
    result = verify(folder)
    assert result.same_weights and result.difference > 1e-4 and not result.passed
    assert cli.main(["verify", str(folder)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_nan_fails(folder: Path) -> None:
    digest = {WEIGHTS_SHA: sha256(folder / "model.safetensors")}
    change(folder / "golden.safetensors", lambda tensors: tensors | {"output": tensors["output"] * torch.nan}, digest)
    assert not verify(folder).passed


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.bn1.running_var", "fc.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(name: str, value: float, folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].flatten()[0] = value
        return tensors

    change(folder / "model.safetensors", spoil, {"format": "pt"})
    for use in (load_model, verify, write_golden):
        with pytest.raises(ValueError, match=rf"expected finite weights in .* in {name}"):
            use(folder)


@pytest.mark.parametrize("shape", [(17, 3, 32, 32), (4, 3, 500, 500), (0, 3, 32, 32)])
def test_golden_images_are_few_and_of_the_configs_size(shape: tuple[int, ...], folder: Path) -> None:
    images = {"input": torch.zeros(shape), "output": torch.zeros(len(torch.empty(shape)), 3)}
    change(folder / "golden.safetensors", lambda tensors: images, None)
    with pytest.raises(ValueError, match=r"expected golden images \(N, 3, 32, 32\), N from 1 to 16"):
        verify(folder)


def test_a_config_cannot_ask_for_more_weights_than_the_file_has(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["channels"] = [512, 512, 512]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bytes for 1\d,\d\d\d,\d\d\d weights"):
        load_model(folder)


def test_other_number_of_steps_fails(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"num_steps": 3}}))
    assert not verify(folder).passed


def test_what_cannot_be_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = folder / "golden.safetensors"
    whole = golden.read_bytes()
    change(golden, lambda tensors: {"input": tensors["input"][:, :1].contiguous(), "output": tensors["output"]}, None)
    with pytest.raises(ValueError, match=r"expected golden images \(N, 3, 32, 32\), N from 1 to 16, got \[4, 1,"):
        verify(folder)
    golden.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="expected input and output"):
        verify(folder)
    golden.unlink()
    with pytest.raises(ValueError, match=r"expected golden\.safetensors in"):
        verify(folder)
    (folder / "model.safetensors").write_bytes(whole)
    write = pytest.raises(ValueError, match="expected the weights of test_gac_msresnet")
    with write:
        write_golden(folder)
    assert cli.main(["verify", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err
