"""Energy: counts by hand, against NeuroBench's and torch's counters, conventions, files, and nothing left behind."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gac_kernels import CIFAR, use_backend
from timm_gac import cli, fuse_for_inference, quantize
from timm_gac.analysis.evaluate import evaluate
from timm_gac.energy import COSTS, EnergyMeter, measure_energy
from timm_gac.energy.counter import Counter
from timm_gac.hub import calibrate
from timm_gac.layers.neuron import LIF


class TwoLayers(nn.Module):
    """A 1x1 convolution on real values, a neuron of two steps, and a linear layer on its spikes."""

    num_steps = 2

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.lif = LIF(CIFAR, 2)
        self.fc = nn.Linear(4, 3, bias=False)
        nn.init.ones_(self.conv.weight)
        nn.init.ones_(self.fc.weight)

    def forward(self, x):
        current = self.conv(x).repeat(2, 1, 1, 1)
        return self.fc(self.lif(current).flatten(1)).unflatten(0, (2, -1)).mean(0)


def small(name, size=16, steps=4, batch=3):
    model = timm.create_model(name, num_steps=steps, num_classes=5)
    images = torch.randn(batch, 3, size, size)
    calibrate(model, [images, images.flip(0)])
    return model, images


def test_two_layers_by_hand():
    # Threshold 1, decay 0.5. 2 fires at steps 1 and 2, 0.9 at step 2 (0.45 + 0.9), 0.5 and 0 never.
    images = torch.tensor([[2.0, 0.9], [0.5, 0.0]]).view(1, 1, 2, 2)
    report = measure_energy(TwoLayers(), [images])
    conv, fc = report.layers
    assert (conv.kind, conv.macs, conv.runs, conv.binary, conv.rate) == ("stem", 4, 1, False, 0.75)
    assert (fc.kind, fc.macs, fc.runs, fc.binary) == ("head", 12, 2, True)
    assert fc.step_rates == (0.25, 0.5) and fc.step_sops == (3, 6) and fc.step_effective == (3, 6)
    totals = report.totals()
    for convention in ("paper", "strict"):
        assert (totals[convention]["macs"], totals[convention]["acs"]) == (4, 9)
        assert totals[convention]["energy_mj"] == pytest.approx((4 * 4.6 + 9 * 0.9) * 1e-9)
        assert report.energy_by_step(convention) == pytest.approx([(18.4 + 2.7) * 1e-9, (18.4 + 8.1) * 1e-9])
    assert (totals["neurobench"]["macs"], totals["neurobench"]["acs"]) == (3, 9)
    assert totals["ann"]["energy_mj"] == pytest.approx(16 * 4.6e-9)
    assert report.dense == 4 + 2 * 12


@pytest.mark.parametrize("name", ["test_gac_msresnet", "spiking_resnet18", "msresnet18"])
def test_dense_macs_are_those_of_torch(name):
    model, images = small(name, size=32)
    report = measure_energy(model, [images])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert sum(layer.macs * layer.runs for layer in report.layers) == counter.get_total_flops() / 2 / len(images)
    assert sum(layer.binary and layer.rate > 0 for layer in report.layers) > 3  # some neurons do fire


@pytest.mark.filterwarnings("ignore:Using padding=.same")
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 4, padding="same", groups=2),
        nn.Conv2d(4, 4, (3, 1), dilation=2, groups=4, bias=False),
        nn.Conv1d(4, 5, 3),
        nn.Linear(7, 5),
    ],
    ids=["strided", "same", "depthwise", "1d", "linear"],
)
def test_products_without_zeros_by_brute_force(layer, pruned):
    shape = {nn.Conv2d: (4, 9, 8), nn.Conv1d: (4, 9), nn.Linear: (7,)}[type(layer)]
    x = torch.randint(-1, 3, (3, 2 * 5, *shape)).float()  # three runs of two steps and a batch of 5
    x[:, :5].clamp_(0, 1)
    layer = copy.deepcopy(layer)
    if pruned:
        layer.weight.data[torch.rand_like(layer.weight) < 0.3] = 0
    assert bool((layer.weight == 0).any()) is pruned
    counter = Counter("layer", layer, "conv")
    for run in x:
        counter.add(run, layer(run), batch=5)
    count = counter.result(images=15, kind="conv")
    ones = copy.deepcopy(layer).double()  # counts the products where both operands are not 0
    ones.weight.data = (layer.weight != 0).double()
    ones.bias = None
    with torch.no_grad():
        products = ones((x != 0).double().flatten(0, 1)).unflatten(0, (3, 2, 5)).flatten(3).sum((0, 2, 3))
        ones.weight.data.fill_(1)
        dense = ones(torch.ones(1, *shape, dtype=torch.float64)).sum().item()
    assert count.step_effective == pytest.approx((products / 15).tolist(), rel=1e-12)
    assert count.step_rates == pytest.approx((x != 0).double().unflatten(1, (2, 5)).mean((0, 2, *range(3, x.ndim + 1))))
    assert count.dense == 2 * dense and count.binary is False
    binary = Counter("layer", layer, "conv")
    binary.add(-x[0].clamp(-1, 1), layer(x[0]), batch=5)
    assert binary.result(5, "conv").binary is True


@pytest.mark.filterwarnings("ignore")  # of packages that the counter imports
@pytest.mark.parametrize("name", ["test_gac_msresnet", "msresnet18", "gac_spiking_resnet18"])
def test_neurobench_agrees(name):
    # `pip install --no-deps neurobench snntorch` is enough: what else neurobench asks for is for its data sets.
    for package in ("neurobench", "snntorch"):
        pytest.importorskip(package, reason="needs: pip install --no-deps neurobench snntorch")
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    model, images = small(name, size=32)
    report = measure_energy(model, [images])
    wrapped = TorchModel(model)
    wrapped.register_hooks()
    with torch.no_grad():
        theirs = SynapticOperations()(wrapped, wrapped(images), (images, None))
    ours = report.totals()["neurobench"]
    assert ours["macs"] == pytest.approx(theirs["Effective_MACs"], rel=1e-3)
    assert ours["acs"] == pytest.approx(theirs["Effective_ACs"], rel=1e-3) and ours["acs"] > 0
    assert report.dense == pytest.approx(theirs["Dense"], rel=1e-3)


def test_operands_are_measured_not_assumed():
    model, images = small("test_gac_msresnet")
    layers = {layer.name: layer for layer in measure_energy(model, [images]).layers}
    assert {name: layer.binary for name, layer in layers.items() if "layer1" in name} == {
        "layer1.0.conv1": True,
        "layer1.0.conv2": True,
        "layer1.0.downsample.0": False,
    }
    once = [name for name, layer in layers.items() if layer.runs == 1]
    assert once == ["conv1", "encoder.spatial.conv_a", "encoder.spatial.conv_b", "fc"]
    strict = measure_energy(model, [images]).operations("strict")
    assert sum(strict["layer1.0.downsample.0"].acs) == 0 == sum(strict["layer2.0.conv1"].macs)


def test_batches_add_up_and_the_network_is_left_as_it_was():
    model, images = small("test_gac_msresnet", batch=4)
    with torch.no_grad():
        before = model(images)
    whole, parts = measure_energy(model, [images]), measure_energy(model, images.split(2))
    assert whole.totals()["strict"] == pytest.approx(parts.totals()["strict"])
    assert whole.images == parts.images == 4
    assert not any(module._forward_hooks for module in model.modules()) and "forward" not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(images), before)


def test_frames_run_the_stem_at_every_step():
    model, images = small("test_gac_msresnet")
    frames = images.unsqueeze(1).repeat(1, 4, 1, 1, 1)
    static, moving = measure_energy(model, [images]), measure_energy(model, [frames])
    assert moving.layers[0].runs == 4 * static.layers[0].runs == 4
    assert moving.totals()["paper"]["macs"] == 4 * static.totals()["paper"]["macs"]


def test_errors_say_what_to_do():
    model, images = small("test_gac_msresnet")
    with pytest.raises(ValueError, match="expected a meter that has seen images"):
        EnergyMeter(model).report()
    with pytest.raises(ValueError, match="expected costs as one of"):
        measure_energy(model, [images], costs="3nm")
    with pytest.raises(ValueError, match="expected num_steps"):
        EnergyMeter(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="expected a network with"):
        EnergyMeter(nn.ReLU(), num_steps=2)


def test_command_writes_what_it_measured(tmp_path: Path, capsys):
    from PIL import Image

    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    for index in range(3):
        noise = (torch.rand(32, 32, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    out = tmp_path / "out"
    arguments = ["energy", "test_gac_msresnet", "--data", str(tmp_path), "--out", str(out)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "layer2.0.conv2" in shown and "random (seed 0), batch-norm statistics of these images" in shown
    report = json.loads((out / "energy.json").read_text())
    assert report["images"] == 3 and report["costs"]["mac_pj"] == pytest.approx(COSTS["45nm-float32"].mac_pj)
    rows = report["layers"]
    assert sum(row["strict_mj"] for row in rows) == pytest.approx(report["energy_mj"]["strict"])
    assert len((out / "energy.csv").read_text().splitlines()) == len(rows) + 1
    assert (out / "energy.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err


def test_folded_network_counts_the_same():
    model, images = small("test_gac_msresnet")
    before = measure_energy(model, [images])
    after = measure_energy(fuse_for_inference(model), [images])
    assert [layer.name for layer in before.layers] == [layer.name for layer in after.layers]
    for one, other in zip(before.layers, after.layers, strict=True):
        assert (one.macs, one.runs, one.binary, one.kind) == (other.macs, other.runs, other.binary, other.kind)
        assert one.rate == pytest.approx(other.rate, abs=2e-3)  # a spike at the threshold may flip
    assert before.totals()["strict"] == pytest.approx(after.totals()["strict"], rel=5e-3)


def test_triton_kernels_count_the_same(device):
    model, images = (made.to(device) for made in small("test_gac_msresnet", size=8, batch=2))
    reports = []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            reports.append(measure_energy(model, [images]))
    assert reports[0].totals()["strict"] == pytest.approx(reports[1].totals()["strict"], rel=1e-3)
    assert reports[1].totals()["strict"]["acs"] > 0


@pytest.fixture
def one_thread():
    """Then time spent by the process is time spent computing, whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_evaluation_with_a_meter_is_hardly_slower():
    # Few images, so that what a report costs, asked for after each batch, shows too.
    model, images = small("gac_msresnet18", size=160, steps=4, batch=2)
    batches = [(images, torch.zeros(2, dtype=torch.long))]
    plain, metered, meter = [], [], EnergyMeter(model)
    for _ in range(4):
        start = time.process_time()
        alone = evaluate(model, batches)
        middle = time.process_time()
        with meter:
            watched = evaluate(model, batches)
        report = meter.report()
        plain.append(middle - start)
        metered.append(time.process_time() - middle)
        assert watched.firing_rates == alone.firing_rates
    assert report.images == 8
    # 1.25 to 1.33 on a core of its own, more where another process shares the memory.
    assert min(metered) < 1.45 * min(plain), (plain, metered)


def test_integer_network_counts_what_its_float_network_does():
    model, images = small("test_gac_msresnet")
    with torch.no_grad():
        rounded = quantize(model)
    before, after = measure_energy(model, [images]), measure_energy(rounded, [images])
    counted = {layer.name.replace("downsample", "downsample.0"): layer for layer in after.layers}
    assert {layer.name for layer in before.layers} == counted.keys()
    for one in before.layers:
        other = counted[one.name]
        assert (one.kind, one.macs, one.runs, one.binary, one.dense) == (
            other.kind,
            other.macs,
            other.runs,
            other.binary,
            other.dense,
        )
        assert one.rate == pytest.approx(other.rate, abs=0.1)  # rounded weights: other spikes, as many
    assert after.totals()["strict"]["acs"] > 0
