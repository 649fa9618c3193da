"""The Hopper kernel of spike_conv: its bits on such a GPU; anywhere, that it compiles and says where it stays away."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, spike_conv, spike_conv_reference, tuning
from gac_kernels.convolution.hopper import launch as hopper_conv
from gac_kernels.convolution.hopper.launch import GLUON_ERROR, Plan, plan_call
from gac_kernels.convolution.hopper.plan import Call, one_pass_fills, pair_plan, ring_plan, tile_of
from test_spike_conv import GRID, borderline, inputs, with_shortcut

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
    "one tile": {"COPIES": 0, "STEPS": 1},
    "two tiles": {"COPIES": 2, "STEPS": 1},
    "two tiles, two steps": {"COPIES": 2, "STEPS": 2},
    "two tiles, many copies": {"COPIES": 4, "STEPS": 1},
    "two tiles, rows apart": {"COPIES": 2, "STEPS": 2, "APART": 1},
}
# The shortcut's input channels and stride.
SHORTCUTS = {"whole tiles": (64, 1), "odd": (96, 1), "one pixel": (64, 2), "deep": (256, 2), "wide": (128, 1)}


@pytest.fixture
def launch(request, monkeypatch, filled):
    monkeypatch.setattr(tuning, "_device_configs", lambda _: {})
    monkeypatch.setitem(tuning.DEFAULTS, "spike_conv_hopper", request.param)
    if "APART" in request.param:  # as with a Triton that refuses what the other launches do
        refused = (torch.device("cuda", torch.cuda.current_device()), hopper_conv.PAIR_SHARED)
        monkeypatch.setitem(hopper_conv._refusals, refused, "for this test")
    tuning.shape_config.cache_clear()
    refusals = dict(hopper_conv._refusals)
    yield request.param
    assert hopper_conv._refusals == refusals
    tuning.shape_config.cache_clear()


@pytest.fixture
def planned(monkeypatch):
    """The plans of the calls of a test."""
    plans = []

    def note(**arguments):
        plans.append(plan_call(**arguments))
        return plans[-1]

    monkeypatch.setattr(hopper_conv, "plan_call", note)
    return plans


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
    assert len(planned) == 2 and all(isinstance(plan, Plan) for plan in planned)


@hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHORTCUTS)
@pytest.mark.parametrize("launch", list(LAUNCHES.values())[1:], ids=str, indirect=True)
def test_shortcut(launch, name, dtype, planned, device, poisoned):
    shape = SHAPES[name]
    *tensors, keywords = inputs(shape, device, None, GRID)
    keywords = with_shortcut(keywords, shape, *SHORTCUTS[name], dtype, device)
    expected, spikes = spike_conv_reference(*tensors, shape[0], return_membrane=True, dtype=torch.float32, **keywords)
    membrane, got = spike_conv(*tensors, shape[0], return_membrane=True, **keywords)
    assert torch.equal(got, spikes) and torch.equal(membrane, expected.to(dtype))
    assert torch.equal(spike_conv(*tensors, shape[0], **keywords), spikes)
    assert len(planned) == 2 and all(isinstance(plan, Plan) for plan in planned)


@hopper
def test_shortcuts_that_run_apart(filled, planned, device, poisoned):
    """In float32, of too few channels, or where the call does not fill the GPU."""
    shape = (4, 3, 64, 128, 8, 8, 1)
    for shortcut_channels, dtype, reason in ((64, torch.float32, "not 16 bits"), (24, torch.float16, "not a multiple")):
        *tensors, keywords = inputs(shape, device, None, GRID)
        keywords = with_shortcut(keywords, shape, shortcut_channels, 1, dtype, device)
        expected = spike_conv_reference(*tensors, 4, dtype=torch.float32, **keywords)
        assert torch.equal(spike_conv(*tensors, 4, **keywords), expected)
        first, second = planned
        assert reason in first and isinstance(second, Plan)
        planned.clear()


@hopper
def test_shortcut_of_a_small_batch_runs_apart(planned, device, poisoned):
    shape = (4, 1, 64, 128, 8, 8, 1)
    *tensors, keywords = inputs(shape, device, None, GRID)
    keywords = with_shortcut(keywords, shape, 64, 2, torch.bfloat16, device)
    assert torch.equal(
        spike_conv(*tensors, 4, **keywords), spike_conv_reference(*tensors, 4, dtype=torch.float32, **keywords)
    )
    assert "would not fill the GPU" in planned[0] and planned[1].copies == 0


@hopper
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys(), indirect=True)
def test_neurons_at_their_threshold_fire_as_in_float64(launch, planned, device, poisoned):
    for shape in ((4, 3, 64, 128, 16, 16, 1), (3, 2, 64, 96, 14, 28, 2)):
        *tensors, keywords = borderline(shape, device, GRID)
        exact = spike_conv_reference(*tensors, shape[0], **keywords)
        assert torch.equal(spike_conv(*tensors, shape[0], **keywords), exact)
        assert (spike_conv(*tensors, shape[0], **keywords | {"grid": 0.0}) != exact).float().mean() > 0.1
    assert all(isinstance(plan, Plan) for plan in planned)


@hopper
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_small_batches_are_spread_and_give_the_same_bits(shape, planned, device, poisoned):
    *tensors, keywords = inputs(shape, device, torch.bfloat16)
    expected = spike_conv_reference(*tensors, shape[0], dtype=torch.float32, **keywords)
    assert torch.equal(spike_conv(*tensors, shape[0], **keywords), expected)
    frames = (shape[1], shape[3], (shape[4] - 1) // shape[6] + 1, (shape[5] - 1) // shape[6] + 1)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert planned[0].block_n == 32 or 2 * planned[0].programs(*frames) > processors


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


def test_few_tiles_take_fewer_channels_each():
    call = Call(
        batch=512,
        channels=512,
        out_channels=512,
        height=8,
        width=8,
        num_steps=4,
        stride=1,
        operand_bytes=1,
        value_bytes=2,
    )
    assert ring_plan(call, 132).programs(*call.frames) == 512 * 4
    few = call._replace(batch=16)  # 16 x 4 programs: half of the processors, so 16 x 8
    plan = ring_plan(few, 132)
    assert plan.block_n == 64 and plan.programs(*few.frames) == 128
    least = call._replace(batch=1, out_channels=64)
    assert ring_plan(least, 132).block_n == 32 and ring_plan(least, 132).programs(*least.frames) == 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("operand_bytes", [1, 2])
def test_two_tiles_fit_into_shared_memory(operand_bytes, stride):
    for channels, steps, copies, value_bytes, shared in itertools.product(
        (32, 64, 96, 512), (1, 2), (2, 4), (0, 2, 4), (True, False)
    ):
        call = Call(
            batch=512,
            channels=channels,
            out_channels=128,
            height=8,
            width=8,
            num_steps=4,
            stride=stride,
            operand_bytes=operand_bytes,
            value_bytes=value_bytes,
        )
        plan = pair_plan(call, copies, steps, shared)
        if plan is None:
            assert steps == 2 or copies == 4 or value_bytes == 4
            continue
        lines = 8 if not shared else 10 if stride == 1 else 17
        copied = 2 * copies * steps * lines * 8 * plan.block_k + plan.ring * plan.block_n * plan.block_k
        buffers = 2 * steps * 64 * 128 * (operand_bytes + value_bytes)
        assert copied * operand_bytes + buffers < 227 * 1024
        assert 3 <= plan.ring <= 9 * channels // plan.block_k


def test_an_odd_tile_is_a_turn_of_its_own():
    plan = Plan(
        tile=(8, 1, 8),
        block_n=128,
        block_k=128,
        ring=7,
        steps=1,
        copies=3,
    )
    assert plan.programs(3, 256, 8, 8) == 2 * 2 and plan._replace(copies=0).programs(3, 256, 8, 8) == 3 * 2


@pytest.mark.parametrize(
    ("batch", "channels", "size", "num_steps", "expected"),
    [
        (512, 512, 8, 4, True),
        (16, 128, 32, 4, True),  # 128 tiles on 132 processors
        (16, 256, 16, 4, False),  # 64 tiles: half of the processors four times, or all of them twice
        (1, 128, 32, 4, False),
        (1, 128, 32, 1, True),
        (17, 128, 32, 4, False),  # 136 tiles: a second wave for four of them
    ],
)
def test_one_pass_where_it_fills_the_gpu(batch, channels, size, num_steps, expected):
    assert (
        one_pass_fills(
            batch=batch,
            channels=channels,
            height=size,
            width=size,
            num_steps=num_steps,
            processors=132,
        )
        == expected
    )


def test_says_why_it_stays_away():
    spikes = torch.zeros(4, 32, 4, 4, dtype=torch.int8)
    reason = plan_call(
        spikes=spikes,
        out=spikes,
        residual=None,
        shortcut=None,
        membrane=spikes[:0].float(),
        num_steps=2,
        stride=1,
        config=tuning.DEFAULTS["spike_conv_hopper"],
    )
    assert isinstance(reason, str) and ("compute capability 9.0" in reason or "Gluon" in reason)


def call_of(device):
    """A call as `run` takes it, on tensors that no kernel touches."""
    spikes = torch.zeros(2, 32, 8, 8, dtype=torch.int8, device=device)
    return dict(
        spikes=spikes,
        weight=spikes,
        scale=None,
        bias=spikes,
        residual=None,
        shortcut=None,
        num_steps=1,
        stride=1,
        threshold=1.0,
        decay=0.5,
        soft_reset=False,
        shift=0.0,
        out=spikes,
        membrane=spikes[:0],
        config={"COPIES": 2, "STEPS": 1},
    )


@pytest.mark.parametrize(
    "works", [hopper_conv.PAIR_SHARED, hopper_conv.PAIR, hopper_conv.RING, ""], ids=lambda kernel: kernel or "nothing"
)
def test_a_kernel_that_a_compiler_refuses_is_asked_once(works, monkeypatch, caplog, device):
    """Each time the next kernel takes the call, and the last reason is what is told."""
    order = [hopper_conv.PAIR_SHARED, hopper_conv.PAIR, hopper_conv.RING]
    ring = Plan(tile=(8, 1, 8), block_n=32, block_k=32, ring=3, steps=1)
    pair = ring._replace(copies=2)
    plans = dict(zip(order, (pair._replace(shared=True), pair, ring), strict=True))
    asked = []

    def plan(spikes, **_):
        left = [kernel for kernel in order if (spikes.device, kernel) not in hopper_conv._refusals]
        return plans[left[0]] if left else hopper_conv._refusals[spikes.device, hopper_conv.RING]

    def launch(plan, **_):
        asked.append(hopper_conv.kernel_of(plan))
        if asked[-1] != works:
            raise RuntimeError("no such layout\nand more")

    monkeypatch.setattr(hopper_conv, "_refusals", {})
    monkeypatch.setattr(hopper_conv, "plan_call", plan)
    monkeypatch.setattr(hopper_conv, "launch", launch)
    with caplog.at_level(logging.WARNING, "gac_kernels"):
        reasons = {hopper_conv.run(**call_of(device)) for _ in range(2)}
    tried = order[: order.index(works) + 1] if works else order
    assert asked == tried + [works] * bool(works)
    assert reasons == {"" if works else "its kernel does not compile with this Triton (RuntimeError: no such layout)"}
    assert len(caplog.records) == len(tried) - bool(works)


@pytest.mark.skipif(bool(GLUON_ERROR), reason="this Triton has no Gluon")
def test_compiles_for_hopper_anywhere():
    """Triton compiles for a GPU that is not there; each ends in tensor core code, with a shortcut of both kinds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["wgmma.s8"] * 3 + ["wgmma.bf16", "wgmma.s8"]
