"""Folding and quantising see the weights that a network really computes with, or refuse before they change anything."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from gac_kernels import LIFSpec
from timm_gac import BatchNormLIF, fuse_for_inference, quantize
from timm_gac.hub.folder import load_model, save_model_folder
from timm_gac.inference.integer import SpikeConv

MAKES = [fuse_for_inference, quantize]


def network(name: str = "test_gac_msresnet", **options: object) -> nn.Module:
    """A network whose norms all do something and whose neurons fire, in eval mode."""
    model = timm.create_model(name, num_classes=7, **options).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


def convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    yield from (module for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


class Doubled(nn.Module):
    """A parametrization that a user wrote."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrised(conv: nn.Module) -> None:
    parametrize.register_parametrization(conv, "weight", Doubled())


def pruned_twice(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "weight", 0.3)
    prune.random_unstructured(conv, "weight", 0.2)


WRAPS: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "prune_twice": pruned_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own": parametrised,
    "old_weight_norm": weight_norm,
    "old_spectral_norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_effective_weights_are_folded(wrap: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """As those of a network that was given these weights, after an optimiser step that no forward pass has seen."""
    model, images = network(), torch.randn(2, 3, 16, 16)
    for conv in convolutions(model):
        WRAPS[wrap](conv)
    model(images).sum().backward()  # what pruning computed has a gradient now, which deepcopy refuses
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        expected = model(images)
        effective = network()
        weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        for name, parameter in effective.named_parameters():
            conv = name.removesuffix(".weight")
            parameter.copy_(weights[conv] if conv in weights else model.get_parameter(name))
        for name, buffer in effective.named_buffers():
            buffer.copy_(model.get_buffer(name))
        torch.testing.assert_close(effective(images), expected)
        made, right = make(model), make(effective)
        torch.testing.assert_close(made(images), right(images), rtol=1e-5, atol=1e-5)
    assert not any(parametrize.is_parametrized(module) for module in made.modules())
    assert made.state_dict().keys() == right.state_dict().keys()


@pytest.mark.parametrize("make", MAKES)
def test_a_convolution_with_a_bias_keeps_it(make: Callable[[nn.Module], nn.Module]) -> None:
    model, images = network().double(), torch.randn(2, 3, 16, 16).double()
    for conv in convolutions(model):
        conv.bias = nn.Parameter(0.1 * torch.randn(conv.out_channels).double())
    with torch.no_grad():
        plain = copy.deepcopy(model)
        expected = plain(images)
        for conv in convolutions(plain):
            conv.bias = None
        assert not torch.allclose(plain(images), expected)
        if make is fuse_for_inference:
            torch.testing.assert_close(make(model)(images), expected, rtol=1e-9, atol=1e-9)
        else:  # its rounding is that of the folded network, where the shifts have the bias in them
            folded = fuse_for_inference(copy.deepcopy(model))
            for layer, part in make(model).named_modules():
                if isinstance(part, SpikeConv) and part.grid == 0:
                    shift = folded.get_submodule(layer).bias
                    torch.testing.assert_close(part.bias.double(), shift, rtol=0, atol=2.0**-15)


@pytest.mark.parametrize("make", MAKES)
def test_norms_without_statistics_are_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    for tracked in (True, False):
        for name in ("bn1", "layer1.0.bn1", "layer3.0.bn2", "layer2.0.downsample.1"):
            model = network()
            norm = model.get_submodule(name)
            norm.track_running_stats, norm.running_mean, norm.running_var = tracked, None, None
            with pytest.raises(ValueError, match=f"running statistics, got {name} without"):
                make(model)


class Scaled(nn.Conv2d):
    """A convolution of a kind that folding does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def scaled(model: nn.Module) -> None:
    model.layer2[0].conv2 = Scaled(32, 32, 3, padding=1, bias=False)


