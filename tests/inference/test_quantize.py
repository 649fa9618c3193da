"""What quantisation rounds, how near the float network it stays, and its folders, command and benchmark."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gac_kernels.reference import on_grid
from integer_networks import exact_convs, firing, layers, quantize
from timm_gac import cli, fuse_for_inference
from timm_gac import quantize as quantize_network
from timm_gac.bench.check import check_integer
from timm_gac.bench.model import ModelBenchConfig, bench_model
from timm_gac.hub.folder import load_model, save_model_folder
from timm_gac.inference.exact_conv import weight_units
from timm_gac.inference.integer import IntegerSpikingResNet
from timm_gac.inference.quantize import SCHEME, dequantize, quantize_as, quantize_weight


def rounding(step: float):
    """A hook that rounds a convolution's input to multiples of the step, at most 1,024 of them."""

    def hook(_, inputs):
        x = inputs[0]
        return (on_grid(x.clamp(-1024 * step, 1024 * step), step) if step else x,)

    return hook


def round_residuals(model: nn.Module, network: nn.Module) -> None:
    """Give a float network the residuals of the integer network, rounded to its grid, and its inputs of shortcuts."""
    for name, part in exact_convs(network).items():
        conv = model.get_submodule(name + ".0" if name.endswith("downsample") else name)
        conv.register_forward_pre_hook(rounding(part.step))
    for name, layer in layers(network).items():
        if layer.grid:
            neuron = model.get_submodule(name.replace("conv", "bn"))
            neuron.register_forward_pre_hook(lambda _, inputs, grid=layer.grid: (inputs[0], on_grid(inputs[1], grid)))


@torch.no_grad()
def test_folders_of_the_scheme_before_load_as_before(tmp_path: Path) -> None:
    """Their shortcuts' weights have all bits, and nothing is rounded before them."""
    images = torch.randn(2, 3, 16, 16)
    for name in ("test_gac_msresnet", "gac_spiking_resnet18"):
        model = firing(name)
        before = quantize_as(SCHEME, model)
        assert not any(key.endswith("log2_step") for key in before.state_dict())
        folder = save_model_folder(before, tmp_path / name)
        scheme = json.loads((folder / "config.json").read_text())["quantization"]
        assert scheme == {"scheme": "int8-weights-per-channel-on-grid", "clip": "mse"}
        loaded = load_model(folder)
        assert torch.equal(loaded(images), before(images)) and loaded.quantization == before.quantization
        for part_name, part in exact_convs(loaded).items():
            scale = 1.0
            if part_name.endswith("downsample"):
                conv, norm = model.get_submodule(part_name)
            else:
                conv, norm = model.get_submodule(part_name), model.get_submodule(part_name.replace("conv", "bn"))
            scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
            assert torch.equal(part.weight, (conv.weight.double() * scale[:, None, None, None]).float())
            x = torch.randn(2, conv.in_channels, 8, 8)
            if part_name.endswith("downsample"):
                assert torch.equal(part(x), torch.nn.functional.conv2d(x, part.weight, None, conv.stride))


