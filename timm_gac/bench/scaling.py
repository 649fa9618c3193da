"""Scaling of training over the GPUs of one host: images a second of N processes against one, each with the same batch.

For each combination the gradients of N processes are first compared with those of one, in float64. Then blocks of steps
with one process and with all alternate, so that both see the same clocks and heat. Providers: ``ddp``, PyTorch's
DistributedDataParallel, eagerly; ``all_reduce``, one all-reduce of all gradients after the backward pass;
``all_reduce+graph``, the same with the whole step as one CUDA graph, as the trainer has it under ``cuda_graph``. The
single process runs in the same way, with ordinary batch norm.

Run it as ``timm-gac bench scaling``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict

import timm
import torch
from torch import nn

from gac_kernels import resolve_backend

from ..runtime.dtypes import AUTOCAST
from ..runtime.files import check_csv
from ..runtime.graphs import GraphedStep
from ..runtime.provenance import PROVENANCE, provenance
from . import steps as bench_steps
from .harness import Row, Timing, append_rows, rows_table, show_table
from .options import ScalingConfig
from .processes import GRADIENT_TOLERANCE, Group, gradient_error, launch
from .session import CHECK_BATCH, Case, Session

_logger = logging.getLogger(__name__)
COLUMNS = (
    *("model", "provider", "batch_norm", "precision", "num_steps", "batch", "image_size", "processes", "collectives"),
    *("status", "gradient_error", "images_per_s_one", "images_per_s", "scaling", "efficiency", "median_ms_one"),
    *("median_ms", "p20_ms", "p80_ms", "repetitions", "steps_per_block", "peak_gib_one", "peak_gib", "note"),
    *PROVENANCE,
)
TABLE = {"provider": "", "batch_norm": "", "processes": "d", "batch": "d", "gradient_error": ".1e"}
TABLE |= {"images_per_s_one": ".0f", "images_per_s": ".0f", "scaling": ".3f", "efficiency": ".3f"}
TABLE |= {"median_ms_one": ".2f", "median_ms": ".2f", "p20_ms": ".2f", "p80_ms": ".2f", "peak_gib_one": ".2f"}
TABLE |= {"peak_gib": ".2f", "status": "", "note": ""}
CHECK_SIZE = 64  # pixels at most: in float64, on images of any size, the equations are the same
BLOCKS, SECONDS = 10, 20.0


class _Timed:
    """A training network, ready to be timed. Its peak memory does not count what was allocated before."""

    def __init__(self, group: Group, session: Session, provider: str, batch_norm: str) -> None:
        """``provider`` is one of `PROVIDERS`, or ``""`` or ``"+graph"`` for this process alone."""
        case, self.device = session.case, group.device
        held = torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        self.network = session.build("timm_gac")
        joined: nn.Module = self.network
        after_backward = None
        if provider.split("+")[0]:
            joined, after_backward = group.join(self.network, provider.split("+")[0], batch_norm == "sync")
        torch.manual_seed(group.rank)  # labels of its own for each process
        self.inputs = session.inputs(self.network)
        step = bench_steps.make_step(
            network=joined,
            mode="train",
            precision=case.precision,
            device=self.device,
            compiled=False,
            after_backward=after_backward,
        )
        self.run, setup = bench_steps.warm_up(step, self.inputs, self.device, graph="graph" in provider)
        self.peak_gib = None if setup["peak_gib"] is None else setup["peak_gib"] - held

    def block(self, length: int) -> float:
        """Milliseconds a step, over ``length`` steps."""
        return bench_steps.time_block(self.run, self.inputs, self.device, length)

    def close(self) -> bool:
        """Release the graph; return whether the loss is finite."""
        finite = bool(torch.isfinite(self.run(*self.inputs)).all())
        if isinstance(self.run, GraphedStep):
            self.run.release()
        return finite


def measure_scaling(group: Group, config: ScalingConfig) -> None:
    """Check and time every combination, in each process of the group; the main one writes and shows the rows."""
    size = config.image_size or timm.get_pretrained_cfg(config.model).input_size[-1]
    case = Case(
        model=config.model,
        mode="train",
        precision=config.precision,
        num_steps=config.num_steps,
        batch=config.batch,
        image_size=size,
    )
    session = Session(case, group.device, config.steps)
    backend = resolve_backend(group.device, AUTOCAST[config.precision] or torch.float32)
    shared: Row = dict.fromkeys(COLUMNS) | provenance(group.device, backend, config.commit)
    shared |= {name: value for name, value in asdict(case).items() if name in COLUMNS}
    shared |= {"processes": group.size, "collectives": group.collectives, "note": ""}
    rows: list[Row] = []
    for provider, batch_norm in config.combinations():
        error = _check(group, session, provider, batch_norm)
        row = shared | {"provider": provider, "batch_norm": batch_norm, "gradient_error": error}
        row["status"] = "ok" if error <= GRADIENT_TOLERANCE else "failed check"
        if row["status"] != "ok":
            row["note"] = f"gradients in float64: relative error above {GRADIENT_TOLERANCE:.0e}"
        elif not config.check:
            row |= _measure(group, session, provider, batch_norm)
        rows.append(row)
        if group.main:
            _logger.info("%s, batch norm %s: gradients in float64 within %.1e", provider, batch_norm, error)
            if config.csv:
                append_rows(config.csv, COLUMNS, [row])
    if group.main:
        show_table(rows_table(rows, TABLE, f"{config.model}, T={config.num_steps}, {size} px, {shared['device']}"))
    failed = [f"{row['provider']} ({row['batch_norm']}): {row['note']}" for row in rows if row["status"] != "ok"]
    if failed:
        raise ValueError(f"expected every combination to pass its checks, got {'; '.join(failed)}: see the rows")


def _check(group: Group, session: Session, provider: str, batch_norm: str) -> float:
    side = min(session.case.image_size, CHECK_SIZE)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(group.size * CHECK_BATCH, session.model.in_chans, side, side, generator=generator)
    labels = torch.randint(session.model.num_classes, (len(images),), generator=generator)
    network = session.build("timm_gac")
    return gradient_error(
        group=group,
        network=network,
        images=images.to(group.device),
        labels=labels.to(group.device),
        provider=provider,
        sync_bn=batch_norm == "sync",
    )


def _measure(group: Group, session: Session, provider: str, batch_norm: str) -> Row:
    """Time blocks of one process and of all in turn; return these fields of a row."""
    case, length = session.case, max(1, session.steps // BLOCKS)
    alone = "+graph" if "graph" in provider else ""
    bench_steps.free_memory(group.device)  # before the first graph is captured, not after: it frees workspaces
    with bench_steps.precision_settings(case.precision):
        many = _Timed(group, session, provider, batch_norm)
        one = _Timed(group, session, alone, "local") if group.main else None
        times_one, times = list[float](), list[float]()
        started = time.perf_counter()
        for _ in range(min(BLOCKS, session.steps)):
            if one is not None:
                times_one.append(one.block(length))
            spent = group.largest(time.perf_counter() - started)  # the others wait here for the main process
            if len(times) >= 3 and spent > SECONDS:
                break
            times.append(group.largest(many.block(length)))
        same, finite = group.same_weights(many.network), many.close()
        finite = finite and (one is None or one.close())
    finite = group.largest(float(not finite)) == 0.0
    status = "ok" if same and finite else "failed check"
    note = "" if same else "the processes' weights differ"
    row: Row = {"status": status, "note": note if finite else "loss is not finite", "peak_gib": many.peak_gib}
    if one is None:  # only the first process writes
        return row
    timing, timing_one = Timing.of(times), Timing.of(times_one)
    speed_one, speed = 1e3 * case.batch / timing_one.median_ms, 1e3 * case.batch * group.size / timing.median_ms
    return row | {
        **asdict(timing),
        "images_per_s_one": speed_one,
        "images_per_s": speed,
        "scaling": speed / speed_one,
        "efficiency": speed / speed_one / group.size,
        "median_ms_one": timing_one.median_ms,
        "steps_per_block": length,
        "peak_gib_one": one.peak_gib,
    }


def run(config: ScalingConfig) -> int:
    """Measure in as many processes as the options say; returns 0. Raises if a combination fails its checks."""
    if config.csv:
        check_csv(config.csv, COLUMNS)
    launch(measure_scaling, config, config.size, config.on_cuda)
    return 0
