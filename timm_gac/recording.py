"""Which modules of a network are its neuron layers, and the current that each of them integrates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import LIFSpec

from .encoder import GatedAttentionCoding
from .inference import FoldedLIF, shift_in_neuron
from .models.integer import IntegerLIF, SpikeConv
from .neuron import LIF, BatchNormLIF

__all__ = ["NEURONS", "current_of", "membrane_of", "neuron_layers", "spikes_of"]

NEURONS = (LIF, BatchNormLIF, FoldedLIF, IntegerLIF, SpikeConv, GatedAttentionCoding)


def neuron_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = NEURONS) -> dict[str, nn.Module]:
    """Modules of these kinds by name, without those that are part of another one of them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    inner = tuple(name + "." for name in layers)
    return {name: module for name, module in layers.items() if not name.startswith(inner)}


def spikes_of(module: nn.Module, output: Any) -> Tensor:
    """Spikes that a neuron layer gave out, time-folded ``(T*B, C, H, W)``; gated ones of the encoder as they are."""
    spikes: Tensor = output[-1] if isinstance(output, tuple) else output  # (membrane, spikes), or spikes alone
    spikes = spikes if spikes.is_floating_point() else spikes.float()  # integer networks send int8
    return spikes.flatten(0, 1) if isinstance(module, GatedAttentionCoding) else spikes


@torch.no_grad()
def current_of(module: Any, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
    """The input current of a neuron layer in eval mode, ``(T, B, C, H, W)`` in at least float32.

    Args:
        module: A neuron layer.
        inputs: What it was called with, as a forward hook sees it.
        num_steps: Number of time steps T.

    Raises:
        ValueError: The module is no neuron layer.
    """
    if isinstance(module, SpikeConv):
        return module.current(inputs[0], inputs[1] if len(inputs) > 1 else None, num_steps).unflatten(
            0, (num_steps, -1)
        )
    x = _wide(inputs[0])
    if isinstance(module, GatedAttentionCoding):
        return x.unsqueeze(0).expand(num_steps, *x.shape) if x.ndim == 4 else x
    if isinstance(module, BatchNormLIF):
        norm = (module.running_mean, module.running_var, module.weight, module.bias)
        mean, var, weight, bias = (None if value is None else value.to(x.dtype) for value in norm)
        x = F.batch_norm(x, mean, var, weight, bias, training=mean is None, eps=module.eps)
    elif isinstance(module, FoldedLIF):
        if shift_in_neuron(x):
            shift: Tensor = module.minus_shift  # type: ignore[assignment]
            x = x - shift.to(x.dtype)[:, None, None]
    elif not isinstance(module, LIF | IntegerLIF):
        raise ValueError(f"expected a neuron layer, got {type(module).__name__}: see `neuron_layers`")
    if len(inputs) > 1 and inputs[1] is not None:
        x = x + inputs[1].to(x.dtype)
    return x.unflatten(0, (num_steps, -1))


@torch.no_grad()
def membrane_of(current: Tensor, spec: LIFSpec) -> Tensor:
    """Membrane potentials before the reset, in the shape of the current ``(T, ...)``: what meets the threshold."""
    v = torch.zeros_like(current[0])
    potentials = []
    for x in current:
        u = spec.decay * v + x
        potentials.append(u)
        fired = u > spec.threshold
        v = torch.where(fired, u - spec.threshold if spec.soft_reset else torch.zeros_like(u), u)
    return torch.stack(potentials)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
