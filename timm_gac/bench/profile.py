"""Profile of a training or inference step by kind of kernel."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..runtime.files import write_json
from .harness import Row
from .steps import Step

# The first match wins. Patterns are searched in "operator > kernel", with the operator that launched the kernel. On a
# CPU there are only operators, where one convolution_backward computes both gradients.
KINDS = (
    ("spike packing", r"pack_kernel|(un)?pack_spikes"),
    ("convolution, data gradient", r"dgrad"),
    ("convolution, weight gradient", r"wgrad"),
    ("optimizer", r"sgd|optimizer|amp_update_scale|multi_tensor"),
    ("encoder", r"gac_encode|gac_fire|gated_lif|(gated|fire)_(fwd|bwd)|(pad|pool)_frames|_pad_(backward_)?kernel"),
    ("convolution and LIF in one pass", r"conv_lif_kernel|spike_conv_kernel"),
    ("convolution, backward", r"conv\w*_backward"),
    ("convolution, forward", r"aten::\w*conv|fprop"),
    ("elementwise and reductions", r"firing_rate"),
    ("fused norm and LIF", r"gac_kernels|_lif_|lif_(fwd|bwd)"),
    ("batch norm", r"batch_norm"),
    ("copies and casts", r"copy|memcpy|memset|aten::to\b|nchwto|nhwcto|aten::(fill_|zero_|zeros|cat|constant_pad_nd)"),
    ("classifier and loss", r"addmm|aten::mm|linear|log_softmax|nll_loss"),
    (
        "elementwise and reductions",
        r"elementwise|reduce|aten::(add|mul|sub|div|neg|abs|mean|sum|gt|lt|le|ge|relu|sigmoid)",
    ),
    ("elementwise and reductions", r"aten::(amax|where|stack|clamp|masked_fill|threshold|lerp|rsqrt|pow|square)"),
)


def kind_of(operator: str, kernel: str = "") -> str:
    """Kind of a kernel, by its name and the name of the operator that launched it."""
    text = f"{operator} > {kernel}".lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, text)), "other")


def profile_step(step: Step, inputs: tuple[torch.Tensor, ...], device: torch.device, *, repetitions: int = 3) -> Row:
    """Profile a step that has been warmed up.

    Args:
        step: Step to run, launched eagerly: its kernels are the same in a CUDA graph.
        inputs: Its inputs.
        device: Device it runs on. On a CPU the times are operators' own times, without the operators they call.
        repetitions: Number of steps to average over.

    Returns:
        ``total_ms`` of one step's kernels, and ``kinds``: for each kind its ``ms``, ``share`` of the total, number of
        ``calls`` and the names that took longest.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(repetitions):
            step(*inputs)
        if on_cuda:
            torch.cuda.synchronize(device)
    spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for operator, kernel, microseconds in _timings(profiler.events(), on_cuda):
        spent[kind_of(operator, kernel)][kernel or operator].append(microseconds / 1e3 / repetitions)
    totals = {kind: sum(sum(times) for times in names.values()) for kind, names in spent.items()}
    total = max(sum(totals.values()), 1e-9)
    kinds: dict[str, Row] = {}
    for kind, ms in sorted(totals.items(), key=lambda item: -item[1]):
        names = {name: sum(times) for name, times in spent[kind].items()}
        top = {name[:120]: names[name] for name in sorted(names, key=names.__getitem__, reverse=True)[:5]}
        calls = sum(len(times) for times in spent[kind].values()) / repetitions
        kinds[kind] = {"ms": ms, "share": ms / total, "calls": calls, "longest_ms": top}
    return {"total_ms": total, "kinds": kinds}


def _timings(events: Sequence[Any], on_cuda: bool) -> Iterator[tuple[str, str, float]]:
    """Operator, kernel and microseconds of every kernel (CUDA) or operator (CPU)."""
    if not on_cuda:
        yield from ((event.name, "", event.self_cpu_time_total) for event in events if event.self_cpu_time_total > 0)
        return
    device_events = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    unclaimed: dict[str, float] = defaultdict(float)
    for event in device_events:
        unclaimed[event.name] += event.time_range.elapsed_us()
    for event in events:
        for kernel in event.kernels:  # attached to the innermost operator that was running at their launch
            if kernel.name in unclaimed:
                unclaimed[kernel.name] -= kernel.duration
                yield event.name, kernel.name, kernel.duration
    # Kernels that no operator launched, such as memory sets of a library.
    yield from (("", name, microseconds) for name, microseconds in unclaimed.items() if microseconds > 0.5)


def append_json(path: Path, entries: Sequence[Row]) -> None:
    """Append entries to the JSON list in a file.

    Raises:
        ValueError: The file exists and holds no JSON list.
    """
    held = read_json(path)
    write_json(path, [*held, *entries], indent=1)


def read_json(path: Path) -> list[Row]:
    """The JSON list in a file; empty if there is no file.

    Raises:
        ValueError: The file exists and holds no JSON list.
    """
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text())
    except json.JSONDecodeError:
        held = None
    if not isinstance(held, list):
        raise ValueError(f"expected {path} to hold a JSON list of profiles, got something else: choose another file")
    return held
