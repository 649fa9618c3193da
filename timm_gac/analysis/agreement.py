"""How far a network's answers agree between number formats, and in which layers its spikes begin to differ.

A neuron fires or does not, so where a membrane lies close to its threshold a rounding error decides.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inference.fold import fuse_for_inference
from ..inference.quantize import quantize
from ..inference.record import forward_hooks, neuron_layers
from ..models.ann_resnet import refuse_ann
from ..runtime.dtypes import autocast

MARGINS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # logits of the winning class above the second
FORMATS = ("float32", "float64", "channels_last", "bfloat16", "float16", "folded", "int8")


@dataclass(frozen=True)
class Agreement:
    """One format against the reference, on the same images.

    Attributes:
        format: Which.
        top1: Its accuracy.
        agree: Share of images with the reference's class.
        agree_per_step: The same of the mean logits of the first t steps, t = 1 to T.
        by_margin: Lower end of a bin of the reference's margin, number of images in it, share of these with its class.
        logit_difference: Root mean square of the difference of mean logits.
        layers: Share of neuron-steps whose spike differs, by layer of the reference in the order in which they run.
    """

    format: str
    top1: float
    agree: float
    agree_per_step: tuple[float, ...]
    by_margin: tuple[tuple[float, int, float], ...]
    logit_difference: float
    layers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class AgreementReport:
    """What `compare_formats` found.

    Attributes:
        images: Number of images.
        reference: The format that the others are compared with, the first.
        rows: Of each format, the reference first.
        pairs: Share of images with the same class for every two formats, by their names.
        firing_rates: Of the reference, by layer.
    """

    images: int
    reference: str
    rows: tuple[Agreement, ...]
    pairs: dict[str, dict[str, float]]
    firing_rates: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


class _Format:
    """A network in one format, and what it gave on the images so far."""

    def __init__(self, name: str, model: Any) -> None:
        if name not in FORMATS:
            raise ValueError(f"expected formats among {', '.join(FORMATS)}, got {name!r}: choose some of these")
        self.name = name
        network = copy.deepcopy(model).eval()
        if name == "folded":
            network = fuse_for_inference(network)
        elif name == "int8":
            try:
                network = quantize(network)
            except ValueError as error:
                raise ValueError(f"{error}; or compare other formats, --formats float32 folded") from error
        elif name == "float64":
            network = network.double()
        elif name == "channels_last":
            network = network.to(memory_format=torch.channels_last)
        self.network: Any = network
        self.precision = name if name in ("bfloat16", "float16") else "float32"
        self.layers = neuron_layers(network)
        self.logits: list[Tensor] = []
        self.differ: list[Tensor] = []  # of each batch, (layers,)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Keep the logits of a batch; returns which neurons fired, by layer in the order in which they ran."""
        fired: dict[str, Tensor] = {}

        def keep(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            fired[name] = layer.output_spikes(output) != 0

        images = images.double() if self.name == "float64" else images
        if self.name == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        with forward_hooks(self.layers, keep), autocast(images.device, self.precision):
            logits = self.network.forward_steps(images)
        self.logits.append(logits.double().cpu())
        return fired

    def count(self, fired: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
        """Count the neuron-steps of a batch at which this format and the reference differ."""
        shapes = [[part.shape for part in each.values()] for each in (fired, reference)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"expected the same layers in {self.name} as in the reference, got others: leave it out")
        pairs = zip(fired.values(), reference.values(), strict=True)
        self.differ.append(torch.stack([(mine != theirs).sum().cpu() for mine, theirs in pairs]))

    def cumulative(self) -> Tensor:
        """Mean logits of the first t steps, (N, T, classes) in float64."""
        logits = torch.cat(self.logits)
        return logits.cumsum(1) / torch.arange(1, logits.shape[1] + 1)[:, None]


@torch.no_grad()
def compare_formats(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    formats: Sequence[str] = FORMATS,
    progress: Callable[[int], None] | None = None,
) -> AgreementReport:
    """Run a trained network in several number formats on the same images.

    Args:
        model: A network of this package with batch norms, in float32; it is left alone.
        batches: Images ``(B, C, H, W)`` in float32 and labels (B,), on its device.
        formats: Out of `FORMATS`: float32 (contiguous), channels_last (float32), folded (float32, batch norms in the
            convolutions), bfloat16 and float16 (autocast), int8 (`timm_gac.quantize`) and float64. The first is what
            the others are compared with.
        progress: Called with the number of images after each batch and format.

    Raises:
        ValueError: A format is unknown or there are fewer than two, there are no images, or the network is an ANN or
            cannot be folded or quantised.
    """
    if len(formats) < 2 or len(set(formats)) < len(formats):
        raise ValueError(f"expected two or more different formats, got {list(formats)}: name some of {FORMATS}")
    refuse_ann(model, "the layers in which spikes begin to differ")
    made = [_Format(name, model) for name in formats]
    labels, fires, values, names = list[Tensor](), list[Tensor](), list[Tensor](), list[str]()
    for images, classes in batches:
        reference = made[0].run(images)
        names = list(reference)
        fires.append(torch.stack([part.sum().cpu() for part in reference.values()]))
        values.append(torch.tensor([part.numel() for part in reference.values()]))
        labels.append(classes.cpu())
        for each in made:
            each.count(reference if each is made[0] else each.run(images), reference)
            if progress is not None:
                progress(len(classes))
    if not labels:
        raise ValueError("expected at least one image, got none: check the data")
    answers = {each.name: each.cumulative() for each in made}
    total = torch.stack(values).sum(0)
    own = answers[formats[0]]
    classes = torch.cat(labels)
    rows = []
    for each in made:
        rates = (torch.stack(each.differ).sum(0) / total).tolist()
        rows.append(_row(each.name, own, answers[each.name], classes, dict(zip(names, rates, strict=True))))
    last = {name: logits[:, -1].argmax(1) for name, logits in answers.items()}
    pairs = {a: {b: float((x == y).double().mean()) for b, y in last.items()} for a, x in last.items()}
    firing = dict(zip(names, (torch.stack(fires).sum(0) / total).tolist(), strict=True))
    return AgreementReport(len(classes), formats[0], tuple(rows), pairs, firing)


def _row(name: str, reference: Tensor, found: Tensor, labels: Tensor, layers: dict[str, float]) -> Agreement:
    same = reference.argmax(-1) == found.argmax(-1)  # [N, T]
    if reference.shape[-1] > 1:
        best = reference[:, -1].topk(2).values
        margin = best[:, 0] - best[:, 1]
    else:
        margin = torch.zeros(len(reference))
    bins = []
    for low, high in zip(MARGINS, (*MARGINS[1:], math.inf), strict=True):
        chosen = (margin >= low) & (margin < high)
        count = int(chosen.sum())
        bins.append((low, count, float(same[chosen, -1].double().mean()) if count else math.nan))
    return Agreement(
        format=name,
        top1=float((found[:, -1].argmax(1) == labels).double().mean()),
        agree=float(same[:, -1].double().mean()),
        agree_per_step=tuple(same.double().mean(0).tolist()),
        by_margin=tuple(bins),
        logit_difference=float((reference - found)[:, -1].square().mean().sqrt()),
        layers=layers,
    )
