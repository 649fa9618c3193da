"""Early exit: by hand; the logits of the whole pass, step by step; and no work for samples that have left."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from timm_gac import fuse_for_inference, quantize
from timm_gac.hub import calibrate
from timm_gac.inference import fold as inference
from timm_gac.inference.early_exit import early_exit, forward_early_exit
from timm_gac.inference.integer import SpikeConv
from timm_gac.inference.record import membrane_of


def network(encoder="gac", name="test_gac_msresnet", **kwargs):
    model = timm.create_model(name, num_steps=4, num_classes=3, encoder=encoder, **kwargs)
    images = torch.randn(6, 3, 16, 16)
    calibrate(model, [images, images.flip(0)])
    torch.nn.init.normal_(model.fc.weight, std=5.0)  # some images leave at once, others late or never
    return model, images


def fused(model):
    return fuse_for_inference(model)


def fused_as_on_a_gpu(model):
    return fuse_for_inference(model)


def same(model):
    return model


def test_early_exit_by_hand():
    high, even = math.log(9.0), 0.0  # two classes: 9 to 1 is a probability of 0.9
    logits = torch.tensor([
        [[2 * high, even], [even, even], [even, even]],  # 0.988 at once
        [[high, even], [high, even], [high, even]],  # 0.9 at every step
        [[even, even], [even, 2 * high], [even, even]],  # means 0, 9 to 1 for the second class, then less
        [[even, even], [even, even], [even, high]],  # never: runs to the end
    ])  # fmt: skip
    out = early_exit(logits, 0.899)
    assert out.steps.tolist() == [1, 1, 2, 3]
    assert out.confidence.tolist() == pytest.approx([81 / 82, 0.9, 0.9, 9 ** (1 / 3) / (1 + 9 ** (1 / 3))])
    assert out.logits.argmax(1).tolist() == [0, 0, 1, 1]
    assert torch.allclose(out.logits[2], torch.tensor([0.0, high]))
    assert early_exit(logits, 0.95).steps.tolist() == [1, 3, 3, 3]


def test_early_exit_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"expected logits \(B, T, classes\)"):
        early_exit(torch.zeros(2, 3), 0.9)
    for confidence in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a confidence above 0"):
            early_exit(torch.zeros(1, 2, 3), confidence)


@pytest.mark.parametrize("encoder", ["gac", "direct"])
@pytest.mark.parametrize("change", [same, fused, fused_as_on_a_gpu, quantize], ids=["plain", "fused", "gpu", "int8"])
@pytest.mark.parametrize("name", ["test_gac_msresnet", "gac_spiking_resnet18"])
def test_steps_are_those_of_the_whole_pass(name, change, encoder, monkeypatch):
    if change is fused_as_on_a_gpu:  # there the neuron adds the shift, and convolution and neuron are one op
        monkeypatch.setattr(inference, "shift_in_neuron", lambda x: True)
    narrow = {} if name.startswith("test_") else dict(stem_width=16, channels=(16, 24, 32, 48))
    model, images = network(encoder, name, **narrow)
    model = change(model)
    with torch.no_grad():
        whole = model.forward_steps(images)
    assert torch.unique(whole[:, 1:] - whole[:, :-1]).numel() > 1  # what neurons carry over matters
    confidences = torch.stack([early_exit(whole[:, :t], 1.0).confidence for t in range(1, 5)])
    # Some leave at once and some do not, and no rounding takes a confidence to the other side.
    least, most = confidences[0].aminmax()
    between = confidences[(confidences >= least) & (confidences <= most)].sort().values
    widest = between.diff().argmax()
    at = between[widest : widest + 2].mean().item()
    expected = early_exit(whole, at)
    rows = forward_early_exit(model, images, at)
    assert [len(row) for row in rows] == expected.steps.tolist() and len(set(map(len, rows))) > 1
    for row, steps in zip(rows, whole, strict=True):
        torch.testing.assert_close(row, steps[: len(row)], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model.forward_steps(images), whole)  # the network is as before


@pytest.mark.parametrize("change", [same, fused, quantize], ids=["plain", "fused", "int8"])
def test_threads_share_one_network(change):
    """Each thread gets its own answers, beside threads that run all steps, and finds the network as it was."""
    model, images = network()
    model = change(model)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    batches = [images, images.flip(0)[:4], images[2:3]]
    with torch.no_grad():
        whole = [model.forward_steps(batch) for batch in batches]
    alone = [forward_early_exit(model, batch, 0.9) for batch in batches]

    def early(index):
        rows = forward_early_exit(model, batches[index], 0.9)
        return all(torch.equal(row, expected) for row, expected in zip(rows, alone[index], strict=True))

    @torch.no_grad()
    def all_steps(index):
        return torch.equal(model.forward_steps(batches[index]), whole[index])

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(run, index % 3) for index in range(30) for run in (early, all_steps)]
        assert all(call.result() for call in calls)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before


def test_stepped_neurons_are_no_news_for_the_log(monkeypatch, caplog):
    monkeypatch.setattr(sys.modules[fuse_for_inference.__module__], "shift_in_neuron", lambda x: True)
    model, images = network()
    fuse_for_inference(model)
    with caplog.at_level("INFO", logger="timm_gac"):
        forward_early_exit(model, images, 1.0)
    assert not caplog.text


def test_the_network_is_never_changed():
    model, images = network()
    seen = []

    def look(module, inputs, output):
        seen.append(any("forward" in vars(part) for part in model.modules()))

    model.layer1[0].conv1.register_forward_hook(look)
    forward_early_exit(model, images, 1.0)
    assert seen == [False] * 4


def test_what_left_is_not_computed():
    model, images = network()
    rows = []
    model.layer2[0].conv1.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    with torch.no_grad():
        first = early_exit(model.forward_steps(images)[:, :1], 1.0).confidence.sort().values
    rows.clear()
    between = ((first[2] + first[3]) / 2).item()
    out = forward_early_exit(model, images, between)
    running = [sum(len(row) > step for row in out) for step in range(4)]
    assert rows == [count for count in running if count] and rows[:2] == [6, 3]
    rows.clear()
    assert [len(row) for row in forward_early_exit(model, images, 1e-9)] == [1] * 6 and rows == [6]


def test_event_frames_and_16_bit_exit_too():
    model, images = network()
    frames = torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        whole = model.forward_steps(frames)
    for row, steps in zip(forward_early_exit(model, frames, 1.0), whole, strict=True):
        torch.testing.assert_close(row, steps[: len(row)], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole = model.forward_steps(images)
        rows = forward_early_exit(model, images, 1e-9)
    torch.testing.assert_close(torch.cat(rows), whole[:, 0])


def test_integer_currents_leave_no_rounding():
    model, images = network()
    model = quantize(model)
    checked = 0

    def check(module, inputs, output):
        nonlocal checked
        fired = membrane_of(module.input_current(inputs, 4), module.spec) > module.spec.threshold
        spikes = output[-1] if isinstance(output, tuple) else output
        assert torch.equal(fired.flatten(0, 1), spikes.bool()) and spikes.any()
        checked += 1

    layers = [module for module in model.modules() if isinstance(module, SpikeConv)]
    for module in layers:
        module.register_forward_hook(check)
    with torch.no_grad():
        model(images)
    assert checked == len(layers) > 3


def test_it_refuses_what_it_cannot_step():
    model, images = network()
    for confidence in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a confidence above 0"):
            forward_early_exit(model, images, confidence)
    with pytest.raises(ValueError, match="expected a plain spiking ResNet"):
        forward_early_exit(torch.nn.Identity(), images, 0.9)
    model.set_spike_packing(True)
    with pytest.raises(ValueError, match="without packed spikes"):
        forward_early_exit(model, images, 0.9)
    model.set_spike_packing(False)
    with pytest.raises(ValueError, match="eval mode"):
        forward_early_exit(model.train(), images, 0.9)
