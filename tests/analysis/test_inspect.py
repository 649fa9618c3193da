"""Inspection: membranes against the neurons' own spikes, counts by hand, every model, the page and its files."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import timm
import torch

from gac_kernels import CIFAR
from timm_gac import cli, fuse_for_inference
from timm_gac.analysis.inspect import inspect_network, write_inspection
from timm_gac.analysis.inspect.figures import draw_health
from timm_gac.analysis.inspect.record import BINS, HIGH, LOW
from timm_gac.cli.inspect import InspectConfig, run_inspect
from timm_gac.hub import calibrate
from timm_gac.inference.record import membrane_of, neuron_layers


def small(name="test_gac_msresnet", size=16, batch=3, **kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs)
    images = torch.randn(batch, 3, size, size)
    return calibrate(model, [images, images.flip(0)]), images


def test_membrane_by_hand():
    # Threshold 1, decay 0.5: 0.9, then 0.45 + 0.9 = 1.35 fires and resets, then 0.9 again. The threshold itself: never.
    current = torch.tensor([[0.9, 1.0, 2.0], [0.9, 0.5, 0.5], [0.9, 0.25, -1.0]])
    expected = torch.tensor([[0.9, 1.0, 2.0], [1.35, 1.0, 0.5], [0.9, 0.75, -0.75]])
    assert torch.allclose(membrane_of(current, CIFAR), expected)


@pytest.mark.parametrize("folded", [False, True], ids=["batch-norm", "folded"])
@pytest.mark.parametrize("name", ["test_gac_msresnet", "spiking_resnet18", "msresnet18", "gac_spiking_resnet18"])
def test_membranes_above_the_threshold_are_the_spikes(name, folded):
    model, images = small(name, 32, 2)
    model = fuse_for_inference(model) if folded else model
    seen = {}

    def check(layer):
        def hook(module, inputs, output):
            fires = membrane_of(module.input_current(inputs, 4), module.spec) > module.spec.threshold
            seen[layer] = (fires.flatten(0, 1) != (module.output_spikes(output) != 0)).float().mean().item()

        return hook

    for layer, module in neuron_layers(model).items():
        module.register_forward_hook(check(layer))
    with torch.no_grad():
        model(images)
    assert len(seen) > 5 and max(seen.values()) < 1e-4, seen  # a rounding apart at the threshold at most


def test_rates_dead_and_saturated_are_those_of_the_spikes():
    model, images = small(batch=4)
    kept = {}
    handle = model.layer2[0].bn1.register_forward_hook(
        lambda _m, _i, output: kept.update(x=output.unflatten(0, (4, 4)))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    spikes = kept["x"]
    whole, parts = inspect_network(model, [images]), inspect_network(model, images.split(1))
    for inspection in (whole, parts):
        assert inspection.images == 4
        layer = next(layer for layer in inspection.layers if layer.name == "layer2.0.bn1")
        assert layer.step_rates == pytest.approx(spikes.mean((1, 2, 3, 4)).tolist())
        assert layer.dead == pytest.approx((spikes.sum((0, 1)) == 0).float().mean().item()) and layer.dead > 0
        assert layer.saturated == pytest.approx((spikes.amin((0, 1)) == 1).float().mean().item())
        assert torch.equal(layer.spikes, spikes[:, 0] != 0)
        above = layer.histogram[round((1 - LOW) / (HIGH - LOW) * BINS) :].sum().item()
        assert above == pytest.approx(layer.rate, abs=2e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_gate_and_scores_are_the_networks():
    model, images = small()
    inspection = inspect_network(model, [images])
    with torch.no_grad():
        coded = model.encoder(model.bn1(model.conv1(images)))[:, 0]
        logits = model(images)[0]
    assert torch.allclose(inspection.coded, coded.mean(1), atol=1e-6)
    assert torch.allclose(inspection.scores[-1], logits.softmax(0), atol=1e-5)
    assert inspection.gate.shape == (4, 16, 16) and inspection.temporal.std() > 0
    fired = coded != 0  # where a neuron fires, the output is the gate
    full = (
        inspection.temporal[:, None, None, None] * model.encoder.spatial(model.bn1(model.conv1(images)))[0]
    ).sigmoid()
    assert torch.allclose(full[fired], coded[fired], atol=1e-6)


def test_event_frames_are_inspected_too():
    model, images = small()
    frames = images.unsqueeze(1) * torch.rand(3, 4, 1, 1, 1)
    inspection = inspect_network(model, [frames])
    assert inspection.picture.shape == (16, 16, 3) and inspection.gate.std(0).max() > 0


@pytest.mark.parametrize("name", timm.list_models(module="spiking_resnet"))
def test_every_model_is_inspected(name):
    model, images = small(name, 32, 1)
    inspection = inspect_network(model, [images])
    assert [layer.name for layer in inspection.layers] == list(neuron_layers(model))
    assert sum(layer.rate > 0.01 for layer in inspection.layers) > len(inspection.layers) / 2
    assert all(layer.histogram.sum().item() == pytest.approx(1) for layer in inspection.layers)


@pytest.mark.parametrize("name", ["test_gac_msresnet", "spiking_resnet18"])
def test_page_needs_no_other_file(name, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    model, images = small(name, 32, 1)
    files = write_inspection(inspect_network(model, [images], "a <test>"), tmp_path)
    page = files[0].read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    gated = name.startswith(("gac", "test_gac"))
    assert len(pictures) == len(list(tmp_path.glob("*.png"))) == 5 + gated
    assert base64.b64decode(pictures[0]) == (tmp_path / "answer.png").read_bytes()
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page and "a &lt;test&gt;" in page
    numbers = json.loads((tmp_path / "inspect.json").read_text())
    assert len(numbers["layers"]) == len(neuron_layers(model)) and (numbers["temporal_score"] is not None) == gated


def test_command_reads_a_picture(tmp_path: Path, capsys):
    from PIL import Image

    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    Image.fromarray((torch.rand(40, 50, 3) * 255).to(torch.uint8).numpy()).save(tmp_path / "a.png")
    arguments = ["inspect", "test_gac_msresnet", str(tmp_path / "a.png"), "--out", str(tmp_path / "page")]
    assert cli.main(arguments) == 0
    assert "random (seed 0), batch-norm statistics of these images" in (tmp_path / "page" / "index.html").read_text()
    assert cli.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments[:2], str(tmp_path / "b.png"), "--out", str(tmp_path / "c")]) == 2


def test_classes_have_the_names_of_the_published_weights(tmp_path: Path):
    from PIL import Image

    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    Image.fromarray((torch.rand(32, 32, 3) * 255).to(torch.uint8).numpy()).save(tmp_path / "a.png")
    seen = run_inspect("gac_msresnet18_cifar.cifar100", str(tmp_path / "a.png"), InspectConfig(out=tmp_path / "page"))
    assert seen.label_names[:2] == ("apple", "aquarium_fish") and len(seen.label_names) == 100


def test_errors_say_what_to_do():
    model, images = small()
    with pytest.raises(ValueError, match="expected at least one image"):
        inspect_network(model, [])
    with pytest.raises(ValueError, match="expected a network in eval mode"):
        inspect_network(model.train(), [images])
    with pytest.raises(ValueError, match="expected a network of this package"):
        inspect_network(torch.nn.ReLU(), [images])


@pytest.mark.parametrize(("batch", "images"), [(1, "this one image"), (3, "these 3 images")])
def test_dead_neurons_are_those_of_so_many_images(batch, images):
    model, pictures = small(batch=batch)
    figure = draw_health(inspect_network(model, [pictures]))
    assert figure.axes[0].get_xlabel() == f"share of neurons; dead: silent on {images}"
