"""Networks with their batch norms folded away give the logits of those that have them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import use_backend
from timm_gac import fuse_for_inference
from timm_gac.inference import FoldedLIF

MODELS = ("test_gac_msresnet", "gac_msresnet18_cifar", "msresnet18_cifar", "gac_resnet18")


def trained(name: str, dtype: torch.dtype, device: torch.device, **kwargs: object) -> nn.Module:
    """A model whose norms all do something."""
    model = timm.create_model(name, num_steps=3, num_classes=7, **kwargs).to(device, dtype).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


def available(name: str) -> str:
    if name not in timm.list_models(module="spiking_resnet"):
        pytest.skip(f"{name} is no registered model")
    return name


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_in_float64(name: str) -> None:
    model, images = trained(available(name), torch.float64, torch.device("cpu")), torch.randn(2, 3, 16, 16).double()
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
    with torch.no_grad(), use_backend(backend):
        inference._set_bias(model.conv1, inference.fold_batch_norm(model.conv1, model.bn1))
        model.bn1 = nn.Identity()
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        for block in blocks:
            inference._fuse_block(block, on_cpu=False, last=block is blocks[-1])
        assert all(m.minus_shift is not None for m in model.modules() if isinstance(m, FoldedLIF))
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


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
