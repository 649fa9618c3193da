"""Evaluation on labelled images: accuracy by time step, loss, calibration error and firing rates."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import compile_ahead

from ..inference.early_exit import mean_logits
from ..inference.record import forward_hooks, neuron_layers
from ..layers.encoder import DirectCoding
from ..layers.neuron_layer import NeuronLayer
from ..runtime.dtypes import computing
from ..runtime.finite import check_finite
from ..runtime.first_call import may_compile_ahead
from ..runtime.modes import eval_mode

ECE_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """Results on a labelled set of images.

    Attributes:
        images: Number of images.
        top1: Fraction of images whose label is the class of the largest mean logit.
        top5: Fraction whose label is among the five largest.
        top1_per_step: top1 of the mean logits of the first t steps, t = 1 to T.
        loss: Mean cross entropy, nats.
        ece: Expected calibration error over 15 equal bins of confidence (Guo et al., ICML 2017).
        firing_rates: Spikes per neuron and time step, by layer; for the gated encoder, the share of values above 0.
        seconds: Wall clock.
        top1_among_present_classes: top1 where only the classes that the set has can be the answer; None where the set
            has all of the network's, or which it has is not known.
        present_classes: Number of these classes.
    """

    images: int
    top1: float
    top5: float
    top1_per_step: tuple[float, ...]
    loss: float
    ece: float
    firing_rates: dict[str, float]
    seconds: float
    top1_among_present_classes: float | None = None
    present_classes: int | None = None

    @property
    def firing_rate(self) -> float:
        """Mean over layers of their firing rates; 0 where they were not recorded."""
        return sum(self.firing_rates.values()) / len(self.firing_rates) if self.firing_rates else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; what was not measured is left out."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return fields | {"top1_per_step": list(self.top1_per_step)}


class _Sums:
    """Sums over batches, on the device: no batch waits for the host."""

    def __init__(self, num_steps: int, device: torch.device, classes: Sequence[int] | None) -> None:
        self.scalars = torch.zeros(3, dtype=torch.float64, device=device)  # images, top 5, loss
        self.classes = None if classes is None else torch.tensor(classes, device=device)
        self.among = torch.zeros(1, dtype=torch.float64, device=device)  # right among these classes
        self.per_step = torch.zeros(num_steps, dtype=torch.float64, device=device)
        self.bins = torch.zeros(3, ECE_BINS, dtype=torch.float64, device=device)  # images, correct, confidence

    def add(self, steps: Tensor, labels: Tensor) -> None:
        """Per-step logits (B, T, classes) and labels (B,)."""
        cumulative = mean_logits(steps.double())
        self.per_step += (cumulative.argmax(-1) == labels[:, None]).sum(0)
        logits = cumulative[:, -1]
        top = logits.topk(min(5, logits.shape[1])).indices
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = (top == labels[:, None]).any(1).sum()
        self.scalars += torch.stack((torch.full_like(loss, len(labels)), hits.to(loss.dtype), loss))
        if self.classes is not None:
            self.among += (self.classes[logits[:, self.classes].argmax(-1)] == labels).sum()
        confidence, chosen = logits.softmax(-1).max(-1)
        place = (confidence * ECE_BINS).long().clamp(0, ECE_BINS - 1)  # of NaN any bin: the loss shows it
        values = torch.stack((torch.ones_like(confidence), (chosen == labels).double(), confidence))
        self.bins.index_add_(1, place, values)

    def tensors(self) -> list[Tensor]:
        return [self.scalars, self.per_step, self.bins, self.among]


class _Rates:
    """Firing rates of the neuron layers and of a direct encoder's values, summed on the device."""

    def __init__(self, model: nn.Module, enabled: bool, device: torch.device) -> None:
        self.layers = neuron_layers(model, also=(DirectCoding,)) if enabled else {}
        self.index = {name: index for index, name in enumerate(self.layers)}
        self.sums = torch.zeros(2, len(self.layers), dtype=torch.float64, device=device)

    def add(self, name: str, layer: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        """Count what a layer emitted."""
        spikes = layer.output_spikes(output) if isinstance(layer, NeuronLayer) else output
        self.sums[0, self.index[name]] += torch.count_nonzero(spikes)
        self.sums[1, self.index[name]] += spikes.numel()

    def rates(self) -> dict[str, float]:
        fired, neurons = self.sums.tolist()
        return {name: f / n for name, f, n in zip(self.layers, fired, neurons, strict=True) if n}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_steps: int | None = None,
    amp_dtype: torch.dtype | None = None,
    firing_rates: bool = True,
    classes: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Evaluate a spiking network, over all processes where there are several.

    Args:
        model: With ``forward_steps``; in eval mode for the duration, then in the mode it had, after an error too.
        batches: Images (B, C, H, W) and labels (B,), int64, on one device; each image once over all processes.
        num_steps: T; the model's own where None.
        amp_dtype: Autocast to this dtype; float32 where None, without TensorFloat-32.
        firing_rates: Record them.
        classes: The labels that the set has, where it has only some of the network's: counts the right answers among
            these too.
        progress: Called with the number of images after each batch.
        each: Called with the logits of each step (B, T, classes) and the labels (B,) of each batch of this process.

    Returns:
        The results.

    Raises:
        ValueError: There is no image, the model has no per-step logits, or its weights or logits are not finite.
    """
    if not hasattr(model, "forward_steps"):
        raise ValueError(f"expected a model with forward_steps, got {type(model).__name__}: use one of this package")
    check_finite(model, "to evaluate")
    steps = num_steps or int(model.num_steps)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    sums, rates = _Sums(steps, device, classes), _Rates(model, firing_rates, device)
    ahead = may_compile_ahead(model)
    started = time.perf_counter()
    with eval_mode(model), forward_hooks(rates.layers, rates.add):
        for images, labels in batches:
            with computing(device, amp_dtype):
                forward = functools.partial(_forward_steps, model, images, rates if ahead else None)
                logits = compile_ahead(forward, device) if ahead else forward()
            ahead = False
            sums.add(logits, labels)
            if each is not None:
                each(logits, labels)
            if progress is not None:
                progress(len(labels))
    tensors = [*sums.tensors(), rates.sums]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return _result(sums, rates, started)


def _forward_steps(model: Any, images: Tensor, rates: _Rates | None) -> Tensor:
    """Logits of each step; with ``rates`` these begin anew, as `compile_ahead` may call this twice."""
    if rates is not None:
        rates.sums.zero_()
    logits: Tensor = model.forward_steps(images)
    return logits


def _result(sums: _Sums, rates: _Rates, started: float) -> Evaluation:
    images, top5, loss = sums.scalars.tolist()
    if not images:
        raise ValueError("expected at least one image to evaluate, got none: check the data set and its split")
    if not math.isfinite(loss):
        raise ValueError(f"expected finite logits, got a loss of {loss}: look for NaN in the weights and the images")
    _, correct, confidence = sums.bins
    per_step = tuple((sums.per_step / images).tolist())
    ece = (correct - confidence).abs().sum().item() / images
    return Evaluation(
        images=int(images),
        top1=per_step[-1],
        top5=top5 / images,
        top1_per_step=per_step,
        loss=loss / images,
        ece=ece,
        firing_rates=rates.rates(),
        seconds=time.perf_counter() - started,
        top1_among_present_classes=None if sums.classes is None else sums.among.item() / images,
        present_classes=None if sums.classes is None else len(sums.classes),
    )


@contextmanager
def evaluate_state(model: nn.Module, state: dict[str, Tensor] | None) -> Iterator[None]:
    """Give a model other weights for the duration, in place (addresses stay, as CUDA graphs need)."""
    if state is None:
        yield
        return
    own = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.copy_(state[name])
        yield
    finally:
        for name, tensor in own.items():
            tensor.copy_(kept[name])
