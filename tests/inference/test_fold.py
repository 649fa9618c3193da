"""Networks with their batch norms folded away give the logits of those that have them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import use_backend
from timm_gac import fuse_for_inference, quantize
from timm_gac.inference import fold as inference
from timm_gac.inference.fold import FoldedStem, bias_in_channel

MODELS = ("test_gac_msresnet", "gac_msresnet18_cifar", "msresnet18_cifar", "gac_spiking_resnet19")


def trained(name: str, dtype: torch.dtype, device: torch.device, **kwargs: object) -> nn.Module:
    """A model whose norms all do something."""
    model = timm.create_model(name, num_steps=3, num_classes=7, **kwargs).to(device, dtype).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_in_float64(name: str) -> None:
    model, images = trained(name, torch.float64, torch.device("cpu")), torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        expected, rates = model(images), model.forward_features(images)
        assert rates.mean() > 0.01  # it fires, so the logits depend on every layer
        fused = fuse_for_inference(model)
        torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused.forward_features(images), rates, rtol=0, atol=0)
    assert fused is model and not any(isinstance(m, _NormBase) and m.affine for m in model.modules())


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_shift_in_the_neuron_is_shift_in_the_bias(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's way (shift in the kernel), on any device."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    model, images = trained("test_gac_msresnet", dtype, device), torch.randn(2, 3, 8, 8, device=device, dtype=dtype)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding would move currents over thresholds
    with torch.no_grad(), use_backend("eager"):
        expected = model(images)
    monkeypatch.setattr(inference, "shift_in_neuron", lambda x: True)
    shifts = list[torch.Tensor]()
    norm_lif = torch.ops.gac_kernels.norm_lif

    def seen(*arguments: object) -> tuple[torch.Tensor, ...]:
        shifts.append(arguments[3])
        return norm_lif(*arguments)

    monkeypatch.setattr(torch.ops.gac_kernels, "norm_lif", seen)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(fuse_for_inference(model)(images), expected, rtol=1e-3, atol=1e-3)
    assert len(shifts) == 6 and all(shift.any() for shift in shifts)  # two neurons in each of three blocks


def test_folded_before_it_is_moved(device: torch.device) -> None:
    """Where the shift is added depends on where the network runs, not on where it was folded."""
    model, images = trained("test_gac_msresnet", torch.float64, torch.device("cpu")), torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        expected = fuse_for_inference(model)(images)
        torch.testing.assert_close(model.to(device)(images.to(device)).cpu(), expected, rtol=1e-9, atol=1e-9)


def test_other_dtypes_and_the_rest_of_the_contract(device: torch.device) -> None:
    model = fuse_for_inference(trained("test_gac_msresnet", torch.float32, device), dtype=torch.bfloat16)
    images = torch.randn(2, 3, 8, 8, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(images).dtype == torch.bfloat16 and model(images).isfinite().all()
        assert model.forward_steps(images).shape == (2, 3, 7)
    with pytest.raises(ValueError, match="folded or quantised"):
        fuse_for_inference(model)
    with pytest.raises(ValueError, match="spiking network"):
        fuse_for_inference(nn.Linear(2, 2))


def test_gradients_at_the_input_of_a_folded_network(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in one op without gradients is done apart where they are wanted."""
    model = fuse_for_inference(trained("test_gac_msresnet", torch.float64, device))
    images = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64, requires_grad=True)
    gradients = []
    for in_neuron in (False, True):
        monkeypatch.setattr(inference, "shift_in_neuron", lambda x, answer=in_neuron: answer)
        gradients += torch.autograd.grad(model(images).square().sum(), images)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


