"""Reads NIR files in another framework, without this package, and compares every spike with those expected.

    python nir_child.py snntorch|spikingjelly float32|float64 NETWORK.nir EXPECTED.npz [NETWORK.nir EXPECTED.npz ...]

EXPECTED.npz holds ``input`` (T, B, C, H, W), ``logits`` (B, classes) and, by the name of each layer of neurons, its
spikes as bits (`numpy.packbits` of (T, B, C, H, W)). One line of JSON a file: spikes that differ by layer, all spikes,
and the logits' largest difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from torch import nn


def snntorch_network(path: str, dtype: torch.dtype) -> tuple[Any, dict[str, nn.Module]]:
    """The network, and its neurons by name."""
    import snntorch
    from snntorch.import_nir import import_from_nir

    network = import_from_nir(nir.read(path)).to(dtype)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):  # spikes are float32 here, whatever the network is
            layer.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    return network, {name: layer for name, layer in network.named_modules() if isinstance(layer, snntorch.Leaky)}


def spikingjelly_network(path: str, dtype: torch.dtype) -> tuple[Any, dict[str, nn.Module]]:
    """The network, and its neurons by name."""
    from spikingjelly.activation_based.neuron import BaseNode
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    network = import_from_nir(path, dtype=dtype)
    neurons = {}
    for name, layer in network.named_modules():
        if isinstance(layer, BaseNode):  # it fires at its threshold, not above
            number = np.float64 if dtype == torch.float64 else np.float32
            layer.v_threshold = float(np.nextafter(number(layer.v_threshold), number(np.inf)))
            node = name.rpartition(".")[0]  # a wrapper, which returns (spikes, state)
            neurons[node] = network.get_submodule(node)
    return network, neurons


def run(network: Any, neurons: dict[str, nn.Module], frames: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean output, and the spikes of each layer in all steps; these readers take one step after the other."""
    spikes: dict[str, list[torch.Tensor]] = {name: [] for name in neurons}
    for name, layer in neurons.items():

        def keep(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            spikes[name].append((output[0] if isinstance(output, tuple) else output) != 0)

        layer.register_forward_hook(keep)
    state, total = None, 0.0
    for frame in frames:
        output, state = network(frame, state)
        total = total + output.flatten(1)
    return total / len(frames), {name: torch.stack(steps).numpy() for name, steps in spikes.items()}


@torch.no_grad()
def main(library: str, dtype_name: str, *files: str) -> None:
    dtype = getattr(torch, dtype_name)
    build = {"snntorch": snntorch_network, "spikingjelly": spikingjelly_network}[library]
    for path, expected in zip(files[::2], files[1::2], strict=True):
        network, neurons = build(path, dtype)
        with np.load(Path(expected)) as file:
            bits = {name.replace(".", "_"): file[name] for name in file.files}
        frames, logits = torch.from_numpy(bits.pop("input")).to(dtype), torch.from_numpy(bits.pop("logits"))
        output, spikes = run(network, neurons, frames)
        assert set(spikes) == set(bits), (sorted(spikes), sorted(bits))
        differ = {name: int(np.unpackbits(np.packbits(spikes[name]) ^ bits[name]).sum()) for name in bits}
        count = sum(int(np.unpackbits(one).sum()) for one in bits.values())
        line = {"differ": differ, "spikes": count, "logits": float((output - logits).abs().max())}
        line["largest"] = float(logits.abs().max())
        sys.stdout.write(json.dumps(line) + "\n")
    assert not {"timm_gac", "gac_kernels"} & set(sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
