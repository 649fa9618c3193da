"""Networks whose neurons fire, quantised for tests, and their layers."""

from __future__ import annotations

import functools

import timm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_gac import quantize as quantize_network
from timm_gac.inference.exact_conv import ExactConv2d
from timm_gac.inference.integer import SpikeConv

# Most of these tests are of sums that may come in any order; the default rounds less and is tested beside them.
quantize = functools.partial(quantize_network, exact_sums=True)

# Depth, blocks and neurons decide what is tested here; sums over 512 channels are those of msresnet18_cifar, as it is.
NARROW = {
    "gac_spiking_resnet18": dict(stem_width=16, channels=(16, 24, 40, 48)),
    "msresnet18": dict(stem_width=16, channels=(16, 24, 40, 48)),
    "spiking_resnet19": dict(stem_width=24, channels=(24, 40, 56)),
    "gac_msresnet34": dict(stem_width=16, channels=(16, 24, 40, 48)),
}


def firing(name: str, num_steps: int = 3) -> nn.Module:
    """A model whose norms all do something and whose neurons fire."""
    model = timm.create_model(name, num_steps=num_steps, num_classes=7, **NARROW.get(name, {})).eval()
    for norm in (module for module in model.modules() if isinstance(module, _NormBase) and module.affine):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model


def layers(network: nn.Module) -> dict[str, SpikeConv]:
    return {name: module for name, module in network.named_modules() if isinstance(module, SpikeConv)}


def exact_convs(network: nn.Module) -> dict[str, ExactConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, ExactConv2d)}
