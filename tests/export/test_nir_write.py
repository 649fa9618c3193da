"""NIR files: what other frameworks compute from them, spike by spike, and what they cannot hold."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

from gac_kernels import CIFAR, IMAGENET, LIFSpec
from timm_gac import fuse_for_inference, quantize
from timm_gac.export import graph_input, read_nir, write_nir
from timm_gac.hub import calibrate, load_model
from timm_gac.inference.record import record_spikes
from warm import WarmPython

PUBLISHED = Path(__file__).parents[2] / "hub" / "models"
SIZE = (3, 16, 16)


def small(name: str, spec: LIFSpec = CIFAR, **kwargs: object) -> nn.Module:
    """A registered network, narrow, whose neurons fire."""
    if not name.startswith("test"):
        stages = 3 if "cifar" in name or name.endswith("19") else 4
        kwargs = dict(layers=(2,) + (1,) * (stages - 1), channels=(8, 12, 16, 16)[:stages], stem_width=8) | kwargs
    model = timm.create_model(name, num_classes=5, num_steps=3, spec=spec, **kwargs)
    calibrate(model, [torch.randn(8, *SIZE)])
    return model


@torch.no_grad()
def write_expected(model: nn.Module, images: torch.Tensor, path: Path) -> Path:
    """What the folded network computes, as nir_child.py reads it."""
    folded = model if model.inference_only else fuse_for_inference(copy.deepcopy(model))
    currents = graph_input(folded, images)
    with record_spikes(folded) as recording:
        logits = folded(images)
    recording.spikes.pop("encoder", None)  # the gated ones, which the graph takes
    spikes = {name.replace("bn", "lif"): (values != 0).numpy() for name, values in recording.spikes.items()}
    np.savez(path, input=currents.numpy(), logits=logits.numpy(), **{k: np.packbits(v) for k, v in spikes.items()})
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small folded network and the two published ones as files, each with what it computes from some images."""
    folder = tmp_path_factory.mktemp("nir")
    tiny = fuse_for_inference(small("test_gac_msresnet"))
    cases = {"tiny": (tiny, torch.randn(4, *SIZE))}
    for name in ("msresnet18_cifar.cifar100", "gac_msresnet18_cifar.cifar100"):
        cases[name] = (load_model(PUBLISHED / name), load_file(PUBLISHED / name / "golden.safetensors")["input"][:2])
    files = []
    for name, (model, images) in cases.items():
        report = write_nir(model, folder / f"{name}.nir", images=images[:1])
        # The classifier adds up 32,768 products: such sums near 5 were 1e-5 off with oneDNN in PyTorch 2.14, else 3e-6.
        largest = float(model.eval()(images[:1]).abs().max())
        assert report.flips == 0 and report.spikes > 1000 and report.largest_difference < 1e-5 * max(largest, 1.0)
        files += [str(report.path), str(write_expected(model, images, folder / f"{name}.npz"))]
    return files


