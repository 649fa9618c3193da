"""How far rounding moves a trained network's currents, and how close to the threshold its membranes lie, by layer.

``python tools/membrane_deviation.py MODEL --data cifar100.npz`` runs the network in float32 and in 16 bits on the same
test images. All distances are shares of the threshold; a membrane is that before reset, in float32:

- own: root mean square by which the input current moves where this layer alone is in 16 bits, on inputs from float32
- whole: the same where the whole network is, so that spikes of earlier layers differ too
- own flips, flips: share of neuron-steps that fire in one of the two alone, likewise
- at flips: median and 90 % quantile of a membrane's distance from the threshold where the whole network's spike flips
- within own, within whole: share of neuron-steps whose membrane lies within own and whole of the threshold
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from timm_gac.cli.sources import open_labelled
from timm_gac.hub import open_network
from timm_gac.inference.record import forward_hooks, neuron_layers
from timm_gac.models.blocks import MSBlock
from timm_gac.runtime.device import resolve_device
from timm_gac.runtime.dtypes import AUTOCAST, autocast, float32_as
from timm_gac.runtime.files import write_json

BINS, REACH = 20_000, 4.0  # of histograms of distances, up to so many thresholds


def membranes(layer: Any, current: Tensor) -> Tensor:
    """Membranes before reset, ``(T, B, C, H, W)``, of currents of this shape."""
    spec = layer.spec
    if spec.neuron != "lif" or spec.reset != "hard" or getattr(layer, "learned", None) is not None:
        raise ValueError(
            "expected neurons with a fixed decay and threshold and a hard reset, got others: not supported"
        )
    kept, out = torch.zeros_like(current[0]), torch.empty_like(current)
    for step, x in enumerate(current):
        out[step] = spec.decay * kept + x
        kept = out[step] * (out[step] <= spec.threshold)
    return out


class Counts:
    """Sums over batches of one layer."""

    def __init__(self) -> None:
        self.total, self.own, self.whole, self.own_flips, self.flips = 0, 0.0, 0.0, 0, 0
        self.all, self.flipped = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)

    def add(self, layer: Any, exact: Tensor, own: Tensor, whole: Tensor) -> None:
        """Currents in float32, with this layer in 16 bits, and with the whole network."""
        threshold, membrane = layer.spec.threshold, membranes(layer, exact)
        fires, distance = membrane > threshold, (membrane / threshold - 1.0).abs()
        flips = (membranes(layer, whole) > threshold) != fires
        self.total += exact.numel()
        self.own += float(((own - exact).double() / threshold).square().sum())
        self.whole += float(((whole - exact).double() / threshold).square().sum())
        self.own_flips += int(((membranes(layer, own) > threshold) != fires).sum())
        self.flips += int(flips.sum())
        self.all += torch.histc(distance, BINS, 0.0, REACH).double().cpu()
        self.flipped += torch.histc(distance[flips], BINS, 0.0, REACH).double().cpu()

    def row(self) -> dict[str, float]:
        """What the columns say."""
        own, whole = (self.own / self.total) ** 0.5, (self.whole / self.total) ** 0.5
        median, most = (self._quantile(share) for share in (0.5, 0.9))
        return {
            "own": own,
            "whole": whole,
            "own flips": self.own_flips / self.total,
            "flips": self.flips / self.total,
            "median at flips": median,
            "90 % at flips": most,
            "within own": self._within(own),
            "within whole": self._within(whole),
        }

    def _within(self, distance: float) -> float:
        """Linear within a bin."""
        place = min(distance / REACH * BINS, BINS - 1)
        whole = int(place)
        return float(self.all[:whole].sum() + (place - whole) * self.all[whole]) / self.total

    def _quantile(self, share: float) -> float:
        sums = self.flipped.cumsum(0)
        if not sums[-1]:
            return float("nan")
        return (int((sums < share * sums[-1]).sum()) + 0.5) * REACH / BINS


def run_exact(network: Any, images: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[Any, ...]]]:
    """Currents ``(T, B, C, H, W)`` of all layers in the precision of the moment; inputs of layers and blocks."""
    layers, found, given = neuron_layers(network), dict[str, Tensor](), dict[str, tuple[Any, ...]]()
    blocks = {name: module for name, module in network.named_modules() if isinstance(module, MSBlock)}

    def keep(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        current = layer.input_current(inputs, network.num_steps)
        if layer.returns_pair:  # such a layer rounds it before its neurons see it
            current = current.to(inputs[0].dtype).float()
        found[name], given[name] = current, inputs

    def keep_inputs(name: str, block: Any, inputs: tuple[Any, ...]) -> None:
        given[name] = inputs

    with forward_hooks(layers, keep), forward_hooks(blocks, before=keep_inputs):
        network.forward_steps(images)
    return found, given


def run_alone(
    network: Any, images: Tensor, exact: dict[str, Tensor], given: dict[str, tuple[Any, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Currents of each layer by itself under autocast to ``dtype``, on the inputs that it had without."""
    steps, inputs = network.num_steps, dict[str, tuple[Tensor, ...]]()
    inputs["encoder"] = (network._stem(images),)
    inputs["lif"] = (given["lif"][0].to(dtype),)
    for name, block in network.named_modules():
        if isinstance(block, MSBlock):
            membrane, spikes = given[name][:2]
            inputs[f"{name}.bn1"] = (block.conv1(spikes.to(dtype)),)
            # Spikes are 0 and 1, so those that a layer in 16 bits takes are the same.
            hidden = membranes(block.bn1, exact[f"{name}.bn1"]) > block.bn1.spec.threshold
            inputs[f"{name}.bn2"] = (block.conv2(hidden.flatten(0, 1).to(dtype)), block._shortcut(membrane.to(dtype)))
    out = {}
    for name, layer in neuron_layers(network).items():
        current = layer.input_current(inputs[name], steps)
        out[name] = current.to(dtype).float() if layer.returns_pair else current
    return out


@float32_as("ieee")
@torch.no_grad()
def measure(network: Any, images: Tensor, precision: str, batch_size: int) -> dict[str, dict[str, float]]:
    """The columns by layer, in the order of the layers.

    Raises:
        ValueError: The network is none of `MSBlock`s with plain neurons.
    """
    network = network.eval()
    if not any(isinstance(module, MSBlock) for module in network.modules()):
        raise ValueError(
            "expected a network of MSBlocks, got another: choose one such as gac_msresnet18_cifar.cifar100"
        )
    counts: dict[str, Counts] = {}
    for batch in images.split(batch_size):
        exact, given = run_exact(network, batch)
        with autocast(batch.device, precision):
            whole, _ = run_exact(network, batch)
            own = run_alone(network, batch, exact, given, AUTOCAST[precision] or torch.float32)
        for name, layer in neuron_layers(network).items():
            counts.setdefault(name, Counts()).add(layer, exact[name], own[name], whole[name])
    return {name: count.row() for name, count in counts.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write it where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="an .npz file or the name of a data set")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--precision", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), or such as cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = resolve_device(args.device)
    opened = open_network(args.model, None, device=device).require_trained()
    images, _ = open_labelled(args.data, opened.network, args.images, label_names=opened.label_names)
    rows = measure(opened.network, images.to(device), args.precision, args.batch_size)
    table = Table("layer", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    Console(width=140).print(table)
    if args.json is not None:
        write_json(args.json, {"model": args.model, "images": len(images), "precision": args.precision, "layers": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
