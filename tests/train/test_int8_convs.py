"""Training in 8 bits: what was trained is evaluated, stored, loaded and quantised with the same integers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_gac
from gac_kernels import int8_weight, use_backend
from gac_kernels.common.triton import INTERPRETED
from ranks import run_ranks
from timm_gac.bench.definition import layers_run
from timm_gac.cli import main
from timm_gac.hub import load_model, save_model_folder
from timm_gac.inference.integer import SpikeConv
from timm_gac.layers import eight_bit
from timm_gac.layers.convolution import SpikeConv2d
from timm_gac.models import SpikingResNet
from timm_gac.models.blocks import MSBlock
from timm_gac.models.checkpoint import checkpoint_filter_fn
from timm_gac.train import Recipe
from timm_gac.train.loop import RunOptions, Trainer, train
from toy_runs import same, weights
from warm import WarmPython

two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or torch.cuda.get_device_capability() < (8, 9),
    reason="needs two GPUs with float8 tensor cores",
)
interpreter = pytest.mark.skipif(torch.cuda.is_available() or not INTERPRETED, reason="needs Triton's interpreter")


@pytest.fixture
def eight(recipe: Recipe) -> Recipe:
    """In 8 bits, four time steps."""
    return replace(recipe, num_steps=4, int8_convs=True)


def trained(**arguments):
    torch.manual_seed(0)
    network = timm.create_model("test_gac_msresnet", int8_convs=True, num_classes=5, **arguments)
    optimizer = torch.optim.SGD(timm_gac.parameter_groups(network, 5e-4), lr=0.02)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 5
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in network.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    network(images)  # so that evaluation has the statistics of these images, and neurons fire
    return network.eval(), images


def codes(network):
    convs = [module for module in network.modules() if isinstance(module, SpikeConv2d) and module.int8]
    return [int8_weight(conv.weight)[0] for conv in convs]


@pytest.mark.parametrize("block", ["MSBlock", "SpikingBlock"])
def test_what_was_trained_is_what_is_deployed(block, tmp_path):
    network, images = trained(block=block)
    expected = codes(network)
    assert len(expected) == 2 * sum(network.model_args()["layers"]) - (block == "SpikingBlock")
    with torch.no_grad():
        logits = network(images)
    assert logits.std(0).min() > 1e-3
    save_model_folder(network, tmp_path / "float")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    integers = [value for key, value in stored.items() if value.dtype == torch.int8]
    assert len(integers) == len(expected)
    for loaded in (
        load_model(tmp_path / "float"),
        timm.create_model(f"local-dir:{tmp_path / 'float'}", pretrained=True),
    ):
        loaded.eval()
        assert loaded.int8_convs and all(map(torch.equal, codes(loaded), expected))
        with torch.no_grad():
            assert torch.equal(loaded(images), logits)

    quantized = timm_gac.quantize(load_model(tmp_path / "float"))
    kernels = [module.kernel for module in quantized.modules() if isinstance(module, SpikeConv)]
    assert all(map(torch.equal, kernels, expected))
    with torch.no_grad():
        assert torch.allclose(quantized(images), logits, atol=1e-4)
    save_model_folder(quantized, tmp_path / "int8")
    again = load_model(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(again(images), quantized(images))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"int8_convs": True}, {"neuron": "plif"}])
def test_a_stored_file_loads_as_a_state_dict(arguments, strict, tmp_path):
    """Integers times scales, and not the integers as weights."""
    network, images = trained()
    file = save_model_folder(network, tmp_path / "model") / "model.safetensors"
    other = timm.create_model("test_gac_msresnet", num_classes=5, **arguments)
    keys = other.load_state_dict(load_file(file), strict=strict)
    assert not keys.missing_keys and not keys.unexpected_keys
    by_path = timm.create_model("test_gac_msresnet", num_classes=5, checkpoint_path=str(file), **arguments)
    with torch.no_grad():
        for loaded in (other, by_path):
            torch.testing.assert_close(loaded.eval()(images), network(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_a_stored_file_loads_within_another_module(strict, tmp_path):
    """As the backbone of a detector, or in DistributedDataParallel: the module around it loads the state_dict."""
    network, _ = trained()
    stored = load_file(save_model_folder(network, tmp_path / "model") / "model.safetensors")
    outer = torch.nn.ModuleDict({"backbone": timm.create_model("test_gac_msresnet", num_classes=5)})
    state = {f"backbone.{name}": tensor for name, tensor in stored.items()}
    keys = outer.load_state_dict(state, strict=strict)
    assert not keys.missing_keys and not keys.unexpected_keys
    other = timm.create_model("test_gac_msresnet", num_classes=5)
    other.load_state_dict(stored)
    assert same(outer["backbone"].state_dict(), other.state_dict())
    assert state.keys() == {f"backbone.{name}" for name in stored}, "the state_dict of the caller changed"


def test_a_scale_of_a_block_of_ones_own_is_no_integers_scale():
    class Scaled(MSBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.output_scale = torch.nn.Parameter(torch.tensor(0.5))
            self.weight_scale = torch.nn.Parameter(torch.tensor(2.0))

    network = SpikingResNet(Scaled, (1, 1, 1), (8, 8, 8), (1, 1, 1), num_classes=5)
    state = network.state_dict()
    loaded = checkpoint_filter_fn(state, network)
    assert loaded.keys() == state.keys() and all(map(torch.equal, loaded.values(), state.values()))
    with pytest.raises(ValueError, match=r"an int8 weight of as many channels beside layer1\.0\.weight_scale"):
        checkpoint_filter_fn(state, timm.create_model("test_gac_msresnet"))


def test_folding_takes_the_integers():
    network, images = trained()
    folded = timm_gac.fuse_for_inference(copy.deepcopy(network))
    with torch.no_grad():
        assert torch.allclose(folded(images), network(images), atol=1e-4)


def test_the_switch_changes_what_is_computed_and_can_be_taken_back():
    network, images = trained()
    with torch.no_grad():
        eight = network(images)
        network.set_int8_convs(False)
        assert not torch.equal(network(images), eight)
        network.set_int8_convs()
        assert torch.equal(network(images), eight)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(images).isfinite().all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=interpreter)])
def test_a_channel_of_zeros_leaves_the_gradients_of_other_channels(backend):
    """A pruned one, say: its batch norm divides by the root of eps alone, and e4m3 has 18 bits of range for all."""
    network, images = trained(num_steps=2, layers=(1, 1, 0), channels=(24, 24, 24), strides=(2, 1, 1))
    for module in network.modules():
        if isinstance(module, SpikeConv2d):
            integers, scale = int8_weight(module.weight)
            module.weight.data = integers * scale[:, None, None, None]  # both networks then have the same spikes
    weight = network.layer2[0].conv2.weight
    weight.data[0] = 0.0
    network.to(memory_format=torch.channels_last).train()
    images = images[:4].contiguous(memory_format=torch.channels_last)

    def gradients(enable, backend):
        model = copy.deepcopy(network)
        model.set_int8_convs(enable)
        with use_backend(backend):
            model(images).square().sum().backward()
        learned = model.layer1[0].conv2.weight.grad, model.layer2[0].conv2.weight.grad
        return [learned[0], learned[1][:1], learned[1][1:]]

    for found, expected in zip(gradients(True, backend), gradients(False, "eager"), strict=True):
        assert expected.any() and (found - expected).norm() <= 0.2 * expected.norm()


@pytest.mark.parametrize("change", ["set_int8_convs", "set_spike_packing"])
def test_autocast_leaves_float64(change):
    """As it leaves every convolution of such a network."""
    network, images = trained()
    network.set_int8_convs(False)
    getattr(network.double().train(), change)()
    expected = network(images.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images.double()), expected)


def test_packed_checkpointed_and_compiled_steps_have_the_same_gradients():
    network, images = trained()
    network.train()

    def gradients(change):
        model = copy.deepcopy(network)
        step = change(model)
        (model if step is None else step)(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(lambda model: None)
    for change in (lambda model: model.set_spike_packing(), lambda model: model.set_grad_checkpointing()):
        assert all(map(torch.equal, gradients(change), expected))
    compiled = gradients(lambda model: torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(compiled, expected, strict=True))


@interpreter
@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("encoder", ["gac", "direct"])
def test_both_codings_train_in_the_kernels(encoder, frames, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(eight_bit, "say", said.append)
    narrow = {"layers": (1, 0, 0), "channels": (24, 24, 24), "strides": (2, 1, 1)}
    network = timm.create_model("test_gac_msresnet", encoder=encoder, num_steps=2, int8_convs=True, **narrow)
    images = torch.randn(2, *[2] * frames, 3, 8, 8)
    if not frames:
        images = images.contiguous(memory_format=torch.channels_last)
    with use_backend("triton"):
        logits = network.to(memory_format=torch.channels_last)(images)
    assert layers_run(logits) == 2 and not said, said


def test_other_convolutions_are_refused():
    network, _ = trained()
    network.layer1[0].conv2 = torch.nn.Conv2d(24, 24, 3, padding=1)
    with pytest.raises(ValueError, match="expected 3x3 SpikeConv2d without bias"):
        network.set_int8_convs()
    with pytest.raises(ValueError, match="folded or quantised"):
        timm_gac.fuse_for_inference(trained()[0]).set_int8_convs()


@pytest.mark.parametrize("enable", [1, "no", None])
def test_switches_take_true_or_false(enable):
    """A folder would store anything else."""
    network, _ = trained()
    for switch in (network.set_int8_convs, network.set_spike_packing):
        with pytest.raises(ValueError, match="expected enable as True or False"):
            switch(enable)
    assert network.int8_convs is True


def test_a_recipe_asks_for_it_and_its_folder_holds_the_integers(eight, npz, tmp_path):
    recipe = replace(eight, epochs=2, ema_decay=0.9, report="ema")
    train(recipe, RunOptions(out=tmp_path / "run", cpu=True))
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["model_args"]["int8_convs"] is True
    stored = load_file(folder / "model.safetensors")
    scales = {key: value for key, value in stored.items() if key.endswith("weight_scale")}
    assert scales and all(value.dtype == torch.float32 for value in scales.values())
    assert stored["fc.weight"].dtype == torch.float16
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert abs(report["top1"] - report["top1_before_storing"]) <= 0.1  # two of 17 images: float16 elsewhere
    assert report["weights"] == "int8 network of the stored file" and report["eval_dtype"] == "float32"
    main(["quantize", str(folder), str(tmp_path / "int8")])
    main(["eval", str(tmp_path / "int8"), "--data", str(npz), "--json", str(tmp_path / "int8.json"), "--device", "cpu"])
    deployed = json.loads((tmp_path / "int8.json").read_text())
    assert deployed["top1"] == report["top1"]
    assert deployed["loss"] == pytest.approx(report["loss"], rel=1e-5)


FLOAT8_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with float8 tensor cores",
)


@pytest.mark.parametrize(
    "device",
    ["cpu", *(pytest.param(device, marks=FLOAT8_GPU) for device in ("cuda", "cuda graph"))],
)
def test_stopped_and_resumed_is_bit_for_bit_the_same(device, eight, tmp_path, monkeypatch):
    """On a GPU with deterministic algorithms of cuDNN's, for stem and encoder; which, each run finds out anew."""
    on_gpu = device != "cpu"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", on_gpu)
    recipe = replace(
        eight,
        epochs=4,
        mix_probability=0.5,
        cutmix=1.0,
        ema_decay=0.9,
        report="ema",
        eval_every=2,
        precision="bfloat16" if on_gpu else "float32",
        channels_last=on_gpu,
        cuda_graph=device == "cuda graph",
    )
    run = RunOptions(out=tmp_path / "whole", device=device.split()[0], log_steps=2, checkpoint_steps=100)
    train(recipe, run)
    run = replace(run, out=tmp_path / "parts")
    trainer = Trainer(recipe, run)
    monkeypatch.setattr(trainer, "_must_stop", lambda: trainer.state.step == 7)
    assert trainer.run() == 0 and trainer.state.step == 7
    assert train(recipe, replace(run, resume=True)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_where_no_int8_network_can_be_made_the_run_says_so(eight, tmp_path, capsys):
    recipe = replace(eight, neuron="plif_channel")
    train(recipe, RunOptions(out=tmp_path / "run", cpu=True))
    assert "evaluated as it was trained, not as an int8 network" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["weights"] == "stored file"


@pytest.mark.parametrize("where", [pytest.param("cpu", marks=interpreter), pytest.param("gpus", marks=two_gpus)])
def test_two_processes_with_ddp(where: str, warm_python: WarmPython) -> None:
    """DDP leaves the kernels of one byte in their place, and its gradients are the mean; SyncBatchNorm does not."""
    run_ranks(warm_python, Path(__file__).with_name("eight_bit_child.py"), where)
