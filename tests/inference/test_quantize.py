"""Quantised networks: the same bits as float64 layer by layer, near the float network, and the same after a reload."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import CIFAR, IMAGENET, LIFSpec, spike_conv_reference, use_backend
from gac_kernels.reference import on_grid
from timm_gac import cli, fuse_for_inference
from timm_gac import quantize as quantize_network
from timm_gac.analysis.evaluate import evaluate
from timm_gac.bench.check import check_integer
from timm_gac.bench.model import ModelBenchConfig, bench_model
from timm_gac.hub.folder import load_model, save_model_folder
from timm_gac.inference.exact_conv import ExactConv2d, input_step, weight_units
from timm_gac.inference.integer import IntegerSpikingResNet, SpikeConv, current_grid
from timm_gac.inference.quantize import SCHEME, dequantize, quantize_as, quantize_weight
from timm_gac.inference.record import membrane_of, neuron_layers, record_spikes

# Most of these tests are of sums that may come in any order; the default rounds less and is tested beside them.
quantize = functools.partial(quantize_network, exact_sums=True)

MODELS = ("test_gac_msresnet", "msresnet18_cifar", "gac_spiking_resnet18", "spiking_resnet19", "gac_msresnet34")
# Depth, blocks and neurons decide what is tested here; sums over 512 channels are those of msresnet18_cifar, as it is.
NARROW = {
    "gac_spiking_resnet18": dict(stem_width=16, channels=(16, 24, 40, 48)),
    "msresnet18": dict(stem_width=16, channels=(16, 24, 40, 48)),
    "spiking_resnet19": dict(stem_width=24, channels=(24, 40, 56)),
    "gac_msresnet34": dict(stem_width=16, channels=(16, 24, 40, 48)),
}


def firing(name: str, num_steps: int = 3) -> nn.Module:
    """A model whose norms all do something and whose neurons fire."""
    model = timm.create_model(name, num_steps=num_steps, num_classes=7, **NARROW.get(name, {})).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


def layers(network: nn.Module) -> dict[str, SpikeConv]:
    return {name: module for name, module in network.named_modules() if isinstance(module, SpikeConv)}


def exact_convs(network: nn.Module) -> dict[str, ExactConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ExactConv2d)}


def with_float64_neurons(network: nn.Module) -> nn.Module:
    """A copy whose spike convolutions compute in float64, between the float parts as they are."""
    exact = copy.deepcopy(network)
    for layer in layers(exact).values():
        layer.double()
    for module in exact.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype))
    return exact


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
def assert_layers_exact(network: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Every spike convolution returns, on its input in this pass, the spikes of float64; its firing rates.

    By construction: float32 has its currents without rounding, and holds its membranes.
    """
    rates = {}

    def check(name):
        def hook(module, inputs, output):
            spikes = output[-1] if isinstance(output, tuple) else output
            residual = inputs[1] if len(inputs) > 1 else None
            exact, expected = spike_conv_reference(
                inputs[0],
                module.kernel,
                module.scale,
                module.bias,
                module.num_steps,
                module.spec,
                stride=module.stride,
                residual=residual,
                grid=module.grid,
                return_membrane=True,
            )
            assert torch.equal(spikes, expected), f"{name}: {(spikes != expected).sum()} of {spikes.numel()} differ"
            assert torch.equal(module.input_current(inputs, module.num_steps).flatten(0, 1).double(), exact), name
            membrane = membrane_of(exact.unflatten(0, (module.num_steps, -1)), module.spec)
            assert torch.equal(membrane.float().double(), membrane), name
            rates[name] = spikes.float().mean().item()

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in layers(network).items()]
    network(images)
    for handle in handles:
        handle.remove()
    return rates


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_and_the_whole_network_equal_float64(name: str) -> None:
    network, images = quantize(firing(name)), torch.randn(2, 3, 15, 17)
    rates = assert_layers_exact(network, images)
    assert rates and all(0.005 < rate < 0.995 for rate in rates.values()), rates
    with torch.no_grad():
        exact = with_float64_neurons(network)
        assert torch.equal(network.forward_features(images), exact.forward_features(images))
        assert torch.equal(network(images), exact(images))
        steps = network.forward_steps(images)
        torch.testing.assert_close(steps.mean(1), network(images), rtol=1e-4, atol=1e-5)


