"""Information in an encoder's output at each time step: entropies and mutual information.

Real values are counted in bins of equal width between the 0.1 % and 99.9 % quantiles of the encoder's first batch (the
lowest and the highest over all steps); 0 has a bin of its own, since gated spikes are mostly 0. Entropies are plug-in
estimates in bits with the Miller-Madow correction, (m - 1) / 2N nats for m occupied bins and N samples. A sample is one
neuron (channel and position) of one image, drawn at random. Entropies depend on the bins: compare networks by how
they grow over time, not by their size. Spikes are binary and need no bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inference.record import forward_hooks
from ..layers.neuron_layer import NeuronLayer
from ..runtime.dtypes import float32_as
from ..runtime.figures import hide_frame, new_figure

MAX_CODE = 2**62


@dataclass(frozen=True)
class Coding:
    """Entropies of a sequence Y_1 ... Y_T of one neuron, in bits; each tuple has one entry per time step.

    Attributes:
        entropy: Entropy of each step alone, H(Y_t).
        joint: Joint entropy of all steps so far, H(Y_1, ..., Y_t).
        new: Conditional entropy H(Y_t | Y_1, ..., Y_t-1): what the step adds; 0 where it repeats the steps before.
        shared_with_first: Mutual information with the first step, I(Y_1; Y_t).
        about_input: Mutual information I(A; Y_1, ..., Y_t) with A, the binned output of the stem at the same neuron.
    """

    entropy: tuple[float, ...]
    joint: tuple[float, ...]
    new: tuple[float, ...]
    shared_with_first: tuple[float, ...]
    about_input: tuple[float, ...]


@dataclass(frozen=True)
class CodingReport:
    """Coding measures of a network on images.

    Attributes:
        model: Name of the network.
        num_steps: Number of time steps T.
        images: Number of images.
        samples: Number of neurons drawn.
        bins: Bins of a real value, without that of 0.
        input_entropy: Entropy H(A) of the binned output of the stem.
        encoder: Of the encoder's output.
        spikes: Of the spikes of the neuron that follows the encoder; None where the network has a convolution there.
    """

    model: str
    num_steps: int
    images: int
    samples: int
    bins: int
    input_entropy: float
    encoder: Coding
    spikes: Coding | None

    def to_dict(self) -> dict[str, Any]:
        """The measures, ready for JSON."""
        return asdict(self)


def entropy_bits(codes: Tensor) -> float:
    """Entropy of integer codes ``(N,)`` in bits: plug-in estimate with Miller and Madow's correction."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    total = counts.sum()
    share = counts / total
    plain = -(share * share.log2()).sum()
    return float(plain + (len(counts) - 1) / (2 * total * torch.log(torch.tensor(2.0, dtype=torch.float64))))