def with_bias(channels: int, kernel: int, stride: int, dtype: torch.dtype) -> nn.Conv2d:
    """A stem as PyTorch computes it, with few outputs."""
    conv = nn.Conv2d(channels, 6, kernel, stride, kernel // 2, dtype=dtype).requires_grad_(False)
    return conv.to(memory_format=torch.channels_last)


def stem_like(conv: nn.Conv2d) -> FoldedStem:
    return FoldedStem(copy.deepcopy(conv), conv.bias.double())


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Channels of what stems convolve, and whether PyTorch adds their bias; they take the GPU's way on any device."""
    seen = list[tuple[int, bool]]()
    convolve = FoldedStem._conv_forward

    def noted(self: FoldedStem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((int(x.shape[-3]), bias is not None))
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(FoldedStem, "_conv_forward", noted)
    monkeypatch.setattr(inference, "bias_in_channel", lambda x, conv: True)
    return seen


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_bias_in_a_channel_is_the_bias(
    channels: int, kernel: int, stride: int, convolved: list[tuple[int, bool]]
) -> None:
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        conv = with_bias(channels, kernel, stride, dtype)
        stem = stem_like(conv)
        for size in ((13, 9), (12, 7), (1, 2)):  # the last is smaller than the window
            x = torch.randn(2, channels, *size, dtype=dtype)
            for images in (x, x.to(memory_format=torch.channels_last), x[0]):
                expected, got = conv(images), stem(images)
                torch.testing.assert_close(got, expected, rtol=near, atol=near)
                assert got.stride() == expected.stride()
    assert set(convolved) == {(16 if channels >= 8 else 8, False)}


def test_bias_in_a_channel_keeps_channels_last_and_follows_autocast(convolved: list[tuple[int, bool]]) -> None:
    conv = with_bias(3, 3, 1, torch.float32)
    stem, images = stem_like(conv), torch.randn(2, 3, 11, 9).to(memory_format=torch.channels_last)
    operands = list[torch.Tensor]()
    noted = FoldedStem._conv_forward

    def kept(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        operands.extend((x, weight))
        return noted(stem, x, weight, bias)

    stem._conv_forward = kept
    assert stem(images).is_contiguous(memory_format=torch.channels_last)
    assert len(operands) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in operands)
    for x in (images, images.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = conv(x), stem(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)  # one rounding to bfloat16, or two
    with pytest.raises(RuntimeError, match="type"):
        stem(images.double())
    assert convolved == [(8, False)] * 4


@pytest.mark.parametrize(
    ("kernel", "geometry", "widened"),
    [
        (3, {"padding": 2, "dilation": 2}, True), ((3, 5), {"padding": (1, 2)}, True), (1, {}, True),
        (3, {"padding": 0}, False), (3, {"padding": 2}, False), (4, {"padding": 2}, False),
        (3, {"padding": "same"}, False), (3, {"padding_mode": "reflect"}, False), (3, {"groups": 2}, False),
    ],
)  # fmt: skip
def test_where_no_channel_can_hold_the_bias(
    kernel: int | tuple[int, int], geometry: dict[str, object], widened: bool, convolved: list[tuple[int, bool]]
) -> None:
    """Only a window's centre is never in the padding, and only where the padding is half as wide as the window."""
    if isinstance(kernel, int):
        geometry = {"padding": kernel // 2} | geometry
    conv = nn.Conv2d(4, 6, kernel, bias=True, dtype=torch.float64, **geometry).requires_grad_(False)
    images = torch.randn(2, 4, 9, 11).double()
    torch.testing.assert_close(stem_like(conv)(images), conv(images), rtol=1e-12, atol=1e-12)
    assert convolved == [(8, False) if widened else (4, True)]


def test_stems_are_modules_like_others(convolved: list[tuple[int, bool]]) -> None:
    """Loaded, converted, copied and exported, with gradients at the input and the weight."""
    conv, other = (with_bias(2, 3, 2, torch.float32) for _ in range(2))
    stem, images = stem_like(conv), torch.randn(2, 2, 7, 9)
    assert not list(stem.buffers())
    for loaded, assign in ((other, False), (conv, True)):
        stem.load_state_dict(loaded.state_dict(), assign=assign)  # strict: the same names and shapes
        torch.testing.assert_close(stem(images), loaded(images), rtol=1e-5, atol=1e-5)
    exact, expected = copy.deepcopy(stem).double(), copy.deepcopy(conv).double()
    torch.testing.assert_close(exact(images.double()), expected(images.double()), rtol=1e-12, atol=1e-12)
    gradients = []
    for module in (expected, exact):
        module.weight.requires_grad_()
        x = images.double().requires_grad_()
        gradients.append(torch.autograd.grad(module(x).square().sum(), (x, module.weight)))
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(stem, (images,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images.repeat(2, 1, 1, 1)), stem(images).repeat(2, 1, 1, 1))
    assert set(convolved) == {(8, False)}


def test_the_bias_is_in_a_channel_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone, in 16 bits, where channels are filled up anyway and the output is large."""
    conv = nn.Conv2d(3, 64, 3, padding=1, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.fx.symbolic_trace(stem_like(conv))(images), conv(images))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(512, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
        assert bias_in_channel(images, conv) and bias_in_channel(images[:64], conv)
        assert not bias_in_channel(images[:63], conv) and not bias_in_channel(images.cpu(), conv)
        strided = nn.Conv2d(3, 64, 7, 2, 3, dtype=torch.bfloat16)
        assert bias_in_channel(images[:256], strided) and not bias_in_channel(images[:255], strided)
        eight = nn.Conv2d(8, 64, 3, padding=1, dtype=torch.bfloat16)
        assert not bias_in_channel(torch.empty(512, 8, 32, 32, device="cuda", dtype=torch.bfloat16), eight)
        conv, images = conv.float(), images.float()
        assert not bias_in_channel(images, conv)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert bias_in_channel(images, conv)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not bias_in_channel(images, conv)


@pytest.mark.parametrize("name", ["test_gac_msresnet", "msresnet18"])
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("change", [fuse_for_inference, quantize])
def test_networks_with_the_bias_in_a_channel(
    name: str, channels: int, change: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits for images (3 channels) and event frames (2)."""
    narrow = {} if name.startswith("test_") else dict(stem_width=16, channels=(16, 24, 32, 48))
    model = trained(name, torch.float64, torch.device("cpu"), in_chans=channels, **narrow)
    weight = model.conv1.weight.shape
    network, asked = change(model), list[nn.Module]()
    stored = {name: value.shape for name, value in network.state_dict().items() if name.startswith(("conv1.", "bn1."))}
    assert stored == {"conv1.weight": weight, "conv1.bias": weight[:1]}
    shape = (2, 3, channels, 17, 15) if channels == 2 else (2, channels, 17, 15)
    images = torch.randn(shape).double()
    with torch.no_grad():
        expected = network(images)
        monkeypatch.setattr(inference, "bias_in_channel", lambda x, conv: asked.append(conv) or True)
        torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)
    assert asked == [network.conv1] and network.conv1.bias.any()
