"""Learned decay and threshold in modules and networks: start, gradients, weight files, folding, integers, tools."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac
from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif_reference
from timm_gac import LIF, BatchNormLIF
from timm_gac.analysis.inspect.record import _Sums
from timm_gac.hub import load_model, save_model_folder
from timm_gac.hub.open import calibrate
from timm_gac.inference.early_exit import forward_early_exit
from timm_gac.inference.quantize import dequantize
from timm_gac.inference.record import record_spikes
from timm_gac.layers.learned import NEURONS, LearnedValues
from timm_gac.train.optim import create_optimizer
from timm_gac.train.recipes import _CHOICES, Recipe
from timm_gac.train.setup import create_network

KINDS = {"plif": "layer", "plif_channel": "channel"}
T = 3


def network(neuron: str, name: str = "test_gac_msresnet", **kwargs) -> nn.Module:
    """A network whose neurons fire and have learned something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, neuron=neuron, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnedValues):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return calibrate(model, [images()])


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "spec", [CIFAR, IMAGENET, LIFSpec(threshold=0.37, decay=0.83)], ids=["cifar", "imagenet", "odd"]
)
def test_they_start_at_the_spec(spec: LIFSpec) -> None:
    learned = LIF(spec, learnable="channel", channels=4).learned
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(learned.decay, torch.full((4,), spec.decay), rtol=ulp, atol=0)
    torch.testing.assert_close(learned.threshold, torch.full((4,), spec.threshold), rtol=ulp, atol=0)
    x = torch.randn(T, 2, 4, 5)
    assert torch.equal(LIF(spec)(x), LIF(spec, learnable="layer")(x)) or spec not in (CIFAR, IMAGENET)


def _set(decay: float, threshold: float) -> None:
    LIF(learnable="layer").learned.set_values(torch.tensor([decay]), torch.tensor([threshold]))


