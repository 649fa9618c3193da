"""The Hopper kernel of spike_conv: its bits on such a GPU; anywhere, that it compiles and says where it stays away."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, hopper_conv, spike_conv, spike_conv_reference, tuning
from gac_kernels.hopper_conv import GLUON_ERROR, Plan, plan, tile_of
from gac_kernels.hopper_tiles import one_pass_fills, spread
from test_spike_conv import GRID, borderline, inputs

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not ON_HOPPER or bool(GLUON_ERROR), reason="needs a Hopper GPU and Triton with Gluon")

# T, B, C, C', H, W, stride: odd sizes, one program and many, batches that fill no tile, three depths of a copy.
SHAPES = {
    "whole tiles": (4, 2, 128, 128, 16, 16, 1),
    "odd": (3, 5, 64, 96, 7, 9, 1),
    "rows": (2, 3, 32, 64, 14, 28, 1),
    "one pixel": (4, 70, 128, 32, 1, 1, 1),
    "deep": (4, 3, 512, 128, 8, 8, 1),
    "wide": (1, 2, 96, 256, 56, 56, 1),
    "stride 2": (4, 3, 64, 128, 28, 14, 2),
    "stride 2, deep": (5, 2, 256, 64, 6, 10, 2),
    "sixteen steps": (16, 1, 32, 32, 12, 4, 1),
}
LAUNCHES = {
    f"{warps} warps, {steps} steps, ring {ring}": {
        "BLOCK_M": 16 * warps, "BLOCK_N": 128, "RING": ring, "STEPS": steps, "num_warps": warps,
    }
    for warps, steps, ring in ((4, 1, 2), (4, 2, 3), (8, 1, 4), (8, 2, 2))
}  # fmt: skip


@pytest.fixture
def launch(request, monkeypatch, filled):
    monkeypatch.setattr(tuning, "_device_configs", lambda _: {})
    monkeypatch.setitem(tuning.DEFAULTS, "spike_conv_hopper", request.param)
    tuning.shape_config.cache_clear()
    yield request.param
    tuning.shape_config.cache_clear()


@pytest.fixture
def planned(monkeypatch):
    """The plans of the calls of a test."""
    made = []

    def note(*arguments):
        made.append(plan(*arguments))
        return made[-1]

    monkeypatch.setattr(hopper_conv, "plan", note)
    return made


@hopper
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys(), indirect=True)
def test_same_bits_as_the_definition(launch, shape, residual, planned, device, poisoned):
    *tensors, keywords = inputs(shape, device, residual)
    spec = IMAGENET if shape[0] == 3 else LIFSpec(reset="soft", decay=0.9) if shape[0] == 5 else CIFAR
    expected, spikes = spike_conv_reference(
        *tensors, shape[0], spec, return_membrane=True, dtype=torch.float32, **keywords
    )
    membrane, got = spike_conv(*tensors, shape[0], spec, return_membrane=True, **keywords)
    assert 0.02 < spikes.float().mean() < 0.98
    assert torch.equal(got, spikes)
    assert torch.equal(membrane, expected.to(residual or torch.float32))
    assert torch.equal(spike_conv(*tensors, shape[0], spec, **keywords), spikes)
    assert len(planned) == 2 and all(isinstance(made, Plan) for made in planned)


@hopper
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys(), indirect=True)
def test_neurons_at_their_threshold_fire_as_in_float64(launch, planned, device, poisoned):
    for shape in ((4, 3, 64, 128, 16, 16, 1), (3, 2, 64, 96, 14, 28, 2)):
        *tensors, keywords = borderline(shape, device, GRID)
        exact = spike_conv_reference(*tensors, shape[0], **keywords)
        assert torch.equal(spike_conv(*tensors, shape[0], **keywords), exact)
        assert (spike_conv(*tensors, shape[0], **keywords | {"grid": 0.0}) != exact).float().mean() > 0.1
    assert all(isinstance(made, Plan) for made in planned)


@hopper
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_small_batches_are_spread_and_give_the_same_bits(shape, planned, device, poisoned):
    *tensors, keywords = inputs(shape, device, torch.bfloat16)
    expected = spike_conv_reference(*tensors, shape[0], dtype=torch.float32, **keywords)
    assert torch.equal(spike_conv(*tensors, shape[0], **keywords), expected)
    frames = (shape[1], shape[3], (shape[4] - 1) // shape[6] + 1, (shape[5] - 1) // shape[6] + 1)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert (planned[0].pixels, planned[0].block_n) == (64, 32) or 2 * planned[0].programs(*frames) > processors


@hopper
def test_spikes_as_residual(planned, device, poisoned):
    *tensors, keywords = inputs((4, 3, 64, 64, 9, 8, 1), device, torch.int8, GRID)
    assert torch.equal(spike_conv(*tensors, 4, **keywords), spike_conv_reference(*tensors, 4, **keywords))
    assert isinstance(planned[0], Plan)


@pytest.mark.parametrize(
    ("pixels", "batch", "height", "width", "expected"),
    [
        (64, 512, 32, 32, (8, 1, 8)),
        (128, 512, 8, 8, (8, 2, 8)),
        (128, 1, 8, 8, (8, 1, 16)),
        (64, 1, 7, 7, (8, 1, 8)),
        (64, 64, 1, 1, (1, 64, 1)),
        (128, 512, 14, 14, (2, 32, 2)),
    ],
)
def test_tiles(pixels, batch, height, width, expected):
    assert tile_of(pixels, batch, height, width) == expected


@pytest.mark.parametrize("pixels", [64, 128])
def test_every_tile_is_whole_and_begins_where_copies_may(pixels):
    for height in range(1, 34):
        for width in range(1, 34):
            rows, images, columns = tile_of(pixels, 3, height, width)
            assert rows * images * columns == pixels and images * columns >= 8


def test_tiles_shrink_until_half_of_the_gpu_has_work():
    made = Plan((8, 2, 8), 128, 128, 4, 2, 8)
    assert made.programs(512, 512, 8, 8) == 256 * 4
    assert spread(made, 512, 512, 8, 8, 132) == made
    fewer = spread(made, 16, 512, 8, 8, 132)  # 8 x 4 programs, 16 x 4 of 64 pixels, 16 x 8 of 64 channels
    assert fewer == made._replace(tile=(8, 1, 8), block_n=64, num_warps=4) and fewer.programs(16, 512, 8, 8) == 128
    least = spread(made, 1, 64, 8, 8, 132)
    assert (least.pixels, least.block_n, least.num_warps) == (64, 32, 4) and least.programs(1, 64, 8, 8) == 2


@pytest.mark.parametrize(
    ("batch", "channels", "side", "num_steps", "expected"),
    [
        (512, 512, 8, 4, True),
        (16, 128, 32, 4, True),  # 128 tiles on 132 processors
        (16, 256, 16, 4, False),  # 64 tiles: half of the processors four times, or all of them twice
        (1, 128, 32, 4, False),
        (1, 128, 32, 1, True),
        (17, 128, 32, 4, False),  # 136 tiles: a second wave for four of them
    ],
)
def test_one_pass_where_it_fills_the_gpu(batch, channels, side, num_steps, expected):
    assert one_pass_fills(batch, channels, side, side, num_steps, 132) == expected


def test_says_why_it_stays_away():
    spikes = torch.zeros(4, 32, 4, 4, dtype=torch.int8)
    reason = plan(spikes, spikes, None, spikes[:0].float(), 2, 1, tuning.DEFAULTS["spike_conv_hopper"])
    assert isinstance(reason, str) and ("compute capability 9.0" in reason or "Gluon" in reason)


def test_a_compiler_that_refuses_is_logged_once(monkeypatch, caplog, device):
    def refuse(*_):
        raise RuntimeError("no such layout\nand more")

    monkeypatch.setattr(hopper_conv, "launch", refuse)
    hopper_conv._failure.cache_clear()
    with caplog.at_level(logging.WARNING, "gac_kernels"):
        reasons = {hopper_conv._failure(device) for _ in range(2)}
    hopper_conv._failure.cache_clear()
    assert reasons == {"its kernel does not compile with this Triton (RuntimeError: no such layout)"}
    assert len(caplog.records) == 1


@pytest.mark.skipif(bool(GLUON_ERROR), reason="this Triton has no Gluon")
def test_compiles_for_hopper_anywhere():
    """Triton compiles for a GPU that is not there; the plain and the fullest variant end in int8 tensor core code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["wgmma.s8", "wgmma.s8", "wgmma.s8", "compiles"]
