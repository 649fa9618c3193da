"""Integer networks: the same bits as float64 layer by layer, in any order of sums and any dtype of the float parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gac_kernels import CIFAR, IMAGENET, LIFSpec, spike_conv_reference, use_backend
from gac_kernels.reference import on_grid
from integer_networks import exact_convs, firing, layers, quantize
from timm_gac.analysis.evaluate import evaluate
from timm_gac.inference.exact_conv import ExactConv2d, input_step, weight_units
from timm_gac.inference.integer import current_grid
from timm_gac.inference.record import membrane_of, neuron_layers, record_spikes

MODELS = ("test_gac_msresnet", "msresnet18_cifar", "gac_spiking_resnet18", "spiking_resnet19", "gac_msresnet34")


def with_float64_neurons(network: nn.Module) -> nn.Module:
    """A copy whose spike convolutions compute in float64, between the float parts as they are."""
    exact = copy.deepcopy(network)
    for layer in layers(exact).values():
        layer.double()
    for module in exact.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype))
    return exact


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


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("test_gac_msresnet", 4), ("test_gac_msresnet", 6), ("spiking_resnet19", 4), ("msresnet18", 4), ("msresnet18", 2)],
)
def test_float_parts_of_any_dtype_leave_the_neurons_exact(name: str, num_steps: int) -> None:
    network, images = quantize(firing(name, num_steps)), torch.randn(1, 3, 17, 15)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rates = assert_layers_exact(network.to(dtype), images.to(dtype))
        assert len(rates) > 4


@pytest.mark.parametrize("exact_sums", [False, True])
@pytest.mark.parametrize("name", ["test_gac_msresnet", "spiking_resnet19"])
def test_autocast_leaves_float64(name: str, exact_sums: bool) -> None:
    """A network for comparisons, whose shortcuts autocast rounded to 16 bits."""
    network, images = quantize(firing(name), exact_sums=exact_sums).double(), torch.randn(2, 3, 17, 15).double()
    with torch.no_grad():
        expected = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(images), expected)


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
