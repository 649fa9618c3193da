"""The row of training in 8 bits: it is timed where its kernels compute what the definition says, and nowhere else."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import timm
import torch

from gac_kernels import use_backend
from gac_kernels.common.triton import INTERPRETED
from gac_kernels.eight_bit import layer
from gac_kernels.eight_bit.weights import EightBitWeight
from timm_gac.bench import definition
from timm_gac.bench import model as bench_model
from timm_gac.bench.baselines import LoopNeuron, TimeMajorNet
from timm_gac.bench.check import prepare_weights
from timm_gac.bench.loops.bench import bench_loops
from timm_gac.bench.loops.options import LoopBenchConfig
from timm_gac.bench.model import ModelBenchConfig
from timm_gac.bench.networks import NETWORKS, Unavailable

CUDA = torch.cuda.is_available()
RUNS = CUDA and torch.cuda.get_device_capability() >= (8, 9)
interpreted = pytest.mark.skipif(CUDA or not INTERPRETED, reason="needs Triton's interpreter")
TINY = ModelBenchConfig(
    model="test_gac_msresnet",
    modes=("train",),
    precisions=("float32",),
    num_steps=(2,),
    providers=("timm_gac_8bit",),
    train_batch=2,
    image_size=4,
    steps=1,
    device="cpu",
)
NARROW = {"layers": (1, 0, 0), "channels": (24, 24, 24), "strides": (2, 1, 1)}


@pytest.fixture
def narrow(monkeypatch):
    """One block, with a stride and a shortcut of its own, and Triton on the CPU."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **NARROW))
    with use_backend("triton"):
        yield


def checked(num_steps=2, size=4):
    """What the check says about a network in 8 bits."""
    model = timm.create_model("test_gac_msresnet", num_steps=num_steps)
    images = torch.randn(4, 3, size, size)
    with use_backend("eager"):
        prepare_weights(model, images)
    layout = {"memory_format": torch.channels_last}
    network = NETWORKS["timm_gac_8bit"](model, "test_gac_msresnet", "train").to(**layout)
    reference = TimeMajorNet(model, LoopNeuron(model.spec)).to(**layout)
    return definition.check_training(network, model=model, reference=reference, images=images, precision="float32")


@interpreted
def test_a_row_is_checked_and_says_what_it_is(narrow):
    (row,), _ = bench_model.bench_model(TINY)
    assert row["status"] == "ok", row["note"]
    assert row["images_per_s"] > 0 and row["memory_format"] == "channels_last"
    assert row["note"] == "int8 weights, float8 gradients: kernels of one byte"


@interpreted
@pytest.mark.parametrize(
    ("where", "name", "wrong", "reason"),
    [
        (definition.convolution, "forward", None, "conv1: .* values are not those of the definition"),
        (layer, "round_weight", None, r"layer1\.0, gradients of conv1\.weight"),
        (layer, "input_gradient", 1.1, r"layer1\.0, gradients of (input|bn1)"),
        (layer, "weight_gradient", 1.1, r"layer1\.0, gradients of conv[12]\.weight"),
    ],
    ids=["forward", "weights", "input gradient", "weight gradient"],
)
def test_wrong_kernels_fail_the_check(narrow, monkeypatch, where, name, wrong, reason):
    right = getattr(where, name)

    def broken(*args, **kwargs):
        found = right(*args, **kwargs)
        if wrong is not None:
            return wrong * found
        if isinstance(found, EightBitWeight):  # the norm behind hides it from the forward pass
            return found._replace(scale=found.scale * (1 + (torch.arange(len(found.scale)) == 3)))
        return (found[0] + (torch.arange(found[0].shape[1]) == 3)[:, None, None], *found[1:])

    monkeypatch.setattr(where, name, broken)
    failure = checked()
    assert re.search(reason, failure), failure


@interpreted
def test_a_network_that_runs_without_the_kernels_is_not_timed(narrow, monkeypatch):
    for name in ("check_parts", "_check_integers"):  # which pass, as the test above shows, and take time
        monkeypatch.setattr(definition, name, lambda *_, **__: "")
    monkeypatch.setattr(definition.SpikingResNet, "_takes_8_bits", lambda *_: False)
    assert checked() == "0 of 2 layers ran in kernels of 8 bits"


def test_without_kernels_rows_say_why():
    rows, _ = bench_model.bench_model(replace(TINY, modes=("train", "infer"), device="cpu"))
    assert [row["status"] for row in rows] == ["skipped", "skipped"]
    assert "no kernels that train in 8 bits: no Triton" in rows[0]["note"] and "timm_gac_int8" in rows[1]["note"]
    assert bench_model.exit_code(rows) == 0


@interpreted
def test_reasons_against_the_kernels():
    """Blocks of another kind, more steps than registers hold, neurons that learn."""
    for arguments, reason in (
        ({"block": "SpikingBlock"}, "its blocks are no MSBlocks"),
        ({"num_steps": 9}, "9 time steps are more than 8"),
        ({"neuron": "plif"}, "neurons learn their decay or threshold"),
    ):
        network = timm.create_model("test_gac_msresnet", int8_convs=True, **arguments).train()
        with use_backend("triton"), pytest.raises(Unavailable, match=f"no kernels that train in 8 bits: {reason}"):
            definition.require_kernels(network, torch.device("cpu"), "float32")


def test_loops_have_it_too():
    config = LoopBenchConfig(
        model="test_gac_msresnet",
        batch=4,
        image_size=8,
        num_steps=2,
        precision="float32",
        only=("plain/timm_gac_8bit",),
        seconds=0.01,
        device="cpu",
    )
    (row,) = bench_loops(config)
    assert row["status"] == "skipped" and "no kernels that train in 8 bits" in row["note"]


def test_the_definition_is_the_operator():
    """The plain loop's convolution and `int8_conv2d`: the same output to the bit, the same gradients but for order."""
    plain = definition.DefinedConv2d(8, 12, 3, stride=2, padding=1, bias=False)
    spikes = (torch.rand(4, 8, 6, 6) < 0.3).float().requires_grad_()
    outputs = plain(spikes), torch.ops.gac_kernels.int8_conv2d(spikes, plain.weight, 2)
    assert torch.equal(*outputs)
    upstream = torch.randn_like(outputs[0])
    found, expected = (torch.autograd.grad(out, (spikes, plain.weight), upstream) for out in outputs)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() and b.norm() > 0


@pytest.mark.skipif(not RUNS, reason="needs a GPU with float8 tensor cores")
@pytest.mark.parametrize("way", ["", "+graph", "+compile"])
def test_a_gpu_has_the_rows(way):
    config = replace(TINY, precisions=("bfloat16",), providers=("timm_gac_8bit" + way,), image_size=32, device="cuda")
    (row,), _ = bench_model.bench_model(config)
    assert row["status"] == "ok", row["note"]
    assert ("without kernels" in row["note"]) == (way == "+compile")
