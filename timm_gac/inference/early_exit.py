"""Early exit: each sample stops at the first time step whose answer is confident enough.

`early_exit` picks that step from the logits of all steps. `forward_early_exit` saves the work too: it runs a network
one time step after another, with each neuron's membrane handed from step to step, and computes no further step of a
sample that has left. The encoder runs first and for all steps: gated attention coding scores all steps at once, and of
a static image its convolutions run only once anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels import lif
from gac_kernels.registry import states_by

from ..layers.learned import learned_values
from ..layers.neuron_layer import NeuronLayer
from ..models.ann_resnet import refuse_ann
from ..models.folding import not_finite_marked
from ..models.network import SpikingResNet
from .record import neuron_layers


@dataclass(frozen=True)
class Exit:
    """Answers of samples, each at the step where it stopped.

    Attributes:
        logits: Mean logits of the steps that ran, ``(B, classes)``.
        steps: Number of steps that ran, 1 to T, ``(B,)``.
        confidence: Probability of the likeliest class in these logits, ``(B,)``.
    """

    logits: Tensor
    steps: Tensor
    confidence: Tensor


def check_confidence(confidence: float) -> None:
    """Check a confidence to stop at.

    Raises:
        ValueError: It is not above 0 and at most 1.
    """
    if not 0.0 < confidence <= 1.0:
        raise ValueError(f"expected a confidence above 0 and at most 1, got {confidence!r}: give one such as 0.9")


def mean_logits(steps_logits: Tensor) -> Tensor:
    """Answers after 1 to T steps, ``(B, T, classes)`` in at least float32: the mean logits of the steps so far."""
    wide = steps_logits.to(torch.promote_types(steps_logits.dtype, torch.float32))
    return wide.cumsum(1) / torch.arange(1, wide.shape[1] + 1, device=wide.device)[:, None]


def first_confident_step(confidences: Tensor, confidence: float) -> Tensor:
    """First step, from 1, at which confidences ``(B, T)`` reach a value, ``(B,)``; T where none does."""
    reached = confidences >= confidence
    reached[:, -1] = True
    return reached.int().argmax(1) + 1


def early_exit(steps_logits: Tensor, confidence: float) -> Exit:
    """Stop each sample at the first step whose answer is confident enough, else at the last.

    Args:
        steps_logits: Logits of each step, ``(B, T, classes)``, as `forward_steps` gives them.
        confidence: Least probability of the likeliest class, above 0 and at most 1, to stop at.

    Raises:
        ValueError: The logits have another rank, or confidence is out of range.

    Examples:
        >>> early_exit(torch.tensor([[[9.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]]), 0.9).steps
        tensor([1, 2])
    """
    if steps_logits.ndim != 3 or 0 in steps_logits.shape[1:]:
        raise ValueError(
            f"expected logits (B, T, classes), got {tuple(steps_logits.shape)}: take them from model.forward_steps"
        )
    check_confidence(confidence)
    means = mean_logits(steps_logits)
    confidences = means.softmax(-1).amax(-1)  # [B, T]
    steps = first_confident_step(confidences, confidence)
    rows = torch.arange(len(means), device=means.device)
    return Exit(means[rows, steps - 1], steps, confidences[rows, steps - 1])


@torch.no_grad()
def forward_early_exit(model: nn.Module, images: Tensor, confidence: float) -> list[Tensor]:
    """Logits of the time steps that each sample runs until its mean logits are confident enough, or to the last step.

    In float32 these are the first rows of ``model.forward_steps(images)``, up to the rounding of other kernels. Several
    threads may call it on one model.

    Args:
        model: A spiking ResNet of this package in eval mode; fused and integer ones too.
        images: ``(B, C, H, W)``, or event frames ``(B, T, C, H, W)``, which the encoder takes all at once.
        confidence: Least probability of the likeliest class, above 0 and at most 1, to stop at.

    Returns:
        For each sample its logits, ``(steps, classes)`` with 1 to T steps; see `early_exit`.

    Raises:
        ValueError: The model is another, trains, or packs its spikes; or confidence is out of range.
    """
    check_confidence(confidence)
    network = _checked(model)
    coded = network._encode(images).unflatten(0, (network.num_steps, -1))
    answers = [torch.empty(0)] * len(images)
    running = torch.arange(len(images), device=images.device)  # samples that have not left yet
    mark = not_finite_marked(images.new_zeros(len(images), 1), images, network.bn1)  # 0 or NaN
    logits = coded.new_empty(0)
    stepped, neurons = _stepped_copy(network)
    for step in range(network.num_steps):
        step_logits = stepped._logits(stepped._run_stages(coded[step]))[:, None]
        step_logits = step_logits + mark[running, None].to(step_logits.dtype)
        logits = torch.cat((logits, step_logits), 1) if step else step_logits  # [running, steps so far, classes]
        leaves = early_exit(logits, confidence).confidence >= confidence
        if step + 1 == network.num_steps:
            leaves.fill_(True)
        for index, row in zip(running[leaves].tolist(), logits[leaves], strict=True):
            answers[index] = row
        stay = (~leaves).nonzero()[:, 0]
        if len(stay) == 0:
            break
        if len(stay) < len(running):
            running, logits, coded = running[stay], logits[stay], coded[:, stay]
            for neuron in neurons:
                neuron.keep(stay)
    return answers


def _checked(model: nn.Module) -> SpikingResNet:
    refuse_ann(model, "early exit")
    if not isinstance(model, SpikingResNet):
        raise ValueError(
            f"expected a plain spiking ResNet of this package for early exit, got {type(model).__name__}: see "
            "timm-gac models"
        )
    if model.training or any(getattr(module, "pack_hidden", False) for module in model.modules()):
        raise ValueError(
            "expected a network in eval mode without packed spikes, got one that trains: call model.eval() and "
            "model.set_spike_packing(False)"
        )
    return model


class _SteppedNeuron:
    """A neuron layer's forward for a single step, going on from the membrane of the step before."""

    by_design = True  # no line in the log says that a forward was replaced

    def __init__(self, layer: NeuronLayer) -> None:
        self.layer = layer
        self.membrane: Tensor | None = None  # after the reset, [B, ...]; of several states [states, B, ...]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        layer = self.layer
        current = layer.input_current((x, residual), 1)
        stored = current[0].to(_stored_dtype(x, residual, current))
        # Neurons of floating-point networks see what is kept for the membrane shortcut; integer ones the exact sum.
        rounded = layer.returns_pair and x.is_floating_point()
        fired, self.membrane = lif(
            stored[None] if rounded else current,
            layer.spec,
            self.membrane,
            return_state=True,
            **learned_values(layer),
        )
        spikes = fired[0].to(layer.spikes_dtype or x.dtype)
        return (stored, spikes) if layer.returns_pair else spikes

    def keep(self, rows: Tensor) -> None:
        """Keep the membranes of these samples alone."""
        assert self.membrane is not None
        several = states_by(self.layer.spec.surrogate_id) > 1
        self.membrane = self.membrane[:, rows] if several else self.membrane[rows]


def _stored_dtype(x: Tensor, residual: Tensor | None, current: Tensor) -> torch.dtype:
    """Dtype in which the layer stores its input current for a membrane shortcut."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return dtype if dtype.is_floating_point else current.dtype


def _stepped_copy(network: SpikingResNet) -> tuple[Any, list[_SteppedNeuron]]:
    """A copy of a network whose neurons behind the encoder run single steps, each call one step further; these neurons.

    The network itself is left alone, since other threads may run it. The copy shares its parameters, hooks and all
    modules but neurons and those that contain them: about 0.1 ms for 30 modules.
    """
    layers = [layer for layer in neuron_layers(network).values() if layer is not network.encoder]
    neurons = [_SteppedNeuron(layer) for layer in layers]
    copies: dict[nn.Module, nn.Module] = {}
    for layer, neuron in zip(layers, neurons, strict=True):
        copies[layer] = _shallow_copy(layer, forward=neuron)  # an instance's own attribute goes before a method
    return _with_copies(network, copies), neurons


def _with_copies(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module with copies in the place of some modules below it, or itself where there are none."""
    if module not in copies:
        below = {name: child and _with_copies(child, copies) for name, child in module._modules.items()}
        changed = any(child is not module._modules[name] for name, child in below.items())
        copies[module] = _shallow_copy(module, _modules=below) if changed else module
    return copies[module]


def _shallow_copy(module: nn.Module, **attributes: Any) -> nn.Module:
    copied: nn.Module = object.__new__(type(module))
    vars(copied).update(vars(module), **attributes)
    return copied
