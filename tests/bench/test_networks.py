"""The networks of the model benchmark: baselines that compute the same, the floor, and the ANN of the same shape."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from gac_kernels import CIFAR
from timm_gac.bench import model as bench_model
from timm_gac.bench import steps as bench_steps
from timm_gac.bench.baselines import LEARNED, LoopNeuron, TimeMajorNet
from timm_gac.bench.harness import measure_saved_bytes
from timm_gac.bench.networks import NETWORKS, ConvolutionsOnly, Unavailable
from timm_gac.models.published import Encoding
from tiny_bench import TINY, prepared


def test_packed_and_fused_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared("test_gac_msresnet", 8)
    packed: list[bool] = []
    monkeypatch.setattr(type(model), "set_spike_packing", lambda self, enable: packed.append(enable), raising=False)
    NETWORKS["timm_gac_packed"](model, "test_gac_msresnet", "train")
    assert packed == [True]
    with pytest.raises(Unavailable, match="backward"):
        NETWORKS["timm_gac_packed"](model, "test_gac_msresnet", "infer")


@pytest.mark.parametrize(
    ("name", "size", "networks"),
    [
        ("gac_msresnet18_cifar", 8, ("timm_gac", "published", "spikingjelly")),
        ("msresnet18", 32, ("timm_gac", "published")),
        ("gac_spiking_resnet18", 32, ("timm_gac", "spikingjelly", "spikingjelly_memopt", "spikingjelly_plif")),
        ("test_gac_msresnet", 8, ("timm_gac", "spikingjelly", "spikingjelly_memopt", "spikingjelly_plif")),
    ],
)
def test_baselines_compute_the_same(name: str, size: int, networks: tuple[str, ...]) -> None:
    model, images = prepared(name, size, num_steps=3, num_classes=7)
    reference = TimeMajorNet(model, LoopNeuron(model.spec))
    logits = reference.double().eval()(images.double())
    assert logits.std(0).mean() > 1e-3  # the network is alive: images differ
    for network in networks:
        if network.startswith("spikingjelly") and importlib.util.find_spec("spikingjelly") is None:
            continue
        built = NETWORKS[network](model, name, "train").double().eval()
        for key, value in built.named_parameters():
            if key.endswith(".w"):  # whose sigmoid is 1 - decay in float64 too
                torch.nn.init.constant_(value, math.log(1 / model.spec.decay - 1))
        assert (built(images.double()) - logits).norm() <= 1e-9 * logits.norm(), network


def test_gradients_of_baselines_divide_by_no_count_of_maxima() -> None:
    """As that of amax does, with which compiled baselines trained to NaN in bfloat16."""
    model = timm.create_model("test_gac_msresnet")
    encoders = (
        (TimeMajorNet(model, LoopNeuron(CIFAR)).encoder, torch.randn(2, model.conv1.out_channels, 8, 8)),
        (Encoding(4, 8, CIFAR), torch.randn(2, 4, 8, 8, 8)),
    )
    for encoder, stem in encoders:
        names = {str(node.target) for node in torch.export.export(encoder, (stem,)).graph.nodes}
        assert "aten.max.dim" in names and "aten.amax.default" not in names, names


def test_memory_optimiser_saves_memory_and_nothing_else() -> None:
    pytest.importorskip("spikingjelly")
    model, images = prepared("test_gac_msresnet", 16)
    networks = {n: NETWORKS[n](model, "test_gac_msresnet", "train") for n in ("spikingjelly", "spikingjelly_memopt")}
    saved, gradients = {}, {}
    for name, network in networks.items():
        saved[name] = measure_saved_bytes(lambda network=network: network.train()(images))
        network.zero_grad()
        network(images).square().sum().backward()
        gradients[name] = {
            key.removesuffix("weight").replace("_checkpoint_wrapped_module.", ""): parameter.grad
            for key, parameter in network.named_parameters()
            if key.endswith("weight")
        }
    assert saved["spikingjelly_memopt"] < 0.5 * saved["spikingjelly"]
    plain, optimized = gradients.values()
    assert plain.keys() == optimized.keys() and all(grad.abs().sum() > 0 for grad in plain.values())
    for key, grad in plain.items():
        torch.testing.assert_close(optimized[key], grad, rtol=1e-4, atol=1e-6)
    statistics = [
        {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in network.named_buffers()}
        for network in networks.values()
    ]
    assert statistics[0].keys() == statistics[1].keys()
    for key, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][key], value)  # not counted twice by the second forward pass
    rows, _ = bench_model.bench_model(replace(TINY, providers=("spikingjelly_memopt",)))
    assert [row["status"] for row in rows] == ["ok", "skipped"] and "training" in rows[1]["note"]


def test_networks_that_learn_decays() -> None:
    """Each layer learns its own, which begins with the spec's; both pass the check that precedes times."""
    names = ["timm_gac_plif"] + (["spikingjelly_plif"] if importlib.util.find_spec("spikingjelly") else [])
    for name, layers in (("test_gac_msresnet", 8), ("gac_spiking_resnet18", 17)):
        model, images = prepared(name, 32)
        for network in names:
            built = NETWORKS[network](model, name, "train")
            learned = {key: value for key, value in built.named_parameters() if LEARNED.search(key)}
            step = bench_steps.make_step(built, "train", "float32", torch.device("cpu"), compiled=False)
            step(images, torch.zeros(len(images), dtype=torch.long))
            assert len(learned) == (layers if network == "spikingjelly_plif" else 2 * layers), list(learned)
            assert all(value.grad is not None and value.grad.abs() > 0 for value in learned.values())
    rows, _ = bench_model.bench_model(replace(TINY, providers=tuple(names)))
    assert [row["status"] for row in rows] == ["ok"] * len(names) + ["skipped"] * len(names), rows
    assert "learned in training" in rows[-1]["note"]


