"""Packed spikes in whole networks: the same gradients, to the bit, from fewer saved bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from gac_kernels import IMAGENET
from timm_gac.bench.check import prepare_weights
from timm_gac.bench.harness import measure_saved_bytes
from timm_gac.models.blocks import SpikingBlock

VARIANTS = {
    "gac_ms": dict(),
    "direct": dict(encoder="direct", num_steps=9),
    "plain": dict(block=SpikingBlock, spec=IMAGENET, scaled_init=True),
    "drop_path": dict(drop_path_rate=0.5),
}


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7, **options).train()
    prepare_weights(model, torch.randn(3, 3, 16, 16))  # so that neurons fire everywhere
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None, forward=None) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one training step."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = (model if forward is None else forward)(images).float().square().sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different
    assert all(expected[name].any() for name in expected if name.endswith("conv2.weight"))


@pytest.fixture(autouse=True)
def one_algorithm() -> Iterator[None]:
    """On a GPU two calls of one convolution give the same bits only where cuDNN may not choose anew."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def images(device) -> Tensor:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    return images.contiguous(memory_format=torch.channels_last)


def pair(device, **options) -> tuple[nn.Module, nn.Module]:
    plain = network(**options).to(device)
    packed = copy.deepcopy(plain)
    packed.set_spike_packing(True)
    return plain, packed


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_bits(variant, dtype, images, device):
    plain, packed = pair(device, **VARIANTS[variant])
    assert_equal(step(packed, images, dtype), step(plain, images, dtype))
    packed.set_spike_packing(False)
    assert_equal(step(packed, images, dtype), step(plain, images, dtype))


def test_with_checkpointing(images, device):
    plain, packed = pair(device)
    for model in (plain, packed):
        for norm in model.modules():  # they move once more when a block runs again
            if hasattr(norm, "momentum"):
                norm.momentum = 0.0
    expected = step(plain, images)
    packed.set_grad_checkpointing(True)
    found = step(packed, images)
    for result in (found, expected):
        for name in [name for name in result if name.endswith("num_batches_tracked")]:
            del result[name]
    assert_equal(found, expected)


def test_compiled(images, device):
    plain, packed = pair(device)
    torch._dynamo.reset()
    results = []
    for model in (packed, plain):  # both compiled: that alone rounds the encoder's small layers another way
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results.append(step(model, images, torch.bfloat16, compiled))
    assert_equal(*results)


def test_state_features_and_inference_are_untouched(images, device):
    plain, packed = pair(device)
    assert plain.state_dict().keys() == packed.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), packed.eval()(images))
    for a, b in zip(*(m.train().forward_intermediates(images)[1] for m in (plain, packed)), strict=True):
        assert torch.equal(a, b)


def test_saves_fewer_bytes(images, device):
    plain, packed = pair(device)
    of_plain, of_packed = (measure_saved_bytes(lambda m=m: m(images)) for m in (plain, packed))
    layers = [m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][2:]
    sizes = []
    handles = [layer.register_forward_hook(lambda _m, i, _o: sizes.append(i[0].numel())) for layer in layers]
    plain(images)
    for handle in handles:
        handle.remove()
    assert len(sizes) == 5  # of blocks' spikes: four bytes each, against one for all four steps
    assert of_plain - of_packed >= 0.95 * sum(sizes) * (4 - 1 / 4)
