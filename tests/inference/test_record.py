"""The recorder of neurons: each layer once, in plain, folded and quantised networks, and no hook is left behind."""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

from gac_kernels import CIFAR
from timm_gac import LIF, BatchNormLIF, fuse_for_inference, quantize
from timm_gac.analysis.coding import measure_coding
from timm_gac.analysis.evaluate import evaluate
from timm_gac.analysis.inspect import inspect_network
from timm_gac.hub import calibrate
from timm_gac.inference.early_exit import forward_early_exit
from timm_gac.inference.record import forward_hooks, membrane_of, neuron_layers, record_spikes
from timm_gac.layers.encoder import DirectCoding
from timm_gac.layers.neuron_layer import NeuronLayer


def network(**options):
    model = timm.create_model("test_gac_msresnet", num_classes=3, **options)
    images = torch.randn(2, 3, 16, 16)
    return calibrate(model, [images, images.flip(0)]), images


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Twice(nn.Module):
    """One neuron under two names, run twice."""

    def __init__(self):
        super().__init__()
        self.first = self.second = LIF(CIFAR, num_steps=2)

    def forward(self, x):
        return self.second(2 * self.first(x))


def test_a_shared_neuron_is_seen_once():
    model, x = Twice(), torch.rand(4, 3, 5, 5) * 2
    assert list(neuron_layers(model)) == ["first"]
    calls = []
    with forward_hooks(neuron_layers(model), lambda name, *_: calls.append(name)):
        model(x)
    assert calls == ["first", "first"]  # one hook, two calls
    calls.clear()
    with forward_hooks(dict(model.named_modules(remove_duplicate=False)), lambda name, *_: calls.append(name)):
        model(x)
    assert calls == ["first", "first", ""]
    with record_spikes(model) as recording:
        out = model(x)
    assert list(recording.spikes) == ["first"] and torch.equal(recording.spikes["first"], out) and out.any()


def test_a_part_of_one_layer_is_a_layer_elsewhere():
    class Sharing(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.alone = norm, norm.lif

    model, _ = network()
    assert list(neuron_layers(Sharing(model.layer1[0].bn1))) == ["norm", "alone"]


@pytest.mark.parametrize("when", ["before", "after", "within"])
def test_no_hook_is_left_after_an_exception(when):
    model, images = network()

    def fail(*_):
        raise RuntimeError("no")

    def run():
        if when == "within":
            with record_spikes(model):
                assert hooks_of(model) > 5
                fail()
        with forward_hooks(neuron_layers(model), **{when: fail}):
            assert hooks_of(model) > 5
            model(images)

    with pytest.raises(RuntimeError, match="no"):
        run()
    assert hooks_of(model) == 0


def test_no_hook_is_left_where_one_cannot_be_placed():
    model, _ = network()
    with pytest.raises(AttributeError), forward_hooks({"neuron": model.lif, "none": None}, print):
        raise AssertionError("entered")
    assert hooks_of(model) == 0


def test_what_hooks_return_changes_nothing():
    model, images = network()
    with torch.no_grad():
        expected = model(images)
        with forward_hooks(neuron_layers(model), after=lambda *_: 0, before=lambda *_: 0):
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize("change", [lambda model: model, fuse_for_inference, quantize], ids=["plain", "folded", "int8"])
def test_spikes_and_gate_are_those_of_the_network(change):
    model, images = network()
    model = change(model)
    with record_spikes(model) as recording, torch.no_grad():
        logits = model(images)
    assert hooks_of(model) == 0
    assert len(recording.spikes) == 8 and list(recording.spikes)[:2] == ["encoder", "lif"]
    for name, spikes in recording.spikes.items():
        assert spikes.shape[0] == 4 * 2 and spikes.ndim == 4 and spikes.is_floating_point()
        assert name == "encoder" or set(spikes.unique().tolist()) == {0.0, 1.0}
    last = list(recording.spikes.values())[-1]
    features = last.unflatten(0, (4, 2)).mean(0)
    torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-4, atol=1e-4)
    coded = recording.spikes["encoder"].unflatten(0, (4, 2)).transpose(0, 1)  # [B, T, C, H, W]
    fired = coded != 0  # where a neuron fires, the encoder's output is the gate
    assert fired.any() and torch.allclose(recording.gate[fired], coded[fired], atol=1e-6)


