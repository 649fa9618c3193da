"""Search launch parameters of the batch-norm kernels within a training step.

    python -m timm_gac.bench.tune.network gac_msresnet18_cifar --steps 2 4 6 8 --update

The time of such a kernel depends on what the kernel before left in the L2 cache, so each candidate is timed by the
profiler within a whole step in a CUDA graph. Each kernel is searched separately for its variants: plain, with a
residual, with a residual that has a norm of its own. --update writes the best into this GPU's JSON file, which
`gac_kernels.tuning` reads; without it they are only printed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import timm
import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from triton.runtime.errors import OutOfResources

from gac_kernels import tuning
from gac_kernels.norm import batch_stats, launch

from ...runtime import graphs
from ...runtime.dtypes import DTYPES
from ..steps import make_step
from .shared import say, start_from_defaults, update, use

# Name of a kernel in a profile, and the op whose launch parameters it uses.
KERNELS = {
    "_batch_stats_kernel": "batch_stats",
    "forward_kernel": "norm_lif_fwd",
    "reduce_kernel": "norm_lif_bwd_reduce",
    "apply_kernel": "norm_lif_bwd_apply",
}
WITHOUT_STEPS = ("batch_stats",)  # does not depend on T: searched at the first one
KINDS = ("", "_residual", "_normed")
TILES = ((256, 1), (512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8))  # elements and warps
SHARED_TILES = ((256, 1, 4, 3), (256, 1, 8, 2), (512, 2, 2, 3), (512, 2, 4, 3), (1024, 4, 3, 1), (1024, 4, 2, 1))
STATISTICS = ((512, 1, 16, 4), (1024, 1, 8, 3), (1024, 2, 8, 3), (4096, 8, 4, 1))  # also programs, stages
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {"batch_stats": STATISTICS, "norm_lif_bwd_reduce": SHARED_TILES}
REPLAYS = 6
Config = dict[str, int]


@dataclass(frozen=True)
class NetworkSearch:
    """Options of the search within a model's training step.

    Args:
        model: Registered model.
        image_size: Height and width of the images; 0 is the model's own.
        dtype: Dtype of autocast.
        batch: Images.
        steps: Numbers of time steps T to search.
        update: Write the best parameters into this GPU's JSON file.
    """

    model: tyro.conf.Positional[str]
    image_size: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch: int = 128
    steps: tuple[int, ...] = (4,)
    update: bool = False


def candidates(family: str) -> Iterator[Config]:
    """Launch parameters to try for all variants of an op."""
    names = ("TILE", "num_warps", "PER_SM", "STAGES")
    for shape in SHAPES.get(family, TILES):
        yield dict(zip(names, shape, strict=False))


def members(family: str) -> list[str]:
    """The variants of an op."""
    return [family + kind for kind in KINDS if family + kind in tuning.DEFAULTS]


@contextlib.contextmanager
def record_launches(into: list[str]) -> Iterator[None]:
    """Append the op of every launch within the block to ``into``."""
    ask: Callable[..., Config] = tuning.launch_config

    def note(op: str, *args: object) -> Config:
        into.append(op)
        return ask(op, *args)

    prepare: list[tuple[Any, str]] = [(batch_stats, "_launches"), (launch, "_forward"), (launch, "_backward")]
    with contextlib.ExitStack() as stack:
        for module, name in prepare:  # each launch is prepared anew
            stack.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
            stack.enter_context(mock.patch.object(module, "launch_config", note))
        yield


def milliseconds(options: NetworkSearch, num_steps: int) -> dict[str, float]:
    """Milliseconds of each op in a training step, and of all together under "step"."""
    torch.manual_seed(0)
    network = timm.create_model(options.model, num_steps=num_steps).cuda().to(memory_format=torch.channels_last)
    size = options.image_size or timm.get_pretrained_cfg_value(options.model, "input_size")[-1]
    images = torch.randn(options.batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(network.num_classes, (options.batch,), device="cuda")
    launched: list[str] = []
    step = make_step(network, "train", options.dtype, images.device, compiled=False)
    with mock.patch.object(graphs, "overlap_weight_gradients", contextlib.nullcontext):  # one kernel after the other
        run = graphs.GraphedStep(step, warmup=2)
        run(images, labels)
        with record_launches(launched):
            run(images, labels)
        for _ in range(6):
            run(images, labels)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            run(images, labels)
        torch.cuda.synchronize()
    events = sorted((event for event in profiled.events() if event.name in KERNELS), key=lambda e: e.time_range.start)
    times: dict[str, float] = {}
    for kernel, family in KERNELS.items():
        ops = [op for op in launched if op.startswith(family)]
        taken = [event.device_time / 1e3 for event in events if event.name == kernel]
        if len(taken) != REPLAYS * len(ops):
            raise SystemExit(
                f"expected {REPLAYS * len(ops)} launches of {kernel} in the profile, got {len(taken)}: again"
            )
        for index, op in enumerate(ops):
            times[op] = times.get(op, 0.0) + statistics.median(taken[index :: len(ops)])
    times["step"] = sum(times.values())
    run.release()
    return times


def search(options: NetworkSearch, num_steps: int, families: Iterable[str]) -> dict[str, Config]:
    """Best launch parameters of each op in some families, as far as the network launches them."""
    best: dict[str, Config] = {}
    for family in families:
        results: list[tuple[dict[str, Config], dict[str, float]]] = []
        before = {op: tuning.DEFAULTS[op] for op in members(family)}
        for config in ({}, *candidates(family)):
            tried = {op: default | config for op, default in before.items()}
            for op, value in tried.items():
                use(op, value)
            gc.collect()
            with contextlib.suppress(OutOfResources):  # more shared memory than there is
                results.append((tried, milliseconds(options, num_steps)))
                shown = {op: round(time, 3) for op, time in results[-1][1].items() if op in (*before, "step")}
                say(f"T={num_steps} {family} {config or 'default'}: {shown}")
        for op in before:
            timed = [(times[op], tried[op]) for tried, times in results if op in times]
            if timed:
                best[op] = min(timed, key=lambda pair: pair[0])[1]
            use(op, best.get(op, before[op]))
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Search for every T, print the JSON, and update the file where asked."""
    options = tyro.cli(NetworkSearch, args=arguments, description=__doc__)
    torch.backends.cudnn.benchmark = True
    start_from_defaults()
    defaults = {op: config for op, config in tuning.DEFAULTS.items() if ":" not in op}
    size, found = DTYPES[options.dtype].itemsize, dict[str, dict[str, Config]]()
    families = list(KERNELS.values())
    for num_steps in options.steps:
        tuning.DEFAULTS.clear()  # drops parameters for a single T, which would override every candidate
        tuning.DEFAULTS.update(
            defaults | {op: of_size[str(size)] for op, of_size in found.items() if str(size) in of_size}
        )
        for op, config in search(options, num_steps, families).items():
            found.setdefault(op, {})[str(size) if op in WITHOUT_STEPS else f"{size}:{num_steps}"] = config
        families = [family for family in families if family not in WITHOUT_STEPS]
        if options.update:
            say(f"written to {update(found)}")
    say(json.dumps(found, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