def behind_the_encoder(network: nn.Module, gated: torch.Tensor) -> list[torch.Tensor]:
    """Currents and spikes of all blocks from the encoder's output."""
    membrane, spikes, seen = gated, network.lif(gated), []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            membrane, spikes, _ = block(membrane, spikes)
            seen += [membrane, spikes]
    return seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_sum_behind_the_encoder_depends_on_its_order(name: str) -> None:
    """float32, channels-last, other batches and float64 give the same currents and spikes from the same input."""
    network, images = quantize(firing(name)), torch.randn(3, 3, 15, 17)
    network.check_grid()
    gated = network._encode(images)
    expected = behind_the_encoder(network, gated)
    assert any(current.is_floating_point() for current in expected) == ("msresnet" in name)
    assert expected[-1].float().mean() > 0.001
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    one = gated.unflatten(0, (3, 3))[:, 1].contiguous()
    for found, rows in (
        (behind_the_encoder(channels_last, gated.contiguous(memory_format=torch.channels_last)), slice(None)),
        (behind_the_encoder(copy.deepcopy(network).double(), gated.double()), slice(None)),
        (behind_the_encoder(network, one), slice(1, None, 3)),
    ):
        for want, got in zip(expected, found, strict=True):
            assert torch.equal(got.double(), want[rows].double())
    # Sums of the shortcuts' products in float32, one after the other and backwards, are those of float64.
    seen = {}
    for part_name, part in exact_convs(network).items():
        part.register_forward_pre_hook(lambda _, inputs, part_name=part_name: seen.update({part_name: inputs[0]}))
    behind_the_encoder(network, gated)
    assert seen and set(seen) == set(exact_convs(network))
    for part_name, x in seen.items():
        part = exact_convs(network)[part_name]
        x = x.float()
        if part.step:
            x = on_grid(x.clamp(-1024 * part.step, 1024 * part.step), part.step)
        columns = torch.nn.functional.unfold(x[:1], part.kernel_size, 1, part.padding, part.stride)[0]
        products, total = part.weight.flatten(1)[:8, :, None] * columns, 0.0
        for product in products.flip(1).unbind(1):
            total = total + product
        torch.testing.assert_close(total.double(), products.double().sum(1), rtol=0, atol=0)


def test_units_leave_room_for_the_largest_sums() -> None:
    """Inputs of 1,024 steps with the signs of the weights reach at most 2**24 units, and the bound is not idle."""
    weight = (
        torch.randn(5, 300, 1, 1, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 7.0, 1e2, 0.0])[:, None, None, None]
    )
    weight[1, 1:] = 0.0
    for step in (2.0**-10, 2.0**-4, 0.0):
        conv = nn.Conv2d(300, 5, 1, bias=False).double()
        conv.weight.data.copy_(weight)
        bias = torch.randn(5, dtype=torch.float64)
        part = ExactConv2d(conv, step, bias)
        part.check_exact("it")
        unit = weight_units(part.weight, part.bias, step)
        integers, levels = part.weight.flatten(1).abs() / unit[:, None], 1024 if step else 1
        sums = integers.sum(1) * levels + part.bias.abs() / (unit * (step or 1.0))
        assert (integers == integers.round()).all() and (sums <= 2**24).all() and (integers <= 2**11).all()
        assert ((sums > 2**22) | (integers.amax(1) > 2**9)).logical_or(weight.flatten(1).sum(1) == 0).all()
        assert (part.weight - weight).abs().max() <= unit.max()
    assert input_step(1.0) == 2.0**-10 and input_step(33.0) == 2.0**-4
    with pytest.raises(ValueError, match="at most 16,384 weights a channel"):
        weight_units(torch.ones(1, 40000, 1, 1, dtype=torch.float64), None, 1.0, rounding=0.5)


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


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("test_gac_msresnet", 4), ("test_gac_msresnet", 6), ("spiking_resnet19", 4), ("msresnet18", 4), ("msresnet18", 2)],
)
def test_float_parts_of_any_dtype_leave_the_neurons_exact(name: str, num_steps: int) -> None:
    network, images = quantize(firing(name, num_steps)), torch.randn(1, 3, 17, 15)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rates = assert_layers_exact(network.to(dtype), images.to(dtype))
        assert len(rates) > 4