@pytest.mark.parametrize("library", ["snntorch", "spikingjelly"])
def test_every_spike_in_another_framework(library: str, written: list[str], needs, warm_python: WarmPython) -> None:
    if library == "spikingjelly" and sys.version_info < (3, 11):
        pytest.skip("SpikingJelly needs Python 3.11")
    needs(library), needs("nirtorch")
    command = [str(Path(__file__).with_name("nir_child.py")), library, "float32", *written]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = warm_python(command, env=environment, cwd=Path(written[0]).parent)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"differ"')]
    assert len(results) == 3
    for result in results:
        assert set(result["differ"].values()) == {0} and result["spikes"] > 10_000, result
        assert result["logits"] < 1e-5 * max(result["largest"], 1.0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gac_msresnet18_cifar", {}),
        ("msresnet34", {"spec": IMAGENET, "scaled_init": False}),
        ("gac_spiking_resnet18", {"spec": IMAGENET}),
        ("spiking_resnet19", {"spec": LIFSpec(threshold=0.7, decay=1.0)}),
        ("msresnet18_cifar", {"spec": LIFSpec(threshold=0.7, decay=0.0), "num_classes": 0}),
        ("msresnet18_cifar", {"spec": LIFSpec(decay=0.9, surrogate="atan", width=2.0, detach_reset=True)}),
    ],
)
def test_read_back_is_the_network(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = small(name, **{key: value for key, value in changes.items() if key != "num_classes"}).double()
    if "num_classes" in changes:
        model.reset_classifier(0)
    images = torch.randn(2, *SIZE).double()
    with torch.no_grad():
        expected = model.eval()(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = write_nir(model.train(), tmp_path / "network.nir", images=images)
    assert report.flips == 0 and report.spikes > 500 and report.largest_difference < 1e-12
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    network, frames = read_nir(report.path), torch.stack([images, 0 * images, images.flip(0)], 1)
    with torch.no_grad():
        for x, logits in ((images, expected), (frames, model(frames))):
            output = network(graph_input(model, x)).mean(0).flatten(1)
            torch.testing.assert_close(output, logits, rtol=0, atol=1e-12)
    assert {module.spec for module in network.modules() if hasattr(module, "spec")} == {model.spec}


def test_metadata_says_what_the_graph_leaves_out(tmp_path: Path) -> None:
    model = small("test_gac_msresnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("ä", "b", "c", "d", "e")}
    metadata = read_nir(write_nir(model, tmp_path / "a.nir", input_size=SIZE).path).metadata
    assert (metadata["model"], metadata["encoder"]) == ("test_gac_msresnet", "GatedAttentionCoding")
    assert metadata["input"] == "the encoder's output" and metadata["num_steps"] == 3 and metadata["dt"] == 1e-4
    assert json.loads(metadata["label_names"])[0] == "ä"
    assert metadata["image_size"].tolist() == list(SIZE)
    np.testing.assert_allclose(metadata["mean"], model.pretrained_cfg["mean"])


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.nir"
    path.write_text("mine")
    with pytest.raises(ValueError, match="which is there: choose another, or overwrite=True"):
        write_nir(small("test_gac_msresnet"), path, input_size=SIZE)
    assert path.read_text() == "mine"
    assert write_nir(small("test_gac_msresnet"), path, input_size=SIZE, overwrite=True).flips == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.nir"]


def hooked(model: nn.Module) -> nn.Module:
    model.layer2[0].conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def parametrised(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.layer1[0].conv2)
    return model


def with_weight_norm(model: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.layer1[0].conv2)
    return model


class Noisy(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(1)


def replaced(model: nn.Module) -> nn.Module:
    model.layer1[0].conv2 = Noisy(24, 24, 3, padding=1, bias=False)
    return model


def other_neuron(model: nn.Module) -> nn.Module:
    model = fuse_for_inference(model)
    model.layer1[0].bn2.lif = nn.ReLU()
    return model


def reflected(model: nn.Module) -> nn.Module:
    model.layer1[0].conv2.padding_mode = "reflect"
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantize, "expected a floating-point network, got one with 8-bit weights.*export the network that it was"),
        (hooked, r"expected layer2\.0\.conv1 .* since it has hooks"),
        (parametrised, r"got layer1\.0\.conv2 with parametrised ones: call timm_gac.fuse_for_inference\(model\) first"),
        (with_weight_norm, r"expected layer1\.0\.conv2 .* since it has hooks"),
        (replaced, r"expected a plain convolution as layer1\.0\.conv2, got Noisy"),
        (other_neuron, r"expected layer1\.0\.lif2 .*ReLU.* remove what was added"),
        (reflected, r"expected layer1\.0\.conv2 padded with zeros, got reflect"),
        (lambda model: nn.Sequential(model), "expected a spiking network of this package, got Sequential"),
    ],
)
def test_what_nir_cannot_hold_is_one_sentence(change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_nir(change(small("test_gac_msresnet")), tmp_path / "a.nir", input_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        ({"spec": LIFSpec(reset="soft")}, SIZE, r"hard reset, got a soft one in lif: .* LIFSpec\(reset='hard'\)"),
        ({"global_pool": "max"}, SIZE, "expected global_pool='avg', got 'max'"),
        ({}, (1, 16, 16), r"expected input_size as \(3, H, W\), got \(1, 16, 16\)"),
    ],
)
def test_other_networks_and_sizes(arguments: dict[str, object], size: tuple, message: str, tmp_path: Path) -> None:
    model = timm.create_model("test_gac_msresnet", **arguments)
    with pytest.raises(ValueError, match=message):
        write_nir(model, tmp_path / "a.nir", input_size=size)


def test_learned_decays_and_thresholds(tmp_path: Path) -> None:
    """One of each a layer is read back as it was; those of channels are refused."""
    model = small("msresnet18_cifar", neuron="plif").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.5 if ".learned." in name else 0.0)
    report = write_nir(model, tmp_path / "network.nir", images=torch.randn(2, *SIZE).double())
    assert report.flips == 0 and report.spikes > 500 and report.largest_difference < 1e-12
    specs = {module.spec for module in read_nir(report.path).modules() if hasattr(module, "spec")}
    assert any(spec.decay == pytest.approx(model.lif.learned.decay.item()) for spec in specs) and len(specs) > 5
    with pytest.raises(ValueError, match="one decay and threshold a layer, got one a channel in lif"):
        write_nir(small("msresnet18_cifar", neuron="plif_channel"), tmp_path / "other.nir")
