"""`torch.export` of the networks: the exported program gives the same bits, with a fixed batch and with any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from gac_kernels import IMAGENET
from timm_gac import LIF, BatchNormLIF, fuse_for_inference, quantize
from timm_gac.layers.neuron import MembraneBatchNormLIF

T = 3
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float": lambda model: model,
    "folded": fuse_for_inference,
    "quantised": quantize,
}
STATIC, DYNAMIC = "static", "dynamic"


def images(batch: int, *frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *frames, 3, 16, 16, generator=generator)


def trained() -> nn.Module:
    """A network in eval mode, in which each norm does something and every stage fires."""
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=T)
    for norm in (module for module in model.modules() if getattr(module, "running_var", None) is not None):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0.2, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5), nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("frames", [(), (T,)], ids=["images", "event_frames"])
@pytest.mark.parametrize("batch", [STATIC, DYNAMIC])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_exported_networks_give_the_same_bits(change: str, batch: str, frames: tuple[int, ...]) -> None:
    network = CHANGES[change](trained())
    shapes = ({0: Dim("batch", min=1)},) if batch == DYNAMIC else None
    exported = export(network, (images(2, *frames),), dynamic_shapes=shapes).module()
    for size in (2, 1, 5) if batch == DYNAMIC else (2,):
        expected = network(images(size, *frames))
        assert expected.std() > 1e-3  # the logits depend on the images
        assert torch.equal(exported(images(size, *frames)), expected)
    if batch == STATIC:
        with pytest.raises((AssertionError, RuntimeError), match=r"shape|Guard"):
            exported(images(5, *frames))


def test_neurons_are_one_operator_each_in_an_exported_network() -> None:
    program = export(trained(), (images(2),))
    called = [str(node.target) for node in program.graph.nodes if "gac_kernels" in str(node.target)]
    assert called.count("gac_kernels.gac_fire.default") == 1
    assert called.count("gac_kernels.norm_lif.default") == 6  # two in each of three blocks


@torch.no_grad()
def test_exported_neurons_give_the_same_bits() -> None:
    norms = [BatchNormLIF(3, IMAGENET, T), MembraneBatchNormLIF(3, IMAGENET, T)]
    for neuron in (LIF(num_steps=T), *norms):
        neuron.eval()
        exported = export(neuron, (images(2 * T),), dynamic_shapes=({0: T * Dim("batch")},)).module()
        x = images(4 * T)
        torch.testing.assert_close(exported(x), neuron(x), rtol=0, atol=0)
