"""Noise on currents in whole networks: nothing without it, the same again where blocks are recomputed, refusals."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac
from timm_gac.bench.check import prepare_weights
from timm_gac.inference.record import record_spikes
from timm_gac.layers import eight_bit
from timm_gac.layers.neuron import LIF, BatchNormLIF
from timm_gac.models.blocks import SpikingBlock

VARIANTS: dict[str, dict[str, Any]] = {
    "gac_ms": dict(),
    "direct": dict(encoder="direct"),
    "plain": dict(block=SpikingBlock),
    "plif_channel": dict(neuron="plif_channel"),
    "ternary": dict(neuron="ternary"),
    "integer": dict(neuron="integer"),
    "adaptive": dict(neuron="adaptive"),
    "drop_path": dict(drop_path_rate=0.5),
}
BITS = ("gac_ms", "direct", "plain", "plif_channel", "drop_path")  # whose spikes bits hold


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7, **options).train()
    prepare_weights(model, torch.randn(3, 3, 16, 16))  # so that neurons fire everywhere
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def images(device: torch.device) -> Tensor:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    return images.contiguous(memory_format=torch.channels_last)


def step(model: Any, images: Tensor, dtype: torch.dtype | None = None, forward: Any = None) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one training step."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = (model if forward is None else forward)(images).float().square().sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.fixture(autouse=True)
def one_algorithm() -> Any:
    """On a GPU two calls of one convolution give the same bits only where cuDNN may not choose anew."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_has_it_in_training_and_none_else(
    variant: str, dtype: torch.dtype | None, images: Tensor, device: torch.device
) -> None:
    plain = network(**VARIANTS[variant]).to(device)
    noisy = copy.deepcopy(plain)
    noisy.set_current_noise(0.3)
    same = copy.deepcopy(noisy)
    same.set_current_noise(0)
    assert noisy.state_dict().keys() == plain.state_dict().keys() and noisy.model_args() == plain.model_args()
    assert all(module.current_noise == 0.3 for module in noisy.modules() if isinstance(module, LIF))
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(copy.deepcopy(noisy).eval()(images), copy.deepcopy(plain).eval()(images))
        assert torch.equal(torch.get_rng_state(), state)
    with record_spikes(noisy) as own:
        noisy(images)
    with record_spikes(plain) as other:
        plain(images)
    assert own.spikes.keys() == other.spikes.keys()
    assert not [name for name in own.spikes if torch.equal(own.spikes[name] != 0, other.spikes[name] != 0)]
    step(same, images), step(noisy, images, dtype)
    fresh = [copy.deepcopy(same), copy.deepcopy(same), copy.deepcopy(same)]
    fresh[1].set_current_noise(0.3), fresh[2].set_current_noise(1e-30)
    found = [step(model, images, dtype) for model in fresh]
    assert not different(step(copy.deepcopy(same), images, dtype), found[0])
    assert {"loss", "layer1.0.conv1.weight", "conv1.weight"} <= set(different(found[1], found[0]))
    assert all(value.isfinite().all() for value in found[1].values())
    if dtype is None and variant != "drop_path":  # a noise too small to be seen: two passes give what one does
        torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", BITS)
def test_packed_spikes_have_the_same_gradients(
    variant: str, dtype: torch.dtype | None, images: Tensor, device: torch.device
) -> None:
    plain = network(**VARIANTS[variant]).to(device)
    plain.set_current_noise(0.1)
    packed = copy.deepcopy(plain)
    packed.set_spike_packing(True)
    assert not different(step(packed, images, dtype), step(plain, images, dtype))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_blocks_draw_the_same_noise(
    variant: str, reentrant: bool, images: Tensor, device: torch.device
) -> None:
    plain = network(**VARIANTS[variant]).to(device)
    plain.set_current_noise(0.1)
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing(True)
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        found = step(recomputed, images)
    finally:
        timm.layers.set_reentrant_ckpt(before)
    assert not different(found, step(plain, images))


def test_compiled(images: Tensor, device: torch.device) -> None:
    model = network().to(device)
    model.set_current_noise(0.3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    start = copy.deepcopy(model.state_dict())
    found = []
    for share in (0.3, 0.3, 0.0):
        model.set_current_noise(share)
        model.load_state_dict(start)
        found.append({name: value.clone() for name, value in step(model, images, torch.bfloat16, compiled).items()})
    assert not different(found[0], found[1])
    assert {"loss", "layer1.0.conv1.weight", "conv1.weight"} <= set(different(found[0], found[2]))


def test_eight_bits_go_on_without_their_kernels(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = network(int8_convs=True)
    block = model.layer1[0]
    assert block.why_not_in_8_bits() == ""
    model.set_current_noise(0.1)
    assert block.why_not_in_8_bits() == "noise is added to currents"
    images = images.cpu()
    eight_bit.say.cache_clear()
    if eight_bit.why_not(torch.device("cpu"), torch.float32, 4) == "":  # in Triton's interpreter
        with caplog.at_level(logging.WARNING):
            model(images)
        assert "noise is added to currents" in caplog.text
    assert all(value.isfinite().all() for value in step(model, images).values())


def test_frozen_parts_have_none(images: Tensor) -> None:
    model = network()
    model.set_current_noise(0.3)
    for module in (model.encoder, model.lif, model.layer1):
        module.eval()
    with record_spikes(model) as own:
        model(images.cpu())
    with record_spikes(model) as again:
        model(images.cpu())
    same = {name for name in own.spikes if torch.equal(own.spikes[name], again.spikes[name])}
    assert same == {name for name in own.spikes if name.split(".")[0] in ("encoder", "lif", "layer1")}


@pytest.mark.parametrize("deploy", [timm_gac.fuse_for_inference, timm_gac.quantize])
def test_deployed_networks_have_none_and_take_none(deploy: Any, images: Tensor) -> None:
    plain = network().eval()
    noisy = copy.deepcopy(plain)
    noisy.set_current_noise(0.3)
    expected, found = deploy(plain), deploy(noisy)
    assert not [module for module in found.modules() if getattr(module, "current_noise", 0.0)]
    with torch.no_grad():
        assert torch.equal(found(images.cpu()), expected(images.cpu()))
    with pytest.raises(ValueError, match="expected a network that trains, got one that is folded or quantised"):
        found.set_current_noise(0.1)
    found.set_current_noise(0.0)


class Own(nn.Module):
    """A neuron layer of one's own."""

    returns_pair, spikes_dtype = False, None

    def __init__(self, neuron: Any) -> None:
        super().__init__()
        self.spec = neuron.spec

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.spec.threshold).to(x.dtype)

    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        return inputs[0]

    def output_spikes(self, output: Tensor) -> Tensor:
        return output


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_wrong_shares_are_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"expected share as a finite number >= 0"):
        network().set_current_noise(share)


@pytest.mark.parametrize("where", ["lif", "layer1.0.bn1", "layer1.0.bn1.lif"])
def test_other_neurons_are_refused_and_nothing_is_set(where: str) -> None:
    model = network()
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, Own(model.get_submodule(where)))
    with pytest.raises(ValueError, match=r"expected LIF in the place of all neurons .* got Own: put it back"):
        model.set_current_noise(0.1)
    assert not [module for module in model.modules() if getattr(module, "current_noise", 0.0)]
    model.set_current_noise(0.0)
    assert isinstance(model.layer1[0].bn2, BatchNormLIF)
