"""Networks of registered neurons: built by name, trained, stored, folded and stepped; and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import timm_gac
from gac_kernels import LIFSpec, lif_reference, use_backend
from timm_gac import LIF
from timm_gac.energy import EnergyMeter
from timm_gac.export import write_nir
from timm_gac.hub import load_model, save_model_folder
from timm_gac.hub.open import calibrate
from timm_gac.inference.early_exit import forward_early_exit
from timm_gac.inference.record import membrane_of, record_spikes
from timm_gac.models import SpikingResNet
from timm_gac.train.recipes import _CHOICES, Recipe
from timm_gac.train.setup import create_network

NEURONS = ("ternary", "integer", "adaptive")
VALUES = {"ternary": {-1.0, 0.0, 1.0}, "integer": {0.0, 1.0, 2.0, 3.0, 4.0}, "adaptive": {0.0, 1.0}}


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network(neuron: str, **kwargs) -> SpikingResNet:
    """A network whose neurons fire."""
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=10, neuron=neuron, **kwargs)
    return calibrate(model, [images()])


def tiny(block: str, encoder: str, spec: LIFSpec, layers: tuple[int, ...] = (1, 1, 1)) -> SpikingResNet:
    """A smaller one, in training, with neurons that fire."""
    torch.manual_seed(0)
    model = SpikingResNet(
        block,
        layers=layers,
        channels=(8, 8, 8),
        strides=(1, 1, 1),
        stem_width=8,
        stem_kernel=3,
        encoder=encoder,
        spec=spec,
        num_classes=5,
        scaled_init=False,
    )
    return calibrate(model, [images()]).train()


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_all_layers_compute_it(neuron: str, reset: str) -> None:
    model = network(neuron, spec=LIFSpec(reset=reset)).eval()
    assert model.spec == LIFSpec(reset=reset, neuron=neuron)
    with record_spikes(model) as recording, torch.no_grad():
        model(images())
    layers = {name: spikes for name, spikes in recording.spikes.items() if name != "encoder"}
    found = set(torch.cat([spikes.flatten() for spikes in layers.values()]).unique().tolist())
    assert found <= VALUES[neuron] and (len(found) > 2 or neuron == "adaptive"), found
    gated = recording.spikes["encoder"].unflatten(0, (model.num_steps, -1))
    stem = model._stem(images()).detach()
    fired = lif_reference(stem.expand(model.num_steps, *stem.shape), model.spec)
    assert torch.equal(gated.sign(), fired.sign())


@pytest.mark.parametrize("neuron", NEURONS)
def test_it_trains_alike_in_pytorch_and_triton(neuron: str, device: torch.device) -> None:
    gradients = []
    for backend in ("eager", "triton"):
        model = tiny("MSBlock", "gac", LIFSpec(neuron=neuron), layers=(1, 0, 0)).to(device)
        with use_backend(backend):
            model(images()[:2, :, ::4, ::4].to(device)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("neuron", NEURONS)
def test_folders_folding_and_early_exit(neuron: str, tmp_path: Path) -> None:
    model = network(neuron).eval()
    with torch.no_grad():
        expected = model(images())
        assert model.changed_args()["neuron"] == neuron and "neuron" not in model.model_args()["spec"]
        loaded = load_model(save_model_folder(model, tmp_path / "model"))
        assert loaded.spec == model.spec
        torch.testing.assert_close(loaded(images()), expected)
        stepped = torch.stack([logits.mean(0) for logits in forward_early_exit(model, images(), 1.0)])
        torch.testing.assert_close(stepped, expected)
        torch.testing.assert_close(timm_gac.fuse_for_inference(loaded)(images()), expected, rtol=1e-4, atol=1e-4)


def test_name_and_spec_say_the_same() -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=10, spec=LIFSpec(neuron="ternary"))
    assert model.model_args()["neuron"] == "ternary" and SpikingResNet(**model.model_args()).spec == model.spec
    assert create_network(Recipe(model="test_gac_msresnet", neuron="adaptive"), 10, 3).spec.neuron == "adaptive"
    assert set(NEURONS) < set(_CHOICES["neuron"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: timm_gac.quantize(model), "'lif' for 8-bit inference, got 'integer'"),
        (lambda model: model.set_int8_convs(), "'lif' for 8-bit convolutions, got 'integer'"),
        (lambda model: model.set_spike_packing(), "packed bits, got those of neuron 'integer'"),
        (lambda model: EnergyMeter(model), "an estimate of energy, got those of neuron 'integer'"),
        (lambda model: write_nir(model, "never.nir"), "'lif' for a NIR file, got 'integer'"),
        (lambda model: LIF(model.spec, learnable="layer"), "learned decay and threshold, got 'integer'"),
        (lambda model: LIF(model.spec).to_spikingjelly(), "a SpikingJelly LIFNode, got 'integer'"),
        (lambda model: membrane_of(torch.ones(2, 3), model.spec), "potentials against one threshold, got 'integer'"),
        (lambda model: network("plif", spec=model.spec), "learned decay and threshold, got 'integer'"),
        (lambda model: network("ternary", spec=model.spec), "expected one neuron, got 'ternary' and a spec"),
        (lambda model: network("unheard"), "expected neuron 'lif' or .* got 'unheard': .*import the module"),
        (lambda model: Recipe(neuron="unheard"), "expected neuron out of .*import the module .*--plugin"),
        (lambda model: SpikingResNet(**model.model_args() | {"neuron": "unheard"}), "import the module"),
    ],
)
def test_what_it_cannot_have_is_refused_by_name(call, message: str) -> None:
    if "SpikingJelly" in message:
        pytest.importorskip("spikingjelly")
    if "NIR" in message:
        pytest.importorskip("nir")
    with pytest.raises(ValueError, match=message):
        call(network("integer"))


def test_what_others_have() -> None:
    """Bits where spikes are 0 and 1, and energy where they are -1, 0 and 1: additions alone."""
    network("adaptive").set_spike_packing()
    model = network("ternary").eval()
    with EnergyMeter(model) as meter, torch.no_grad():
        model(images())
    convolutions = [layer for layer in meter.report().layers if layer.kind == "conv"]
    assert convolutions and all(layer.binary for layer in convolutions)


@pytest.mark.parametrize("block", ["MSBlock", "SpikingBlock"])
@pytest.mark.parametrize("encoder", ["gac", "direct"])
@pytest.mark.parametrize("neuron", ["lif", "ternary"])
def test_soft_reset_in_every_kind_of_network(block: str, encoder: str, neuron: str) -> None:
    """It is the spec's, and changes what the network computes."""
    answers = []
    for reset in ("hard", "soft"):
        model = tiny(block, encoder, LIFSpec(reset=reset, neuron=neuron)).eval()
        answers.append(model(images()))
        answers[-1].sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(*answers)
