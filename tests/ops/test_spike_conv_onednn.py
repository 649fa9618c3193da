"""spike_conv on a CPU: oneDNN's integer sums are those of float64, packed weights are never stale, fallbacks speak."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gac_kernels import spike_conv, use_backend
from gac_kernels.convolution import dispatch, onednn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(bool(onednn.why_not()), reason=onednn.why_not())
# Rows, C, C', H, W, stride.
LAYERS = {
    "16": (1, 16, 16, 17, 13, 1),
    "16 to 32": (3, 16, 32, 17, 13, 2),
    "64": (1, 64, 64, 32, 32, 1),
    "64 to 128": (2, 64, 128, 15, 16, 2),
    "256": (1, 256, 256, 7, 8, 1),
    "256 to 512": (1, 256, 512, 7, 7, 2),
    "512": (1, 512, 512, 4, 4, 1),
    "512, one pixel": (2, 512, 512, 1, 1, 1),
    "no multiple of 4": (3, 3, 5, 7, 3, 2),
    "one channel": (1, 1, 1, 3, 2, 1),
    "most channels": (1, 14_563, 2, 3, 3, 1),
}


@pytest.fixture(autouse=True)
def auto():
    with use_backend("auto"):
        yield


@pytest.fixture
def spoken(caplog):
    """What the choice of a backend logs, from a clean slate."""
    dispatch._say.cache_clear()
    with caplog.at_level(logging.WARNING, "gac_kernels"):
        yield caplog
    dispatch._say.cache_clear()


def draw(shape):
    """Spikes of random rates, weights over all 8 bits, two channels of them as large as can be; channels-last."""
    rows, channels, out_channels, height, width, _ = shape
    spikes = (torch.rand(rows, channels, height, width) < torch.rand(channels, 1, 1)).to(torch.int8)
    spikes[0] = 1
    weight = torch.randint(-128, 128, (out_channels, channels, 3, 3), dtype=torch.int8)
    weight[0], weight[-1] = 127, -128
    layout = torch.channels_last
    return spikes.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)


def currents(spikes, weight, stride=1):
    """The sums, as neurons of one step with scale 1 and no bias get them."""
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight))
    return spike_conv(
        spikes=spikes,
        weight=weight,
        scale=ones,
        bias=zeros,
        num_steps=1,
        stride=stride,
        return_membrane=True,
    )[0]


def sums(spikes, weight, stride=1):
    return F.conv2d(spikes.double(), weight.double(), None, stride, 1)


@needs_onednn
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS.keys())
def test_sums_are_those_of_float64(shape, poisoned):
    spikes, weight = draw(shape)
    assert torch.equal(currents(spikes, weight, shape[-1]).double(), sums(spikes, weight, shape[-1]))


@needs_onednn
def test_samples_in_pieces_give_the_bits_of_the_whole(monkeypatch, poisoned):
    spikes, weight = draw((3 * 5, 24, 32, 6, 5, 1))
    scale, bias, residual = torch.rand(32) / 100, torch.randn(32), torch.randn(15, 32, 6, 5)
    with use_backend("eager"):
        expected = spike_conv(
            spikes=spikes,
            weight=weight,
            scale=scale,
            bias=bias,
            num_steps=3,
            residual=residual,
            return_membrane=True,
        )
    for samples in (1, 2, 5):
        monkeypatch.setattr(onednn, "_SUMS", samples * residual[0].numel())
        got = spike_conv(
            spikes=spikes,
            weight=weight,
            scale=scale,
            bias=bias,
            num_steps=3,
            residual=residual,
            return_membrane=True,
        )
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert 0.05 < expected[1].float().mean() < 0.95


@needs_onednn
def test_autocast_and_inference_mode_change_nothing():
    spikes, weight = draw((2, 32, 16, 5, 4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(currents(spikes, weight).double(), sums(spikes, weight))
    with torch.inference_mode():
        of_inference = weight.clone()
        for changed in (of_inference, of_inference.neg_()):
            assert torch.equal(currents(spikes, changed).double(), sums(spikes, changed))


@needs_onednn
@pytest.mark.parametrize("size", [(32, 16), (5, 3)], ids=["whole words", "odd bytes"])
def test_changed_weights_are_noticed(size):
    """Also where no version counter tells, and in a compiled function, which makes a new view at each call."""
    spikes, weight = draw((2, size[1], size[0], 4, 4, 1))
    stored = weight.permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def run():
        return currents(spikes, stored.unflatten(1, (3, 3)).permute(0, 3, 1, 2))

    compiled = torch.compile(run, backend="aot_eager")
    for change in (lambda: None, stored.neg_, lambda: stored.data[-1, -1].sub_(1), lambda: stored.numpy().fill(3)):
        change()
        expected = sums(spikes, stored.unflatten(1, (3, 3)).permute(0, 3, 1, 2))
        assert torch.equal(run().double(), expected) and torch.equal(compiled().double(), expected)


@needs_onednn
def test_a_weight_is_packed_once_and_forgotten_with_its_memory(monkeypatch):
    monkeypatch.setattr(onednn, "_cache", {})
    packed, pack = [], onednn._Packed.of
    monkeypatch.setattr(onednn._Packed, "of", lambda *a: packed.append(1) or pack(*a))
    spikes, weight = draw((1, 16, 16, 3, 3, 1))
    for _ in range(3):
        currents(spikes, weight)
    assert len(packed) == 1 and len(onednn._cache) == 1
    for stride in (2, 1, 2):
        currents(spikes, weight, stride)
    assert len(packed) == 2 and len(onednn._cache) == 2
    del weight
    gc.collect()
    currents(*draw((1, 16, 16, 3, 3, 1)))
    assert len(packed) == 3 and len(onednn._cache) == 1


@needs_onednn
def test_a_cpu_without_vnni_is_exact_too():
    """There the products are added in pairs in 16 bits."""
    code = "from gac_kernels.convolution import onednn as m; print('why not:', m.why_not())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "why not: \n", run.stderr


@needs_onednn
def test_chosen_in_silence(spoken):
    assert dispatch.spike_conv_backend(CPU) == "onednn"
    with use_backend("eager"):
        assert dispatch.spike_conv_backend(CPU) == "eager"
    assert not spoken.records


def test_says_once_why_it_is_slower(spoken, monkeypatch):
    monkeypatch.setattr(onednn, "why_not", lambda: "the reason")
    assert [dispatch.spike_conv_backend(CPU) for _ in range(3)] == ["eager"] * 3
    assert [r.getMessage() for r in spoken.records] == [
        "spike_conv runs as exact float32 convolutions, slower: the reason"
    ]


@needs_onednn
def test_every_reason_against_it(monkeypatch):
    why_not = onednn.why_not.__wrapped__
    assert why_not() == ""

    def broken(self, spikes):
        raise RuntimeError("could not create a primitive\nmore")

    for owner, name, value, reason in (
        (onednn.platform, "machine", lambda: "riscv64", "this is riscv64"),
        (torch.backends.mkldnn, "is_available", lambda: False, "without oneDNN"),
        (onednn._Packed, "convolve", broken, "failed: could not create a primitive"),
        (onednn._Packed, "convolve", lambda s, x: sums(x, torch.ones(32, 64, 3, 3), s.stride), "not exact"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert reason in why_not()