def wrapped(model: nn.Module) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        weight = property(lambda self: self.base.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * 1.5

    model.layer1[0].conv1 = Adapter(model.layer1[0].conv1)


def patched(model: nn.Module) -> None:
    conv = model.layer1[0].conv2
    conv.forward = lambda x: 0.5 * type(conv).forward(conv, x)


def group_norm(model: nn.Module) -> None:
    model.layer2[0].downsample[1] = nn.GroupNorm(4, 32)


def longer(model: nn.Module) -> None:
    model.layer2[0].downsample.append(nn.ReLU())


def other_norm(model: nn.Module) -> None:
    model.layer1[0].bn1.norm = nn.GroupNorm(4, 24)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("change", [scaled, wrapped, patched, group_norm, longer, other_norm])
def test_other_modules_are_refused_before_anything_changes(
    change: Callable[[nn.Module], None], make: Callable[[nn.Module], nn.Module]
) -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    change(model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^expected .* got .*: it cannot be folded$"):
        make(model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.eval()(images).isfinite().all()


def test_neurons_and_convolutions_that_integers_do_not_have() -> None:
    for change in (
        lambda model: setattr(model.layer2[0].bn1.lif, "spec", LIFSpec(threshold=0.5)),
        lambda model: setattr(model.layer2[0].bn2, "lif", nn.ReLU()),
        lambda model: setattr(model, "lif", nn.ReLU()),
        lambda model: setattr(model.layer2[0], "conv2", nn.Conv2d(32, 32, 5, padding=2, bias=False)),
        lambda model: setattr(model.layer2[0], "conv2", nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)),
    ):
        model = network()
        change(model)
        with pytest.raises(ValueError, match=r"^expected .* got .*: it cannot be quantised$"):
            quantize(model)


def test_frozen_norms_are_folded() -> None:
    model, images = network().double(), torch.randn(2, 3, 16, 16).double()
    model = freeze_batch_norm_2d(model)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(fuse_for_inference(model)(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
def test_other_geometries_are_convolved_as_they_are(padding: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where other convolutions are one op with their neuron."""
    model, images = network().double(), torch.randn(2, 3, 16, 16).double()
    conv = nn.Conv2d(32, 32, 3, padding=padding, padding_mode="circular", bias=False).double()
    model.layer2[0].conv2 = conv
    if padding == (0, 2):
        conv.padding_mode, conv.dilation, conv.padding = "zeros", (1, 2), (1, 2)
    with torch.no_grad():
        expected = model(images)
        fuse_for_inference(model)
        monkeypatch.setattr(sys.modules[fuse_for_inference.__module__], "shift_in_neuron", lambda x: True)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert not model.layer2[0].conv2.in_one_op and model.layer2[0].conv1.in_one_op


def test_hooks_stay_where_modules_are_replaced() -> None:
    model, images, seen = network(), torch.randn(2, 3, 16, 16), []
    names = ["conv1", "bn1", "layer2.0", "layer2.0.conv1", "layer2.0.bn2", "layer2.0.downsample"]
    handles = [model.get_submodule(name).register_forward_hook(lambda *_, n=name: seen.append(n)) for name in names]
    fuse_for_inference(model)
    with torch.no_grad():
        model(images)
        assert sorted(seen) == sorted(names)
        for handle in handles:
            handle.remove()
        model(images)
    assert len(seen) == len(names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path) -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    folder = save_model_folder(quantize(model), tmp_path / "int8")
    expected = [make(copy.deepcopy(model)) for make in MAKES]
    torch.set_default_dtype(dtype)
    try:
        made = [make(copy.deepcopy(model)) for make in MAKES]
        loaded = quantize(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(load_model(folder)(images), loaded(images))
    for network_made, right in zip(made, expected, strict=True):
        for name, value in right.state_dict().items():
            got = network_made.state_dict()[name]
            assert got.dtype == value.dtype and torch.equal(got, value), name


def test_the_default_device_changes_nothing() -> None:
    plain = network("gac_spiking_resnet18", num_steps=2, stem_width=16, channels=(16, 24, 32, 48))
    for model in (network(), plain):
        expected = quantize(model).state_dict()
        with torch.device("meta"):
            made = quantize(model)
        assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("make", MAKES)
def test_what_is_folded_says_that_it_cannot_be_trained(make: Callable[[nn.Module], nn.Module]) -> None:
    made, images = make(network()), torch.randn(2, 3, 16, 16)
    assert not any(module.training for module in made.modules())
    expected = made(images)
    made.train()
    for call in (made, made.forward_steps, made.forward_intermediates):
        with pytest.raises(ValueError, match="with batch norms to train, got one that is folded or quantised"):
            call(images)
    assert torch.equal(made.eval()(images), expected)


def test_gradients_through_a_quantised_network_are_refused() -> None:
    model, images = quantize(network()), torch.randn(2, 3, 16, 16)
    for call in (model, model.forward_steps, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"without gradients .* got an input that requires one"):
            call(images.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(model(images.clone().requires_grad_()), model(images))
    model.conv1.requires_grad_(True)
    with pytest.raises(ValueError, match="without gradients"):
        model(images)


def test_norms_that_share_statistics_over_processes_are_folded() -> None:
    model, images = network().double(), torch.randn(2, 3, 16, 16).double()
    expected = model(images)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.bn1, nn.SyncBatchNorm) and isinstance(model.layer1[0].bn1, BatchNormLIF)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(images), expected, rtol=1e-9, atol=1e-9)


class _Double(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_folding_a_copy_leaves_the_original_as_it_is() -> None:
    model: Any = timm.create_model("test_gac_msresnet").eval()
    torch.nn.utils.parametrize.register_parametrization(model.conv1, "weight", _Double())
    expected = model.conv1.weight.detach().clone()
    fuse_for_inference(copy.deepcopy(model))
    assert torch.equal(model.conv1.weight, expected)