def test_the_grid_follows_from_neuron_and_steps() -> None:
    for spec, num_steps, exponent in (
        (CIFAR, 1, -15), (CIFAR, 4, -15), (CIFAR, 5, -14), (CIFAR, 7, -12), (CIFAR, 16, -12),
        (IMAGENET, 2, -15), (IMAGENET, 3, -14), (IMAGENET, 4, -12), (IMAGENET, 6, -12),
        (LIFSpec(decay=1.0), 9, -15), (LIFSpec(decay=0.0), 9, -15), (LIFSpec(decay=0.9), 9, -15),
    ):  # fmt: skip
        assert current_grid(spec, num_steps) == 2.0**exponent
    network = quantize(firing("test_gac_msresnet", 6), clip="max")
    for layer in layers(network).values():
        assert not layer.scale.remainder(2.0**-13).any() and not layer.bias.remainder(2.0**-13).any()
    # What comes from the encoder or a 1x1 shortcut has to be rounded, the membrane of the block before is so already.
    rounded = {name for name, layer in layers(network).items() if layer.grid}
    with_shortcut = {f"{name}.conv2" for name, block in network.named_modules() if getattr(block, "downsample", None)}
    assert rounded == with_shortcut | {"layer1.0.conv2"} and {network.layer1[0].conv2.grid} == {2.0**-13}


@pytest.mark.parametrize("name", ["test_gac_msresnet", "spiking_resnet19"])
def test_interpreted_kernels_give_the_network_of_the_eager_path(name: str, device: torch.device) -> None:
    network, images = quantize(firing(name)).to(device), torch.randn(1, 3, 7, 5, device=device)
    with torch.no_grad():
        with use_backend("eager"):
            expected = network._forward_spikes(images)
        with use_backend("triton"):
            got = network._forward_spikes(images)
    assert expected.float().mean() > 0.01 and torch.equal(got, expected)


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


def test_dtypes_move_only_what_is_real() -> None:
    network, images = quantize(firing("test_gac_msresnet")), torch.randn(2, 3, 8, 8)
    scales = {name: layer.scale.clone() for name, layer in layers(network).items()}
    half = copy.deepcopy(network).to(torch.bfloat16)
    for name, layer in layers(half).items():
        assert layer.weight.dtype == torch.int8 and torch.equal(layer.scale, scales[name])
    with torch.no_grad():
        logits = half(images.bfloat16())
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert_layers_exact(half, images.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert_layers_exact(network, images)
        exact = copy.deepcopy(network).double()
        torch.testing.assert_close(exact(images.double()), network(images).double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(exact.float()(images), network(images))
    features, intermediates = network.forward_intermediates(images)
    torch.testing.assert_close(features, network.forward_features(images))
    assert all(rate.min() >= 0 and rate.max() <= 1 and rate.is_floating_point() for rate in intermediates)


def test_whole_network_compiles_and_is_evaluated() -> None:
    network, images = quantize(firing("test_gac_msresnet")), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), network(images), rtol=1e-5, atol=1e-5)
    labels = network(images).argmax(1)
    result = evaluate(network, [(images, labels)])
    assert result.top1 == 1.0 and set(layers(network)) <= set(result.firing_rates)


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


@pytest.mark.parametrize("name", ["test_gac_msresnet", "gac_spiking_resnet18"])
def test_every_neuron_of_the_float_network_is_recorded(name: str) -> None:
    model = firing(name)
    network = quantize(model)
    # A norm with its neuron stands behind its convolution there; here the convolution holds the neuron.
    expected = {layer.replace("bn", "conv") for layer in neuron_layers(model)}
    assert {layer.replace(".lif", "") for layer in neuron_layers(network)} == expected and len(expected) > 6
    images = torch.randn(2, 3, 16, 16)
    with record_spikes(network) as recording, torch.no_grad():
        network(images)
    seen = recording.spikes
    assert len(seen) == len(expected) and all(spikes.is_floating_point() for spikes in seen.values())