def test_threads_record_one_network():
    """Each sees the spikes of its own images alone."""
    model, images = network()
    batches = [images[:1], images[1:], images.flip(0)]

    def recorded(index):
        with record_spikes(model) as recording, torch.no_grad():
            model(batches[index])
            time.sleep(0.002)  # others run in the meantime
        return recording.spikes

    alone = [recorded(index) for index in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            for spikes, expected in zip(pool.map(recorded, range(3)), alone, strict=True):
                assert spikes.keys() == expected.keys()
                assert all(torch.equal(spikes[name], value) for name, value in expected.items())
    assert hooks_of(model) == 0


def test_gate_of_event_frames():
    model, _ = network()
    with record_spikes(model) as recording, torch.no_grad():
        model(torch.randn(3, 4, 3, 16, 16))
    coded = recording.spikes["encoder"].unflatten(0, (4, 3)).transpose(0, 1)
    assert torch.allclose(recording.gate[coded != 0], coded[coded != 0], atol=1e-6) and coded.any()


def test_direct_coding_is_listed_only_where_it_is_asked_for():
    model, images = network(encoder="direct")
    assert next(iter(neuron_layers(model))) == "lif"
    assert list(neuron_layers(model, also=(DirectCoding,)))[:2] == ["encoder", "lif"]
    with record_spikes(model) as recording, torch.no_grad():
        model(images)
    assert recording.gate is None and next(iter(recording.spikes)) == "lif"


class OwnNeuron(nn.Module):
    """A neuron that a user wrote, a loop in PyTorch: members of a `NeuronLayer`, no class of this package."""

    returns_pair = False
    spikes_dtype = None

    def __init__(self, spec, num_steps):
        super().__init__()
        self.spec, self.num_steps = spec, num_steps

    def forward(self, x):
        membrane, spikes = 0.0, []
        for current in x.chunk(self.num_steps):
            membrane = self.spec.decay * membrane + current
            fired = (membrane > self.spec.threshold).to(x.dtype)
            membrane = membrane * (1 - fired)
            spikes.append(fired)
        return torch.cat(spikes)

    def input_current(self, inputs, num_steps):
        return inputs[0].unflatten(0, (num_steps, -1))

    def output_spikes(self, output):
        return output


def test_which_modules_are_neuron_layers():
    model, _ = network()
    folded, integer = fuse_for_inference(copy.deepcopy(model)), quantize(model)
    plain = quantize(timm.create_model("gac_spiking_resnet18"))
    kinds = {type(layer).__name__ for one in (model, folded, integer, plain) for layer in neuron_layers(one).values()}
    expected = {"LIF", "MembraneBatchNormLIF", "BatchNormLIF", "FoldedLIF", "IntegerLIF", "SpikeConv"}
    assert kinds == expected | {"GatedAttentionCoding"}
    for module in (model, model.conv1, model.layer1[0], nn.ReLU(), DirectCoding(4)):
        assert not isinstance(module, NeuronLayer), type(module)
    for name in ("spec", "returns_pair", "spikes_dtype", "input_current", "output_spikes"):
        assert hasattr(OwnNeuron(CIFAR, 2), name)
    assert isinstance(OwnNeuron(CIFAR, 2), NeuronLayer)
    own = OwnNeuron(CIFAR, 2)
    del own.spec
    assert not isinstance(own, NeuronLayer)


def test_time_may_be_an_axis_of_its_own():
    x, residual = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5)
    pairs = [(LIF(), LIF(num_steps=3), (x,)), (BatchNormLIF(4), BatchNormLIF(4, num_steps=3), (x, residual))]
    for apart, folded, inputs in pairs:
        given = [tensor.flatten(0, 1) for tensor in inputs]
        assert torch.equal(apart.eval().input_current(inputs, 3), folded.eval().input_current(tuple(given), 3))
        spikes = folded(*given)
        assert torch.equal(apart.output_spikes(apart(*inputs)), spikes) and folded.output_spikes(spikes) is spikes
        fires = membrane_of(folded.input_current(tuple(given), 3), CIFAR) > CIFAR.threshold
        assert torch.equal(fires.flatten(0, 1), spikes != 0) and spikes.any()


def test_the_tools_see_a_neuron_of_ones_own():
    model, images = network()
    own = copy.deepcopy(model)
    own.lif = OwnNeuron(model.spec, model.num_steps)
    batches = [(images, torch.tensor([0, 1]))]
    with record_spikes(own) as recording, torch.no_grad():
        own(images)
    with record_spikes(model) as expected, torch.no_grad():
        model(images)
    assert list(recording.spikes) == list(expected.spikes)
    assert all(torch.equal(spikes, expected.spikes[name]) for name, spikes in recording.spikes.items())
    assert evaluate(own, batches).firing_rates == evaluate(model, batches).firing_rates
    assert measure_coding(own, [images]) == measure_coding(model, [images])
    inspected = zip(inspect_network(own, [images]).layers, inspect_network(model, [images]).layers, strict=True)
    for mine, theirs in inspected:
        assert mine.name == theirs.name and torch.equal(mine.histogram, theirs.histogram)
    rows = zip(forward_early_exit(own, images, 0.5), forward_early_exit(model, images, 0.5), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in rows)


def test_a_recorder_is_not_reported_as_a_reason_to_be_slow(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=3, num_steps=2).eval()
    images = torch.randn(2, 3, 16, 16)
    with caplog.at_level(logging.INFO, "timm_gac"), torch.no_grad():
        with record_spikes(model):
            model(images)
        assert not caplog.records
        model.layer1[0].bn1.register_forward_hook(lambda *_: None)  # a user's hook is
        model.layer1[0].bn2.norm.register_forward_hook(lambda *_: None)
        model(images)
        assert "has hooks" in caplog.text
