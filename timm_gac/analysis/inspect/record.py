"""Recording of spikes, membranes, gate and class scores of a network on images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from gac_kernels import LIFSpec

from ...inference.early_exit import mean_logits
from ...inference.record import forward_hooks, gate_scores, membrane_of, neuron_layers
from ...layers.learned import learned_values
from ...layers.neuron_layer import NeuronLayer
from ...models.ann_resnet import refuse_ann
from ...runtime.dtypes import float32_as

BINS, LOW, HIGH = 70, -3.0, 4.0  # of membrane histograms, in thresholds; the threshold is the edge of a bin


@dataclass(frozen=True)
class NeuronValues:
    """Decay and threshold of a layer of neurons, and where they began.

    Attributes:
        decay: ``(N,)``, N being 1, or the number of channels where each has learned one.
        threshold: ``(N,)``.
        initial: Where both began: the layer's spec, or the network's where folding wrote what was learned into the
            layer's.
        learned: Whether they were learned.
    """

    decay: Tensor
    threshold: Tensor
    initial: LIFSpec
    learned: bool


def neuron_values(layer: NeuronLayer, network_spec: LIFSpec) -> NeuronValues:
    """Decay and threshold that a layer's neurons have.

    Args:
        layer: A layer of neurons, batch norm folded or not.
        network_spec: Spec with which its network was created.
    """
    if learned := learned_values(layer):
        values = {name: value.detach().float().cpu() for name, value in learned.items()}
        return NeuronValues(**values, initial=layer.spec, learned=True)
    spec = layer.spec
    return NeuronValues(
        torch.tensor([spec.decay]),
        torch.tensor([spec.threshold]),
        network_spec,
        (spec.decay, spec.threshold) != (network_spec.decay, network_spec.threshold),
    )


@dataclass(frozen=True)
class LayerActivity:
    """Activity of one layer of neurons.

    Attributes:
        name: Name of the module.
        step_rates: Spikes per neuron at each time step, mean over all images, ``T`` values.
        dead: Share of neurons that never fired, in any image at any step.
        saturated: Share of neurons that fired in every image at every step.
        dead_channels: Channels all of whose neurons are dead.
        channels: Number of channels.
        neurons: Number of neurons, C*H*W.
        histogram: Share of membrane potentials before the reset in each of `BINS` bins from `LOW` to `HIGH`
            thresholds, over all neurons, steps and images; what lies beyond counts in the outermost bins.
        values: Decay and threshold of its neurons.
        spikes: Of the image that is drawn, bool ``(T, C, H, W)``.
    """

    name: str
    step_rates: tuple[float, ...]
    dead: float
    saturated: float
    dead_channels: int
    channels: int
    neurons: int
    histogram: Tensor
    values: NeuronValues
    spikes: Tensor

    @property
    def decay(self) -> float:
        """Decay of its neurons; the mean where each channel has learned one."""
        return float(self.values.decay.mean())

    @property
    def threshold(self) -> float:
        """Threshold of its neurons; the mean where each channel has learned one."""
        return float(self.values.threshold.mean())

    @property
    def rate(self) -> float:
        """Spikes per neuron and time step."""
        return sum(self.step_rates) / len(self.step_rates)


@dataclass(frozen=True)
class Inspection:
    """What a network did on images, and in detail on the first of them.

    Attributes:
        model: Name of the network.
        weights: Where its weights are from, in words.
        num_steps: Number of time steps T.
        images: Images behind rates, histograms, dead and saturated neurons.
        picture: The image that is drawn, as the network sees it, ``(H, W, C)`` in [0, 1].
        scores: Class probabilities after 1 to T steps, ``(T, classes)``: softmax of the mean logits so far.
        layers: Layers of neurons in the order in which they ran.
        temporal: Temporal score m of the gate before the sigmoid, ``(T,)``; None with direct coding.
        spatial: Spatial-channel score n before the sigmoid, mean over channels, ``(T, H, W)``; None with direct coding.
        gate: ``sigmoid(m[t] n[t])``, mean over channels, ``(T, H, W)``; None with direct coding.
        coded: The encoder's output, mean over channels, ``(T, H, W)``.
        label_names: Names of the classes; empty where unknown.
    """

    model: str
    weights: str
    num_steps: int
    images: int
    picture: Tensor
    scores: Tensor
    layers: tuple[LayerActivity, ...]
    temporal: Tensor | None
    spatial: Tensor | None
    gate: Tensor | None
    coded: Tensor
    label_names: tuple[str, ...] = ()


class _Sums:
    """Running sums of one layer over batches."""

    def __init__(self, name: str, layer: NeuronLayer) -> None:
        self.name, self.layer, self.spec = name, layer, layer.spec
        self.fired: Tensor | None = None  # [C, H, W]
        self.step_rates: Tensor = torch.zeros(0)
        self.histogram = torch.zeros(BINS, dtype=torch.float64)
        self.spikes = torch.zeros(0)

    def add(self, inputs: tuple[Any, ...], output: Any, num_steps: int) -> None:
        spikes = self.layer.output_spikes(output).unflatten(0, (num_steps, -1)) != 0  # [T, B, C, H, W]
        current = self.layer.input_current(inputs, num_steps)
        potentials = membrane_of(current, self.spec, scaled=True, **learned_values(self.layer))
        scaled = potentials.flatten().clamp(LOW, HIGH)
        self.histogram += torch.histc(scaled, BINS, LOW, HIGH).double().cpu()
        fired = spikes.sum((0, 1)).cpu()
        rates = spikes.flatten(2).double().mean(2).sum(1).cpu()
        if self.fired is None:
            self.fired, self.step_rates, self.spikes = fired, rates, spikes[:, 0].cpu()
        else:
            self.fired, self.step_rates = self.fired + fired, self.step_rates + rates

    def result(self, images: int, num_steps: int, network_spec: LIFSpec) -> LayerActivity:
        assert self.fired is not None
        dead, saturated = self.fired == 0, self.fired == images * num_steps
        return LayerActivity(
            name=self.name,
            step_rates=tuple((self.step_rates / images).tolist()),
            dead=dead.double().mean().item(),
            saturated=saturated.double().mean().item(),
            dead_channels=int(dead.flatten(1).all(1).sum()),
            channels=len(dead),
            neurons=dead.numel(),
            histogram=self.histogram / self.histogram.sum(),
            values=neuron_values(self.layer, network_spec),
            spikes=self.spikes,
        )


class _Recorder:
    """Sums of neurons over all batches; output of encoder and gate for the image that is drawn."""

    def __init__(self, model: Any) -> None:
        self.model, self.num_steps = model, int(model.num_steps)
        self.layers = neuron_layers(model)
        self.sums: dict[str, _Sums] = {}  # in the order in which the layers ran
        self.first: dict[str, Tensor] = {}  # of the image that is drawn
        self.batch = 0

    def run(self, images: Tensor) -> Tensor:
        """Logits of each step, (B, T, classes), of a batch that is recorded."""
        self.batch = len(images)
        encoder = {"coded": self.model.encoder} | gate_scores(self.model.encoder)
        with forward_hooks(self.layers, self._count), forward_hooks(encoder, self._keep):
            steps: Tensor = self.model.forward_steps(images)
        return steps

    def _count(self, name: str, layer: NeuronLayer, inputs: tuple[Any, ...], output: Any) -> None:
        if name not in self.sums:
            self.sums[name] = _Sums(name, layer)
        self.sums[name].add(inputs, output, self.num_steps)

    def _keep(self, name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if name in self.first:
            return
        if name == "temporal":
            self.first[name] = output[0].float().cpu()  # [T]
        elif name == "spatial":  # (B, C, H, W) of images, (T*B, C, H, W) of frames
            frames = output.unflatten(0, (-1, self.batch))[:, 0].float().cpu()
            self.first[name] = frames.expand(self.num_steps, *frames.shape[1:])  # [T, C, H, W]
        else:
            self.first[name] = output[:, 0].float().mean(1).cpu()  # [T, H, W]


@float32_as("ieee")
@torch.no_grad()
def inspect_network(
    model: Any, batches: Iterable[Tensor], weights: str = "", label_names: Sequence[str] = ()
) -> Inspection:
    """Run a network on images and record what happens in it.

    Args:
        model: A network of this package with ``forward_steps``, in eval mode; batch norms folded or not.
        batches: Images ``(B, C, H, W)`` or frames ``(B, T, C, H, W)`` of one size; the very first is drawn.
        weights: Where the weights are from, to be kept with the record.
        label_names: Names of the classes, in order; where left out, those of the model's configuration.

    Raises:
        ValueError: The model is an ANN or has no per-step logits, is in training mode, or there are no images.
    """
    refuse_ann(model, "a record of spikes and membranes")
    if not hasattr(model, "forward_steps") or not hasattr(model, "encoder"):
        raise ValueError(f"expected a network of this package, got {type(model).__name__}: see timm-gac models")
    if model.training:
        raise ValueError("expected a network in eval mode, got one in training mode: call model.eval()")
    recorder, images, first, logits = _Recorder(model), 0, None, None
    for batch in batches:
        steps = recorder.run(batch)
        if first is None:
            first, logits = batch[0], steps[0].float().cpu()
        images += len(batch)
    if first is None or logits is None:
        raise ValueError("expected at least one image, got none: give a picture")
    if not bool(logits.isfinite().all()):
        raise ValueError("expected finite logits, got NaN or infinity: look for it in the weights and the picture")
    kept = recorder.first
    gate = None
    if "temporal" in kept:
        gate = (kept["temporal"][:, None, None, None] * kept["spatial"]).sigmoid().mean(1)
    config = model.pretrained_cfg or {}
    names = tuple(label_names or config.get("label_names") or ())
    return Inspection(
        model=config.get("architecture") or type(model).__name__,
        weights=weights,
        num_steps=recorder.num_steps,
        images=images,
        picture=_picture(first, config),
        scores=mean_logits(logits[None])[0].softmax(1),
        layers=tuple(sums.result(images, recorder.num_steps, model.spec) for sums in recorder.sums.values()),
        temporal=kept.get("temporal"),
        spatial=kept["spatial"].mean(1) if "spatial" in kept else None,
        gate=gate,
        coded=kept["coded"],
        label_names=names if len(names) == logits.shape[1] else (),
    )


def _picture(image: Tensor, config: dict[str, Any]) -> Tensor:
    """An input as it looks, (H, W, C) in [0, 1], C being 1 or 3; of frames their mean."""
    image = (image.mean(0) if image.ndim == 4 else image).float().cpu()
    resolved = timm.data.resolve_data_config(pretrained_cfg=config)
    mean, std = (torch.tensor(resolved[key])[:, None, None] for key in ("mean", "std"))
    if len(mean) not in (1, len(image)) or len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
        return ((image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-9)).permute(1, 2, 0)
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0)
