"""Loss curves of fused and plain training on real data: do they differ more than seeds do?

Spiking networks are chaotic at initialisation, so gradients of whole networks cannot be compared, but loss curves can.
Both backends get the same initial weights, images and order for each seed.

Run it as ``timm-gac bench curves``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from gac_kernels import resolve_backend, use_backend

from ..data import DeviceLoader, ImageArrays, load_arrays
from ..runtime.device import resolve_device
from ..runtime.dtypes import AUTOCAST, autocast
from ..runtime.figures import hide_frame, new_figure
from ..runtime.files import check_csv
from ..runtime.provenance import PROVENANCE, provenance
from .harness import Row, append_rows
from .options import CurveConfig

_logger = logging.getLogger(__name__)
COLUMNS = ("model", "data", "precision", "num_steps", "batch", "curve", "seed", "step", "loss", *PROVENANCE)


def train_curve(config: CurveConfig, arrays: ImageArrays, seed: int, device: torch.device) -> list[float]:
    """Train on the current backend; return the loss of every step."""
    torch.manual_seed(seed)
    classes, channels = arrays.num_classes, arrays.images.shape[1]
    network = timm.create_model(config.model, num_classes=classes, in_chans=channels, num_steps=config.num_steps)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = DeviceLoader(
        arrays,
        config.batch,
        device=device,
        mean=[0.5] * channels,
        std=[0.5] * channels,
        augmentation=None,
        num_classes=classes,
        seed=seed,
        training=True,
    )
    losses: list[torch.Tensor] = []
    for epoch in range(-(-config.steps // len(loader))):
        for images, targets in loader.batches(epoch):
            if len(losses) == config.steps:
                break
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 10 * (len(losses) + 1) / config.steps)
            with autocast(device, config.precision):
                logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smooth(curves: Sequence[Sequence[float]], window: int) -> torch.Tensor:
    """Moving averages of the curves: (curves, steps - window + 1)."""
    return F.avg_pool1d(torch.tensor(curves)[:, None], window, stride=1)[:, 0]


def share_within(fused: torch.Tensor, eager: torch.Tensor) -> float:
    """Share of the steps at which the mean fused curve lies within the span of the eager seeds.

    The span is from their smallest to their largest value, widened by 10 % of their mean on both sides: a few seeds
    underestimate the spread, above all late in training, where the curves converge.
    """
    margin = 0.1 * eager.mean(0)
    mean = fused.mean(0)
    return ((mean >= eager.amin(0) - margin) & (mean <= eager.amax(0) + margin)).float().mean().item()


def compare_curves(config: CurveConfig) -> float:
    """Train every backend and seed, write the files that the config names, and return `share_within`."""
    if config.csv:
        check_csv(config.csv, COLUMNS)
    device = resolve_device(config.device)
    arrays = load_arrays(config.data, "train", data_dir=config.data_dir or None, image_size=config.image_size)
    curves: dict[str, list[list[float]]] = {}
    rows: list[Row] = []
    for curve, backend in {"fused": config.fused, "eager": "eager"}.items():
        for seed in config.seeds:
            with use_backend(backend):
                losses = train_curve(config, arrays, seed, device)
                origin = provenance(device, resolve_backend(device, AUTOCAST[config.precision] or torch.float32))
            curves.setdefault(curve, []).append(losses)
            _logger.info("%s (%s), seed %d: loss %.4f to %.4f", curve, backend, seed, losses[0], losses[-1])
            shared: Row = {name: getattr(config, name) for name in ("model", "precision", "num_steps", "batch")}
            shared |= {"data": _name(config.data), "curve": curve, "seed": seed, **origin}
            rows += [shared | {"step": step, "loss": loss} for step, loss in enumerate(losses)]
    if config.csv:
        append_rows(config.csv, COLUMNS, rows)
    smoothed = {name: smooth(losses, config.window) for name, losses in curves.items()}
    if config.png:
        _draw(smoothed, config)
    share = share_within(smoothed["fused"], smoothed["eager"])
    final = {name: [round(x, 4) for x in losses[:, -1].tolist()] for name, losses in smoothed.items()}
    _logger.info("mean fused loss within the span of eager seeds at %.1f %% of the steps; last %s", 100 * share, final)
    return share


def _name(data: str) -> str:
    """The data set's name; for a file its name without the path, which stays private."""
    return Path(data).stem if Path(data).exists() else data


def _draw(smoothed: dict[str, torch.Tensor], config: CurveConfig) -> None:
    from matplotlib.ticker import MultipleLocator, NullLocator, StrMethodFormatter

    figure = new_figure(7, 4)
    axis = figure.subplots()
    for name, colour in (("eager", "#9aa5b1"), ("fused", "#0b6e4f")):
        for nth, losses in enumerate(smoothed[name]):
            steps = range(config.window, config.window + len(losses))
            axis.plot(
                steps, losses, color=colour, linewidth=1, label=None if nth else f"{name}, {len(config.seeds)} seeds"
            )
    axis.set(xlabel="step", ylabel=f"loss, mean of {config.window} steps", yscale="log")
    axis.yaxis.set_major_locator(MultipleLocator(0.2))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.1f}"))
    axis.yaxis.set_minor_locator(NullLocator())
    title = f"{config.model}, {_name(config.data)}, T={config.num_steps}, {config.precision}"
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=8)
    hide_frame(axis)
    assert config.png is not None
    config.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.png)


def run(config: CurveConfig) -> int:
    """Compare; return 0 if the fused curve is within the eager seeds' span at 95 % of the steps or more, else 1."""
    return int(compare_curves(config) < 0.95)