def test_what_cannot_be_learned_is_named() -> None:
    for call, message in (
        (lambda: LIF(LIFSpec(decay=1.0), learnable="layer"), "a decay between 0 and 1 to learn from, got 1.0"),
        (lambda: LIF(LIFSpec(decay=0.0), learnable="layer"), "a decay between 0 and 1 to learn from, got 0.0"),
        (lambda: LIF(LIFSpec(decay=1.0 - 1e-10), learnable="layer"), r"in torch.float32, got \[1.0\] from the spec's"),
        (lambda: LIF(LIFSpec(decay=1e-60), learnable="channel", channels=2), "in torch.float32, got .0.0. from"),
        (lambda: LIF(LIFSpec(threshold=1e-60), learnable="layer"), "finite thresholds > 0 in torch.float32"),
        (lambda: LIF(LIFSpec(threshold=1e60), learnable="layer"), "finite thresholds > 0 in torch.float32"),
        (lambda: _set(1.0, 1.0), r"decays between 0 and 1 in torch.float32, got \[1.0\]"),
        (lambda: _set(0.5, 0.0), r"finite thresholds > 0 in torch.float32, got \[0.0\]"),
        (lambda: LIF(learnable="channel"), "channels as an integer"),
        (lambda: LIF(learnable="neuron"), "learnable out of"),
        (lambda: LIFSpec(decay=nn.Parameter(torch.tensor(0.5))), "neuron='plif' of a network"),
        (lambda: timm.create_model("test_gac_msresnet", neuron="relu"), "neuron 'lif' or 'plif' or 'plif_channel'"),
        (lambda: Recipe(neuron="relu"), "neuron out of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("learnable", ["layer", "channel"])
def test_batch_norm_lif_is_its_composition(learnable: str) -> None:
    """With and without the fused kernel, outputs and all gradients."""
    torch.manual_seed(0)
    fused = BatchNormLIF(5, CIFAR, T, learnable=learnable, dtype=torch.float64)
    nn.init.normal_(fused.lif.learned.decay_logit), nn.init.normal_(fused.lif.learned.threshold_raw)
    watched = copy.deepcopy(fused)
    watched.lif.register_forward_hook(lambda *_: None)
    x = torch.randn(T * 4, 5, 3, 3, dtype=torch.float64)
    plain = nn.BatchNorm2d(5, dtype=torch.float64)
    named = {"decay": fused.lif.learned.decay, "threshold": fused.lif.learned.threshold}
    expected = lif_reference(plain(x).unflatten(0, (T, 4)), CIFAR, **named).flatten(0, 1)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(fused.lif.learned.parameters()), grad)
    for module in (fused, watched):
        spikes = module(x)
        assert torch.equal(spikes, expected)
        for got, want in zip(
            torch.autograd.grad(spikes, list(module.lif.learned.parameters()), grad), wanted, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("neuron", KINDS)
def test_weights_with_and_without_load_into_each_other(neuron: str, caplog: pytest.LogCaptureFixture) -> None:
    """A new network with learned neurons computes what the old one does, to the bit; a folder keeps all."""
    fixed = calibrate(timm.create_model("test_gac_msresnet", num_classes=10), [images()])
    learning = timm.create_model("test_gac_msresnet", num_classes=10, neuron=neuron).eval()
    with caplog.at_level(logging.WARNING):
        learning.load_state_dict(fixed.state_dict())
        fixed.load_state_dict(learning.state_dict())
    assert [record.message.split()[0] for record in caplog.records] == ["Kept", "Left"]
    assert torch.equal(learning(images()), fixed(images()))
    of_channels = timm.create_model("test_gac_msresnet", num_classes=10, neuron="plif_channel")
    of_channels.load_state_dict(learning.state_dict())
    assert torch.equal(of_channels.eval()(images()), learning(images()))
    of_channels.load_state_dict(learning.state_dict(), assign=True)
    for parameter in of_channels.parameters():
        parameter.data.add_(1.0)  # an optimiser can write each of them


def test_weights_of_channels_into_layers_are_their_mean(caplog: pytest.LogCaptureFixture, tmp_path) -> None:
    """Also from a folder, with ``--init``; the state_dict that was given stays as it was."""
    channels = network("plif_channel")
    given = channels.state_dict()
    layers = timm.create_model("test_gac_msresnet", num_classes=10, neuron="plif")
    with caplog.at_level(logging.WARNING):
        layers.load_state_dict(given)
    assert [record.message for record in caplog.records] == [
        "Took the mean over the channels of the learned decays and thresholds of 8 layers: create the network with "
        "neuron='plif_channel' to keep one a channel"
    ]
    save_model_folder(channels, tmp_path / "model")
    init = Recipe(model="test_gac_msresnet", neuron="plif", init=f"local-dir:{tmp_path / 'model'}")
    for loaded in (layers, create_network(init, 10, 3)):
        pairs = [(a, b) for a, b in zip(loaded.modules(), channels.modules(), strict=True)]
        learned = [(a, b) for a, b in pairs if isinstance(b, LearnedValues)]
        assert len(learned) == 8
        for one, many in learned:
            assert len(many.decay) > 1 and many.decay_logit is not one.decay_logit
            torch.testing.assert_close(one.decay, many.decay.mean(0, keepdim=True))
            torch.testing.assert_close(one.threshold, many.threshold.mean(0, keepdim=True))
    assert all(torch.equal(given[name], value) for name, value in network("plif_channel").state_dict().items())


@pytest.mark.parametrize("neuron", KINDS)
def test_a_network_without_memory_starts_at_the_spec(neuron: str) -> None:
    """Weights without learned values, assigned to a network on the meta device: nothing stays there."""
    fixed = calibrate(timm.create_model("test_gac_msresnet", num_classes=10), [images()])
    empty = timm.create_model("test_gac_msresnet", num_classes=10, neuron=neuron, device="meta").eval()
    empty.load_state_dict(fixed.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())
    assert torch.equal(empty(images()), fixed(images()))


def test_gradients_keep_the_dtype_of_what_is_learned() -> None:
    layer = LIF(learnable="layer")
    layer(torch.randn(3, 2, 4)).sum().backward()
    parameters = list(layer.half().parameters())
    assert [p.dtype for p in parameters] == [p.grad.dtype for p in parameters if p.grad is not None]
    assert parameters[0].dtype == torch.float32


@pytest.mark.parametrize("neuron", KINDS)
def test_folder_folding_exit_and_recorder(neuron: str, tmp_path) -> None:
    model = network(neuron)
    expected = model(images())
    assert (model.forward_steps(images()).abs().sum(-1) > 0).all() and model.changed_args()["neuron"] == neuron
    save_model_folder(model, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(images()), expected, rtol=0, atol=0)
    exited = torch.stack(forward_early_exit(model, images(), 1.0))
    torch.testing.assert_close(exited, model.forward_steps(images()))
    with record_spikes(model) as recording:
        torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert all(0.0 < spikes.mean() < 1.0 for spikes in recording.spikes.values())
    folded = timm_gac.fuse_for_inference(copy.deepcopy(model))
    torch.testing.assert_close(folded(images()), expected, rtol=1e-4, atol=1e-4)
    specs = {folded.layer1[0].bn1.spec, folded.layer2[0].bn1.spec, CIFAR}
    assert len(specs) == (3 if neuron == "plif" else 1)  # a layer's numbers are the spec's, those of channels are not


def test_inspection_sees_the_learned_threshold() -> None:
    layer = LIF(CIFAR, learnable="layer")
    layer.learned.set_values(torch.tensor([0.5]), torch.tensor([2.0]))
    sums = _Sums("neuron", layer)
    current = torch.full((1, 2, 3, 4, 4), 1.5)
    sums.add((current,), layer(current).flatten(0, 1), 1)
    result = sums.result(images=2, num_steps=1, network_spec=CIFAR)
    assert result.threshold == pytest.approx(2.0) and sum(result.step_rates) == 0.0
    assert int(result.histogram.argmax()) == 37  # 1.5 / 2.0 in 70 bins from -3 to 4


@pytest.mark.parametrize(("name", "sizes"), [("test_gac_msresnet", {}), ("spiking_resnet19", {"channels": (8, 8, 8)})])
def test_integers(name: str, sizes: dict, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Decays on 1/256, thresholds on the grid, a line that says what is lost; folders and the way back keep them."""
    model = network("plif", name, **sizes, **({"stem_width": 8} if sizes else {}))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        quantised = timm_gac.quantize(model)
        assert "can differ from those of float64" in caplog.text
        for layer in (quantised.layer1[0].conv2, quantised.layer2[0].conv1):
            assert (layer.spec.decay * 256).is_integer() and (layer.spec.threshold * 2**15).is_integer()
            assert layer.spec != CIFAR
        logits = quantised(images())
        torch.testing.assert_close(copy.deepcopy(quantised).double()(images().double()).float(), logits)
        save_model_folder(quantised, tmp_path / "model")
        torch.testing.assert_close(load_model(tmp_path / "model")(images()), logits, rtol=0, atol=0)
        back = dequantize(quantised)
        assert back.layer1[0].bn2.lif.learned.decay.item() == quantised.layer1[0].conv2.spec.decay
    if not sizes:
        with pytest.raises(ValueError, match="one learned decay and threshold a layer, got one a channel in lif"):
            timm_gac.quantize(network("plif_channel"))


@pytest.mark.parametrize(("decay", "told"), [(0.4985, True), (0.5, False)])
def test_a_decay_rounded_to_a_power_of_two_is_told(decay: float, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Membranes stay exact then, but the decay is another; nothing is said where nothing moved."""
    model = timm.create_model("test_gac_msresnet", num_classes=10, neuron="plif")
    for module in model.modules():
        if isinstance(module, LearnedValues):
            module.set_values(torch.tensor([decay]), torch.tensor([1.0]))
    with caplog.at_level(logging.WARNING):
        quantised = timm_gac.quantize(model)
    assert quantised.layer1[0].conv1.spec.decay == 0.5
    assert ("by at most 0.0015" in caplog.text) == told and "float64" not in caplog.text


def test_the_trainer_asks_for_them_and_does_not_decay_them() -> None:
    assert _CHOICES["neuron"] == (*NEURONS, "ternary", "integer", "adaptive")
    recipe = Recipe(model="test_gac_msresnet", neuron="plif", channels_last=False)
    model = create_network(recipe, 10, 3)
    learned = [p for m in model.modules() if isinstance(m, LearnedValues) for p in m.parameters()]
    assert len(learned) == 16
    assert len(model.no_weight_decay() & {name for name, _ in model.named_parameters() if "learned" in name}) == 16
    for groups in (
        create_optimizer(model, recipe, torch.device("cpu")).param_groups,
        timm_gac.parameter_groups(model, 5e-4),
    ):
        spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        assert {id(p) for p in learned} <= spared
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learned)
    assert sum(bool(parameter.grad.any()) for parameter in learned) > 8
    assert model.half().lif.learned.decay_logit.dtype == torch.float32
