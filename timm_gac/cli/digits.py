"""The demonstration: a spiking network learns scikit-learn's handwritten digits, is saved, reloaded and drawn.

Run it as ``timm-gac demo`` or ``make demo``. The claim it checks: at least 95 % of digits it has not seen are read
right, and the network that comes back from the saved folder gives exactly the same logits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..analysis.inspect.figures import draw_trains, plain_axis
from ..data import load_arrays
from ..data.transforms import Normalizer
from ..hub import save_model_folder
from ..inference.record import record_spikes
from ..runtime.figures import new_figure
from ..runtime.files import write_json
from ..runtime.progress import progress_of
from ..runtime.terminal import new_table, plain
from .demo_config import DemoConfig
from .output import check_writable, create_console

RESULT = "demo.json"  # also the mark of a folder that the demo made and may write again
REQUIRED_ACCURACY = 0.95
MODEL = "test_gac_msresnet"
PIXELS = 8
MEAN, STD = (0.5,), (0.5,)  # of pixels in [0, 1]


def run_demo(config: DemoConfig, console: Console | None = None) -> int:
    """Train, evaluate, save, reload, compare and draw.

    Returns:
        0, or 1 where the accuracy is under 95 % or the reloaded network gives other logits.

    Raises:
        ValueError: ``out`` holds files of somebody else.
    """
    console = console or create_console()
    check_folder(config.out, config.overwrite)
    started = time.perf_counter()
    train_set, test_set = load_digits("train"), load_digits("test")
    torch.manual_seed(config.seed)
    model = create_demo_model(config.num_steps)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"[bold]{MODEL}[/]: {parameters:,} parameters, {config.num_steps} time steps; "
        f"{len(train_set)} digits to learn from, {len(test_set)} to be tested on",
        soft_wrap=True,
    )
    train(model, train_set, config, console)
    train_seconds = time.perf_counter() - started

    images, labels = test_set.tensors
    logits, rates = evaluate(model, images)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    save_model_folder(model, config.out)
    reloaded = timm.create_model(f"local-dir:{config.out}", pretrained=True).eval()
    equal = torch.equal(evaluate(reloaded, images)[0], logits)
    raster = draw_raster(reloaded, images, labels, config.out / "spikes.png")

    result = {
        "model": MODEL,
        "accuracy": accuracy,
        "test_digits": len(labels),
        "parameters": parameters,
        "num_steps": config.num_steps,
        "epochs": config.epochs,
        "seed": config.seed,
        "train_seconds": round(train_seconds, 1),
        "firing_rates": rates,
        "reload_equal": equal,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    write_json(config.out / RESULT, result)
    seconds = time.perf_counter() - started
    console.print(rate_table(rates))
    passed = accuracy >= REQUIRED_ACCURACY
    folder = escape(plain(config.out))
    console.print(
        f"test accuracy   {_mark(passed)} {accuracy:.2%} ({round(accuracy * len(labels))} of {len(labels)} digits)\n"
        f"reloaded logits {_mark(equal)} {'equal, bit for bit' if equal else 'different'}\n"
        f"time            {train_seconds:.0f} s to train, {seconds:.0f} s in all\n"
        f"model           {folder}/config.json, {folder}/model.safetensors\n"
        f"spikes          {escape(plain(raster))}",
        highlight=False,
    )
    return 0 if passed and equal else 1


def _mark(good: bool) -> str:
    return "[green]ok  [/]" if good else "[red]FAIL[/]"


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder with files that the demo did not make.

    Raises:
        ValueError: ``out`` is a file, or such a folder and ``overwrite`` is not set.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder, got the file {out}: choose another --out")
    check_writable(out, "--out")
    if out.is_dir() and any(out.iterdir()) and not (overwrite or (out / RESULT).is_file()):
        raise ValueError(
            f"expected a new, an empty or an earlier demo's folder, got {out}: choose another --out or --overwrite"
        )


def load_digits(split: Literal["train", "test"]) -> TensorDataset:
    """scikit-learn's 1,797 handwritten digits as ``--data digits`` has them: every fifth is for testing.

    So `timm-gac eval demo --data digits` evaluates on digits that the network has not seen.

    Returns:
        Images ``(N, 1, 8, 8)`` in [-1, 1], normalised as the network's ``pretrained_cfg`` says, and labels ``(N,)``.
    """
    digits = load_arrays("digits", split)
    normalize = Normalizer(MEAN, STD, torch.device("cpu"), torch.float32)
    return TensorDataset(normalize(digits.images), digits.labels)


def create_demo_model(num_steps: int) -> nn.Module:
    """The tiny membrane-shortcut network with gated attention coding, for one channel of 8x8 pixels and ten classes."""
    preprocessing = {"input_size": (1, PIXELS, PIXELS), "pool_size": (2, 2), "mean": MEAN, "std": STD}
    return timm.create_model(
        MODEL, num_classes=10, in_chans=1, num_steps=num_steps, pretrained_cfg_overlay=preprocessing
    )


def train(model: nn.Module, digits: TensorDataset, config: DemoConfig, console: Console) -> None:
    """Train on the CPU: AdamW, cosine schedule, shifts by up to one pixel."""
    from accelerate import Accelerator
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    accelerator = Accelerator(cpu=True)
    loader = DataLoader(digits, config.batch_size, shuffle=True, generator=torch.Generator().manual_seed(config.seed))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    total = config.epochs * len(loader)
    scheduler = CosineLRScheduler(
        optimizer, total, warmup_t=total // 10, warmup_lr_init=config.lr / 100, t_in_epochs=False
    )
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step, average = 0, float("nan")
    network.train()
    with progress_of("training", total, console=console, seconds=10) as advance:
        for _ in range(config.epochs):
            for images, labels in loader:
                scheduler.step_update(step)
                loss = F.cross_entropy(network(shift(images)), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                step += 1
                average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
                advance(1)
    console.print(f"loss            {average:.3f} in the end", soft_wrap=True, highlight=False)
    model.eval()


def shift(images: Tensor) -> Tensor:
    """Images ``(B, 1, H, W)``, each shifted by -1, 0 or 1 pixel in each direction and padded with background (-1)."""
    rows, columns = images.shape[-2:]
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, rows, 1).unfold(3, columns, 1)  # (B, 1, 3, 3, H, W)
    which = torch.arange(len(images)), 0, torch.randint(3, (len(images),)), torch.randint(3, (len(images),))
    return windows[which].unsqueeze(1)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Logits ``(N, classes)`` and the firing rate of each neuron layer: spikes per neuron and time step."""
    with record_spikes(model) as recording:
        logits = model(images)
    return logits, {name: (spikes != 0).float().mean().item() for name, spikes in recording.spikes.items()}


