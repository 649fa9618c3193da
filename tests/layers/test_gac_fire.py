"""Networks that fire in the encoder's pass: the same answers and gradients as with encoder and neuron one by one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gac_kernels import CIFAR, IMAGENET, use_backend
from timm_gac import LIF, GatedAttentionCoding, fuse_for_inference, quantize
from timm_gac.inference.integer import IntegerLIF
from timm_gac.models.blocks import SpikingBlock

T = 3


class Counter(TorchDispatchMode):
    """Counts calls of `gac_fire`."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.gac_kernels.gac_fire.default
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(module: nn.Module) -> Iterator[None]:
    """Somebody looks at a module, and changes nothing."""
    handle = module.register_forward_hook(lambda module, inputs, output: None)
    yield
    handle.remove()


def network(dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=T, dtype=dtype, **kwargs)
    nn.init.constant_(model.bn1.weight, 3.0)  # so that the neuron behind the encoder fires too
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    for norm in norms:  # statistics of one batch, with which every layer fires in eval mode
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(4, 3, 16, 16, dtype=dtype))
    return model


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def answer_and_gradients(model: nn.Module, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with Counter() as counter:
        logits = model(x)
    logits.square().sum().backward()
    found = {"logits": logits.detach(), "input": x.grad}
    return counter.calls, found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, x: Tensor, rtol: float, atol: float) -> None:
    model.train()
    calls, fused = answer_and_gradients(model, x)
    assert calls == 1
    for part in (model.lif, model.encoder):
        with watched(part):
            calls, apart = answer_and_gradients(model, x)
        assert calls == 0
        assert fused.keys() == apart.keys()
        for name, value in apart.items():
            assert value.any() or name.endswith("num_batches_tracked"), name
            torch.testing.assert_close(fused[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, T, 3, 16, 16)], ids=["images", "frames"])
def test_fused_network_is_the_unfused(spec, shape) -> None:
    assert_same(network(spec=spec), images(*shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
def test_fused_kernels_are_the_unfused(spec, device) -> None:
    """The Triton kernels, channels-last; gradients up to rounding in float32."""
    model = network(torch.float32, spec=spec).to(device, memory_format=torch.channels_last)
    x = images(2, 3, 6, 6, dtype=torch.float32).to(device, memory_format=torch.channels_last)
    with use_backend("triton"):
        assert_same(model, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [fuse_for_inference, quantize])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@torch.no_grad()
def test_networks_for_inference(convert: Callable[[nn.Module], nn.Module], backend: str, device) -> None:
    model = convert(network(torch.float32).eval()).to(device)
    assert type(model.lif) is (IntegerLIF if convert is quantize else LIF)
    x = images(2, 3, 8, 8, dtype=torch.float32).to(device)
    with use_backend(backend):
        with Counter() as counter:
            rates = model.forward_features(x)
        assert counter.calls == 1 and rates.any()
        with watched(model.lif):
            assert torch.equal(model.forward_features(x), rates)


class Gentler(GatedAttentionCoding):
    """An encoder of somebody else's making."""

    def forward(self, stem: Tensor) -> Tensor:
        return 0.5 * super().forward(stem)


def watch_by_pre_hook(model: nn.Module) -> None:
    model.lif.register_forward_pre_hook(lambda module, inputs: None)


def watch_by_backward_hook(model: nn.Module) -> None:
    model.encoder.register_full_backward_hook(lambda module, grads, outputs: None)


def replace_forward(model: nn.Module) -> None:
    model.lif.forward = lambda x: torch.zeros_like(x)


def replace_neuron(model: nn.Module) -> None:
    model.lif = LIF(IMAGENET, T)


def replace_encoder(model: nn.Module) -> None:
    encoder = Gentler(model.encoder.channels, T, model.spec, dtype=torch.float64)
    encoder.load_state_dict(model.encoder.state_dict())
    model.encoder = encoder


@pytest.mark.parametrize(
    "change", [watch_by_pre_hook, watch_by_backward_hook, replace_forward, replace_neuron, replace_encoder]
)
def test_what_somebody_changed_or_watches_is_called(change: Callable[[nn.Module], None]) -> None:
    model = network().eval()
    before = model(images(2, 3, 16, 16))
    change(model)
    with Counter() as counter:
        after = model(images(2, 3, 16, 16))
    assert counter.calls == 0
    expected = model.forward_head(model._rate(model._run_stages(model._encode(images(2, 3, 16, 16)))))
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    assert torch.equal(after, before) == (change in (watch_by_pre_hook, watch_by_backward_hook))


@pytest.mark.parametrize("kwargs", [dict(encoder="direct"), dict(block=SpikingBlock)], ids=["direct", "plain"])
def test_other_networks_have_nothing_to_fuse(kwargs) -> None:
    with Counter() as counter:
        assert network(**kwargs)(images(2, 3, 16, 16)).shape == (2, 7)
    assert counter.calls == 0


def test_packed_spikes_checkpoints_and_compilation_keep_the_gradients() -> None:
    model, x = network().train(), images(2, 3, 16, 16)
    _, expected = answer_and_gradients(model, x)
    for prepare in (lambda m: m.set_spike_packing(), lambda m: m.set_grad_checkpointing()):
        other = network().train()
        prepare(other)
        calls, found = answer_and_gradients(other, x)
        assert calls == 1
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).detach(), expected["logits"], rtol=1e-12, atol=1e-14)
