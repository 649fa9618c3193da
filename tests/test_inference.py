"""Networks with their batch norms folded away give the logits of those that have them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import use_backend
from timm_gac import fuse_for_inference

MODELS = ("test_gac_msresnet", "gac_msresnet18_cifar", "msresnet18_cifar", "gac_spiking_resnet19")


def trained(name: str, dtype: torch.dtype, device: torch.device, **kwargs: object) -> nn.Module:
    """A model whose norms all do something."""
    model = timm.create_model(name, num_steps=3, num_classes=7, **kwargs).to(device, dtype).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_in_float64(name: str) -> None:
    model, images = trained(name, torch.float64, torch.device("cpu")), torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        expected, rates = model(images), model.forward_features(images)
        assert rates.mean() > 0.01  # it fires, so the logits depend on every layer
        fused = fuse_for_inference(model)
        torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused.forward_features(images), rates, rtol=0, atol=0)
    assert fused is model and not any(isinstance(m, _NormBase) and m.affine for m in model.modules())


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_shift_in_the_neuron_is_shift_in_the_bias(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's way (shift in the kernel), on any device."""
    from timm_gac import inference

    dtype = torch.float64 if backend == "eager" else torch.float32
    model, images = trained("test_gac_msresnet", dtype, device), torch.randn(2, 3, 8, 8, device=device, dtype=dtype)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding would move currents over thresholds
    with torch.no_grad(), use_backend("eager"):
        expected = model(images)
    monkeypatch.setattr(inference, "shift_in_neuron", lambda x: True)
    shifts = list[torch.Tensor]()
    norm_lif = torch.ops.gac_kernels.norm_lif

    def seen(*arguments: object) -> tuple[torch.Tensor, ...]:
        shifts.append(arguments[4])
        return norm_lif(*arguments)

    monkeypatch.setattr(torch.ops.gac_kernels, "norm_lif", seen)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(fuse_for_inference(model)(images), expected, rtol=1e-3, atol=1e-3)
    assert len(shifts) == 6 and all(shift.any() for shift in shifts)  # two neurons in each of three blocks


def test_folded_before_it_is_moved(device: torch.device) -> None:
    """Where the shift is added depends on where the network runs, not on where it was folded."""
    model, images = trained("test_gac_msresnet", torch.float64, torch.device("cpu")), torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        expected = fuse_for_inference(model)(images)
        torch.testing.assert_close(model.to(device)(images.to(device)).cpu(), expected, rtol=1e-9, atol=1e-9)


def test_other_dtypes_and_the_rest_of_the_contract(device: torch.device) -> None:
    model = fuse_for_inference(trained("test_gac_msresnet", torch.float32, device), dtype=torch.bfloat16)
    images = torch.randn(2, 3, 8, 8, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(images).dtype == torch.bfloat16 and model(images).isfinite().all()
        assert model.forward_steps(images).shape == (2, 3, 7)
    with pytest.raises(ValueError, match="fused already"):
        fuse_for_inference(model)
    with pytest.raises(ValueError, match="spiking network"):
        fuse_for_inference(nn.Linear(2, 2))


def test_gradients_at_the_input_of_a_folded_network(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in one op without gradients is done apart where they are wanted."""
    from timm_gac import inference

    model = fuse_for_inference(trained("test_gac_msresnet", torch.float64, device))
    images = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64, requires_grad=True)
    gradients = []
    for in_neuron in (False, True):
        monkeypatch.setattr(inference, "shift_in_neuron", lambda x, answer=in_neuron: answer)
        gradients += torch.autograd.grad(model(images).square().sum(), images)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