class _Bins:
    """Bins of equal width for values (T, ...); 0 has a bin of its own.

    Their range is the lowest 0.1 % and the highest 99.9 % quantile over steps. Quantiles are taken of each step alone,
    so that values which repeat over time have the bins of one step: I(A; A) is then H(A).
    """

    def __init__(self, values: Tensor, count: int) -> None:
        some = values.flatten(1)[:, :: max(1, values[0].numel() // 1_000_000)].double()
        edges = torch.quantile(some, torch.tensor([0.001, 0.999], dtype=torch.float64), dim=1)
        self.low, high = edges[0].min().item(), edges[1].max().item()
        self.count, self.width = count, max((high - self.low) / count, 1e-12)

    def __call__(self, values: Tensor) -> Tensor:
        place = ((values.double() - self.low) / self.width).floor().clamp(0, self.count - 1).long() + 1
        return torch.where(values == 0, torch.zeros_like(place), place)


def _sequence(codes: Tensor, stem: Tensor, base: int) -> Coding:
    """Measures of codes (T, N), each below ``base``, with the stem's codes (N,)."""
    steps = len(codes)
    entropy = [entropy_bits(step) for step in codes]
    joint, about, history = [], [], torch.zeros_like(codes[0])
    stem_base, stem_entropy = int(stem.max()) + 1, entropy_bits(stem)
    for step in codes:
        # Histories are numbered anew at each step, so codes stay small however long the sequence.
        history = torch.unique(history * base + step, return_inverse=True)[1]
        joint.append(entropy_bits(history))
        assert (int(history.max()) + 1) * max(stem_base, base) < MAX_CODE
        about.append(max(0.0, stem_entropy + joint[-1] - entropy_bits(history * stem_base + stem)))
    new = [max(0.0, after - before) for before, after in zip([0.0, *joint], joint, strict=False)]
    shared = [max(0.0, entropy[0] + entropy[t] - entropy_bits(codes[0] * base + codes[t])) for t in range(steps)]
    return Coding(tuple(entropy), tuple(joint), tuple(new), tuple(shared), tuple(about))


@float32_as("ieee")
@torch.no_grad()
def measure_coding(
    model: Any, batches: Iterable[Tensor], bins: int = 16, samples_per_image: int = 4096, seed: int = 0
) -> CodingReport:
    """Entropy and mutual information of the encoder's output over time.

    Args:
        model: A network of this package, in eval mode.
        batches: Images ``(B, C, H, W)``.
        bins: Bins of a real value.
        samples_per_image: Neurons drawn of each image, at most all.
        seed: Of the draw.

    Raises:
        ValueError: There are no images, too few bins, or the model has no encoder.
    """
    if not hasattr(model, "encoder"):
        raise ValueError(f"expected a network of this package, got {type(model).__name__}: see timm-gac models")
    if bins < 2 or samples_per_image < 1:
        raise ValueError(f"expected bins >= 2 and samples >= 1, got {bins} and {samples_per_image}: raise them")
    codes = _Codes(int(model.num_steps), bins, samples_per_image, seed)
    parts = {"encoder": model.encoder}
    if isinstance(model.lif, NeuronLayer):  # a network of plain blocks has none here
        parts["lif"] = model.lif
    with forward_hooks(parts, codes.keep):
        for batch in batches:
            if batch.ndim != 4:
                raise ValueError(f"expected static images (B, C, H, W), got {tuple(batch.shape)}: give pictures")
            model.forward_intermediates(batch, indices=[0], stop_early=True, intermediates_only=True)
            codes.add_batch()
    if not codes.images:
        raise ValueError("expected at least one image, got none: check the data")
    stem, coded, *spikes = codes.joined().values()
    config = model.pretrained_cfg or {}
    return CodingReport(
        model=config.get("architecture") or type(model).__name__,
        num_steps=int(model.num_steps),
        images=codes.images,
        samples=stem.numel(),
        bins=bins,
        input_entropy=entropy_bits(stem),
        encoder=_sequence(coded, stem, bins + 1),
        spikes=_sequence(spikes[0], stem, 2) if spikes else None,
    )


class _Codes:
    """Bin numbers of randomly drawn neurons over all batches: stem output, encoder output, spikes behind it."""

    def __init__(self, num_steps: int, bins: int, samples_per_image: int, seed: int) -> None:
        self.num_steps, self.bins, self.samples_per_image = num_steps, bins, samples_per_image
        self.generator = torch.Generator().manual_seed(seed)
        self.images = 0
        self._kept: dict[str, Tensor] = {}  # of the batch that runs
        self._bins: dict[str, _Bins] = {}  # of the first batch
        self._codes: dict[str, list[Tensor]] = {}

    def keep(self, name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what went through the encoder, or what the neuron behind it emitted."""
        if name == "encoder":
            self._kept.update(stem=inputs[0], coded=output)
        else:
            self._kept.update(spikes=layer.output_spikes(output).unflatten(0, (self.num_steps, -1)))

    def add_batch(self) -> None:
        """Draw neurons of the batch that was kept, and code them."""
        stem, coded = self._kept["stem"].float().cpu(), self._kept["coded"].float().cpu()
        neurons = stem[0].numel()
        count = min(neurons, self.samples_per_image)
        drawn = torch.stack([torch.randperm(neurons, generator=self.generator)[:count] for _ in stem])  # [B, count]
        values = {"stem": stem.flatten(1).gather(1, drawn).flatten(), "coded": _draw(coded, drawn)}
        if "spikes" in self._kept:
            values["spikes"] = _draw(self._kept["spikes"].cpu(), drawn)
        if not self._bins:
            self._bins = {"stem": _Bins(stem[None], self.bins), "coded": _Bins(coded, self.bins)}
        for name, value in values.items():
            code = self._bins[name](value) if name in self._bins else (value != 0).long()
            self._codes.setdefault(name, []).append(code)
        self.images += len(stem)

    def joined(self) -> dict[str, Tensor]:
        """Of all batches, by name: ``stem`` (N,), ``coded`` (T, N) and, where a neuron follows, ``spikes`` (T, N)."""
        return {name: torch.cat(parts, -1) for name, parts in self._codes.items()}


def _draw(values: Tensor, drawn: Tensor) -> Tensor:
    """Values (T, B, C, H, W) of the drawn neurons (B, count), at every step: (T, B * count)."""
    return values.flatten(2).gather(2, drawn.expand(len(values), *drawn.shape)).flatten(1)


def write_coding_chart(reports: Sequence[CodingReport], file: Path) -> None:
    """Draw, for each network, the new information of each step at the encoder and at the neurons behind it."""
    figure = new_figure(8.4, 3.7, dpi=120)
    axes = figure.subplots(1, 2)
    titles = ("Encoder's output (binned)", "Spikes of the neurons behind it")
    for report, colour in zip(reports, ("#2a6f97", "#b5651d", "#0b6e4f", "#b04a5a"), strict=False):
        steps = range(1, report.num_steps + 1)
        for axis, coding in zip(axes, (report.encoder, report.spikes), strict=True):
            if coding is not None:
                axis.plot(steps, coding.new, marker="o", color=colour, label=f"{report.model}: new")
                axis.plot(steps, coding.joint, linestyle=":", color=colour, label=f"{report.model}: so far")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set(xlabel="time step", ylabel="bits a neuron", ylim=(0, None))
        axis.set_xticks(range(1, max(report.num_steps for report in reports) + 1))
        axis.grid(alpha=0.3)
    hide_frame(*axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file)