def rate_table(rates: dict[str, float]) -> Table:
    """Firing rates with a bar each."""
    table = new_table("Firing rate (spikes per neuron and time step)", ["layer"], ["rate"])
    table.add_column("0 to 50 %", min_width=25)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1%}", f"[cyan]{'█' * round(min(rate, 0.5) * 50)}[/]")
    return table


@torch.no_grad()
def draw_raster(model: Any, images: Tensor, labels: Tensor, path: Path, neurons: int = 32) -> Path:
    """Draw one digit of each class on its way through the network, time from left to right.

    Args:
        model: Network with gated attention coding, in eval mode.
        images: Images ``(N, 1, H, W)``.
        labels: Their classes ``(N,)``, each of 0 to 9 at least once.
        path: PNG file to write.
        neurons: Neurons drawn of each layer, those whose firing varies most between the digits and steps.

    Returns:
        ``path``.
    """
    steps: int = model.num_steps
    chosen = images[torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])]
    with record_spikes(model) as recording:
        evidence = model.forward_steps(chosen).softmax(-1)  # (10, T, classes)
    assert recording.gate is not None  # the demonstration's network has gated attention coding
    gate = recording.gate.mean(2)  # (10, T, H, W)
    by_digit = {name: spikes.unflatten(0, (steps, 10)).transpose(0, 1) for name, spikes in recording.spikes.items()}
    encoded = by_digit["encoder"].mean(2)

    figure = new_figure(13, 11, dpi=110)
    heights = [1.9, 0.9, 0.9, 7.2, 2.0]
    axes = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    for digit in range(10):
        extent = (digit * steps + steps / 2 - 2, digit * steps + steps / 2 + 2, 0, 1)
        axes[0].imshow(-chosen[digit, 0], cmap="gray", extent=extent, aspect="auto")
    axes[0].set_title(f"Ten unseen digits, {steps} time steps each, through {MODEL}", loc="left", fontsize=14, pad=10)
    for axis, maps, colours, name in ((axes[1], gate, "magma", "gate"), (axes[2], encoded, "viridis", "gated\nspikes")):
        strip = torch.cat(list(maps.flatten(0, 1)), dim=1)  # (H, 10*T*W)
        axis.imshow(strip, cmap=colours, extent=(0, 10 * steps, 0, 1), aspect="auto", interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    draw_trains(axes[3], {name: _neurons_of(spikes, neurons) for name, spikes in by_digit.items()})
    axes[4].imshow(
        evidence.flatten(0, 1).T, cmap="Greens", vmin=0, vmax=1, extent=(0, 10 * steps, 9.5, -0.5), aspect="auto"
    )
    axes[4].set(yticks=range(10), xlim=(0, 10 * steps), xlabel="time step")
    axes[4].set_ylabel("class\nscores", rotation=0, ha="right", va="center")
    axes[4].set_xticks(
        [step + 0.5 for step in range(10 * steps)], [str(step % steps + 1) for step in range(10 * steps)]
    )
    for axis in axes:
        plain_axis(axis, 8)
        for digit in range(1, 10):
            axis.axvline(digit * steps, color="0.75" if axis in (axes[0], axes[3]) else "white", linewidth=1)
    for axis in axes[:3]:
        axis.set_yticks([])
    figure.savefig(path)
    return path


def _neurons_of(spikes: Tensor, count: int) -> Tensor:
    """Those of ``(10, T, C, H, W)`` whose firing varies most between digits and steps, as ``(10*T, count)``."""
    trains = (spikes != 0).float().flatten(2).flatten(0, 1)
    return trains[:, trains.var(0).topk(min(count, trains.shape[1])).indices.sort().values]