@pytest.mark.parametrize("name", ["test_gac_msresnet", "gac_spiking_resnet18"])
def test_only_the_weights_are_rounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float network with the rounded weights computes the same, where the grid is too fine to matter."""
    monkeypatch.setattr(sys.modules[quantize_network.__module__], "current_grid", lambda *_: 2.0**-30)
    model, images = firing(name), torch.randn(2, 3, 16, 16)
    network = quantize(model)
    rounded, parts = copy.deepcopy(model).double(), layers(network)
    fuse_for_inference(rounded)
    with torch.no_grad():
        for name, part in exact_convs(network).items():  # whose inputs are rounded too
            conv = rounded.get_submodule(name + ".0" if name.endswith("downsample") else name)
            unit = weight_units(part.weight.double(), None, part.step)[:, None, None, None]
            assert ((conv.weight - part.weight).abs() <= unit).all(), name
            conv.weight.copy_(part.weight)
            if part.bias is not None:
                rounded.get_submodule(name.replace("conv", "bn")).shift.copy_(part.bias)
            conv.register_forward_pre_hook(rounding(part.step))
        for layer, part in parts.items():
            float_weight = rounded.get_submodule(layer).weight
            exact = (part.weight.double() * part.scale[:, None, None]).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
            step = part.scale.double()[:, None, None, None]
            clipped = (exact.abs() >= 127 * step * 0.999).double()
            assert (((float_weight - exact).abs() / step) * (1 - clipped) <= 1.5001).all(), layer
            float_weight.copy_(exact)
        expected = rounded.forward_features(images.double())
        got = copy.deepcopy(network).double().forward_features(images.double())
    assert (got - expected).abs().mean() < 1e-3  # a few currents at the threshold fall otherwise: bias in float32


def test_weight_rounding() -> None:
    weight = torch.randn(6, 200, 3, 3, dtype=torch.float64)
    weight[1] = 0.0
    peak = weight.abs().amax((1, 2, 3))
    for grid in (2.0**-15, 2.0**-8, 2.0):
        errors = {}
        for clip in ("max", "mse"):
            integers, scale = quantize_weight(weight, clip, grid)
            assert integers.dtype == torch.int8 and scale.dtype == torch.float32
            assert not scale[peak > 0].remainder(grid).any() and (scale > 0).all()
            errors[clip] = integers * scale.double()[:, None, None, None] - weight
        # Nothing is clipped by "max", whose scales are the least that do not clip; "mse" clips where that is better.
        step = torch.where(peak > 0, (peak / 127 / grid).ceil() * grid, 0.0)
        assert (errors["max"].abs().amax((1, 2, 3)) <= step * 1.0000001).all()
        squares = {clip: error.square().sum((1, 2, 3)) for clip, error in errors.items()}
        assert squares["mse"][1] == 0 and (squares["mse"] <= squares["max"] * 1.01).all()
        assert squares["mse"].sum() < squares["max"].sum() or grid == 2.0  # no choice there: coarser than all weights
        # Errors cancel over an output channel and, up to the few moved for that, within each window.
        assert (errors["max"].sum((1, 2, 3)).abs() <= step * 0.51).all()
        windows = errors["max"].sum((2, 3)).abs() / step.clamp(min=1e-12)[:, None]
        assert windows.max() <= 2.51 and (windows <= 0.51).double().mean() > 0.9
    assert quantize_weight(weight, "mse", 2.0**-15)[0].abs().max() == 127


def test_rounding_errors_cancel_on_spikes_and_keep_zeros() -> None:
    """Against rounding to nearest: less error of the convolution of spikes that come in patches, zeros stay zeros."""
    weight = torch.randn(24, 32, 3, 3, dtype=torch.float64)
    weight[:, ::4] = 0.0
    integers, scale = quantize_weight(weight, "mse", 2.0**-15)
    step = scale.double()[:, None, None, None]
    nearest = (weight / step).round().clamp(-127, 127)
    assert not integers[:, ::4].any() and not torch.equal(integers.double(), nearest)
    patches = torch.nn.functional.avg_pool2d(torch.rand(8, 32, 20, 20, dtype=torch.float64), 5, 1)
    spikes = (patches > 0.52).double()
    assert 0.1 < spikes.mean() < 0.6
    errors = [torch.nn.functional.conv2d(spikes, q * step - weight).square().mean() for q in (integers, nearest)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("name", ["test_gac_msresnet", "gac_spiking_resnet18"])
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    network, images = quantize(firing(name)), torch.randn(2, 3, 16, 16)
    folder = save_model_folder(network, tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"scheme": "int8-weights-per-channel-exact-sums", "clip": "mse"}
    stored = load_file(folder / "model.safetensors")
    assert stored["layer2.0.conv2.weight"].dtype == torch.int8
    loaded = load_model(folder)
    with torch.no_grad():
        assert isinstance(loaded, IntegerSpikingResNet) and loaded.quantization == network.quantization
        assert torch.equal(loaded(images), network(images)) and not loaded.training
        assert {n: part.grid for n, part in layers(loaded).items()} == {n: p.grid for n, p in layers(network).items()}
        plain = dequantize(network)
        expected = network.forward_features(images)
        assert not isinstance(plain, IntegerSpikingResNet) and not plain.training
        round_residuals(plain, network)
        assert (plain.forward_features(images) - expected).abs().mean() < 1e-3
    # timm alone knows no integer networks.
    with pytest.raises(ValueError, match=r"got those of a quantised one: load its folder with .*load_model"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = save_model_folder(quantize(firing("test_gac_msresnet")), tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    for scheme in ("int4", "int8-weights-per-channel"):  # the latter had scales and biases that are on no grid
        (folder / "config.json").write_text(json.dumps(config | {"quantization": {"scheme": scheme}}))
        with pytest.raises(ValueError, match=f"int8-weights-per-channel-on-grid.*'{scheme}': quantise anew"):
            load_model(folder)
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization": {"scheme": "int8-weights-per-channel-as-trained"}})
    )
    with pytest.raises(ValueError, match="another scheme for a network not trained in 8 bits"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in ("layer2.0.conv1.scale", "layer1.0.conv2.bias"):
        save_file(tensors | {name: tensors[name] + 2.0**-16}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name.rpartition('.')[0]} with scales and biases that are multiples"):
            load_model(folder)
    shortcut = tensors["layer2.0.downsample.weight"]
    save_file(tensors | {"layer2.0.downsample.weight": shortcut * (1.0 + 2.0**-20)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer2\.0\.downsample with weights of which float32 holds every sum"):
        load_model(folder)
    del tensors["layer2.0.conv1.scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.scale"):
        load_model(folder)


def test_leaves_the_model_alone_and_refuses_what_it_cannot_do() -> None:
    model = firing("test_gac_msresnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = quantize(model, clip="max")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for wrong, message in (
        (network, "folded or quantised"),
        (fuse_for_inference(copy.deepcopy(model)), "folded or quantised"),
        (nn.Linear(2, 2), "spiking network"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(wrong)
    with pytest.raises(ValueError, match="clip out of"):
        quantize(model, clip="best")
    with pytest.raises(ValueError, match="expected exact_sums as True or False, got 'yes'"):
        quantize(model, exact_sums="yes")
    model.bn1.running_mean = None
    with pytest.raises(ValueError, match="running statistics"):
        quantize(model)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_model_folder(firing("test_gac_msresnet"), tmp_path / "float"), tmp_path / "int8"
    images, answers = torch.randn(2, 3, 8, 8), []
    for exact in (False, True):
        options = ["--clip", "max", "--overwrite", *(["--exact-sums"] if exact else [])]
        assert cli.main(["quantize", str(folder), str(out), *options]) == 0
        assert str(out) in capsys.readouterr().out.replace("\n", "")
        network = load_model(out)
        assert network.quantization["scheme"].endswith("exact-sums" if exact else "on-grid")
        with torch.no_grad():
            answers.append(network(images))
            assert torch.equal(answers[-1], quantize_network(load_model(folder), "max", exact)(images))
    assert not torch.equal(*answers)
    for arguments, message in (
        ([str(folder), str(out)], "new or empty folder"),
        ([str(out), str(tmp_path / "again")], "quantised"),
        (["no_such_model", str(tmp_path / "none")], "expected"),
    ):
        assert cli.main(["quantize", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_benchmark_checks_and_times_it(tmp_path: Path) -> None:
    folder = save_model_folder(quantize(firing("test_gac_msresnet", 2)), tmp_path / "int8")
    for model, precisions in (("test_gac_msresnet", ("float32", "bfloat16")), (str(folder), ("float32",))):
        config = ModelBenchConfig(
            model=model,
            modes=("infer",),
            precisions=precisions,
            num_steps=(2,),
            infer_batch=2,
            steps=1,
            image_size=8,
            providers=("timm_gac", "timm_gac_int8"),
            device="cpu",
        )
        rows, _ = bench_model(config)
        assert [row["status"] for row in rows] == ["ok"] * 2 * len(precisions), rows
        assert all(row["images_per_s"] > 0 for row in rows)
    with pytest.raises(ValueError, match="num_steps=2"):
        bench_model(dataclasses.replace(config, num_steps=(3,)))
    with pytest.raises(ValueError, match="a model of this package"):
        ModelBenchConfig(model=str(tmp_path / "none"))


def test_benchmark_notices_wrong_spikes() -> None:
    network, images = quantize(firing("test_gac_msresnet")), torch.randn(2, 3, 8, 8)
    assert check_integer(network, images, "float32") == ""
    layer = network.layer2[0].conv2
    layer.register_forward_hook(lambda module, inputs, output: (output[0], output[1] ^ 1), prepend=True)
    assert "layer2.0.conv2" in check_integer(network, images, "float32")