def test_floor_runs_every_convolution_and_its_gradients() -> None:
    model, images = prepared("gac_msresnet18_cifar", 8, num_steps=2)
    floor = ConvolutionsOnly(model)
    shapes = sorted(tuple(weight.shape) for weight in floor.parameters() if weight.ndim == 4)
    assert shapes == sorted(tuple(weight.shape) for weight in model.parameters() if weight.ndim == 4)
    floor(images).square().sum().backward()
    assert [name for name, weight in floor.named_parameters() if not weight.grad.abs().sum() > 0] == []


def test_ann_has_the_shape_of_the_spiking_network() -> None:
    for name, size in (("gac_msresnet18_cifar", 8), ("gac_msresnet34", 32), ("test_gac_msresnet", 8)):
        model = timm.create_model(name)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for kind, network in (("ann", NETWORKS["ann"](model, name, "infer")), ("ours", model)):
            sizes = shapes.setdefault(kind, [])
            for module_name, module in network.named_modules():
                # 3x3 only: where timm pools, the spiking network has a stride and so one more 1x1 shortcut.
                if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module_name.startswith("layer"):
                    module.register_forward_hook(lambda m, i, o, s=sizes: s.append((*m.weight.shape, *o.shape[2:])))
            with torch.no_grad():
                network.eval()(torch.randn(1, 3, size, size))
        assert sorted(shapes["ann"]) == sorted(shapes["ours"]) and len(shapes["ann"]) >= 6


def test_ann_of_a_shape_that_timm_has_not_is_unavailable() -> None:
    model = timm.create_model("test_gac_msresnet", strides=(1, 1, 2))
    with pytest.raises(Unavailable, match="timm's ResNet has no such shape: expected strides 1 or 2 of the first"):
        NETWORKS["ann"](model, "test_gac_msresnet", "train")


def test_ann_is_given_every_pass_and_counted_by_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, ...]] = []

    class Ann(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batches.append(tuple(x.shape))
            return self.fc(x.mean((2, 3)))

    monkeypatch.setitem(NETWORKS, "ann", lambda model, name, mode: Ann())
    rows, _ = bench_model.bench_model(replace(TINY, modes=("infer",), num_steps=(3,), providers=("ann",)))
    assert set(batches) == {(9, 3, 8, 8)}
    assert rows[0]["images_per_s"] == pytest.approx(3e3 / rows[0]["median_ms"])
