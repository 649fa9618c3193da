"""Search launch parameters of neuron and encoder on this machine's GPU, for each element size and T.

    python -m timm_gac.bench.tune.neuron --update
    python -m timm_gac.bench.tune.neuron --ops lif_learned_fwd lif_learned_bwd --dtypes bfloat16 --steps 4

They are searched at one size that fills the GPU. --update writes the best into this GPU's JSON file, which
`gac_kernels.tuning` reads; without it they are only printed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import tyro
from triton.testing import do_bench_cudagraph

from gac_kernels import CIFAR, IMAGENET, tuning

from ...runtime.dtypes import DTYPES
from .shared import compile_in_processes, report, say, start_from_defaults, use

NEURON_STEPS = 2**27
WARPS = (1, 2, 4, 8)
ELEMENTS_PER_THREAD = (2, 4, 8, 16)
TILES = (1, 4, 16)
Plain = Literal["lif_fwd", "lif_bwd", "lif_bwd_mask", "gac_fwd", "gac_bwd", "gac_fire_fwd", "gac_fire_bwd"]
Learned = Literal["lif_learned_fwd", "lif_learned_bwd"]
Kernel = Literal[Plain, Learned]
# Of the kernel that sums gradients of decays: elements a thread has of a step, its registers, tiles in flight, and how
# many programs there are for each that fits onto a multiprocessor at a time.
SHARED = tuple(itertools.product(((4, 64), (4, 80), (4, 168), (8, 128)), (1, 2), (1, 4)))
REGISTERS = 65536  # of a multiprocessor
Call = Callable[[], object]


@dataclass(frozen=True)
class NeuronSearch:
    """Options of the search.

    Args:
        update: Write the best parameters into this GPU's JSON file.
        steps: Numbers of time steps T.
        ops: Kernels.
        dtypes: Dtypes of the inputs.
        elements: Elements per thread to try.
        jobs: Processes that compile.
        share: Only compile this share of the candidates, of ``jobs``; the search starts such processes itself.
    """

    update: bool = False
    steps: tuple[int, ...] = (2, 4, 6, 8)
    ops: tuple[Kernel, ...] = get_args(Kernel)
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    elements: tuple[int, ...] = ELEMENTS_PER_THREAD
    jobs: int = 8
    share: int | None = None


def neuron_calls(num_steps: int, dtype: torch.dtype) -> dict[str, list[Call]]:
    """Calls of each kernel of neuron and encoder, at a size that fills the GPU."""
    ops = torch.ops.gac_kernels
    shape = (NEURON_STEPS // num_steps // (128 * 32 * 32), 128, 32, 32)
    x, grad = (torch.randn(num_steps, *shape, device="cuda", dtype=dtype) for _ in range(2))
    no_mask = torch.empty(0, device="cuda", dtype=torch.uint8)
    mask = ops.lif(x, None, *IMAGENET.op_arguments, True, False)[2]
    values = torch.stack((torch.rand(128) * 0.8 + 0.1, torch.rand(128) + 0.4)).cuda()
    last = [v.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, v.shape[:2]) for v in (x, grad)]
    layouts = [(x, grad), tuple(last)]
    both = [(v, g, spec) for v, g in layouts for spec in (CIFAR, IMAGENET)]
    frame, spatial = x[0].clone(), grad[0].clone()
    temporal = torch.randn(shape[0], num_steps, device="cuda", dtype=dtype)
    strides = x.stride()
    inputs = (frame, spatial, temporal)
    return {
        "lif_fwd": [lambda: ops.lif(x, None, *CIFAR.op_arguments, False, False)],
        "lif_bwd": [lambda: ops.lif_backward(grad, None, x, None, no_mask, strides, *CIFAR.op_arguments)],
        "lif_bwd_mask": [lambda: ops.lif_backward(grad, None, no_mask, None, mask, strides, *IMAGENET.op_arguments)],
        "lif_learned_fwd": [partial(ops.lif, v, None, *CIFAR.op_arguments, False, False, values) for v, _ in layouts],
        "lif_learned_bwd": [
            partial(ops.lif_backward_learned, g, None, v, None, values, *spec.op_arguments[2:]) for v, g, spec in both
        ],
        "gac_fwd": [lambda: ops.gated_lif(frame, spatial, temporal, *CIFAR.op_arguments)],
        "gac_bwd": [
            lambda: ops.gated_lif_backward(grad, frame, spatial, temporal, *CIFAR.op_arguments),
            lambda: ops.gated_lif_backward(grad, frame, spatial, temporal, *IMAGENET.op_arguments),
        ],
        "gac_fire_fwd": [lambda: ops.gac_fire(*inputs, False, *CIFAR.op_arguments)],
        "gac_fire_bwd": [
            lambda: ops.gac_fire_backward(grad, x, *inputs, None, *CIFAR.op_arguments),
            lambda: ops.gac_fire_backward(grad, x, *inputs, None, *IMAGENET.op_arguments),
        ],
    }


def candidates(op: str, elements: Sequence[int]) -> Iterator[dict[str, int]]:
    """Launch parameters of ``op`` to try."""
    default = tuning.DEFAULTS[op]
    if "PER_SM" in default:
        for warps, ((each, registers), stages, waves) in itertools.product(WARPS[2:], SHARED):
            if each in elements and (stages == 1 or waves == 1):
                config = {"TILE": 32 * warps * each, "num_warps": warps, "STAGES": stages, "REGS": registers}
                yield default | config | {"PER_SM": waves * (REGISTERS // (32 * warps * registers))}
        return
    for warps, each in itertools.product(WARPS, elements):
        if warps * each < 4 or ("TILES" in default and (warps > 4 or each > 8)):
            continue
        if "TILE" in default:
            yield default | {"TILE": 32 * warps * each, "num_warps": warps}
            continue
        for tiles in TILES if "TILES" in default else (0,):
            yield {"BLOCK": 32 * warps * each, "num_warps": warps} | ({"TILES": tiles} if tiles else {})


def compile_share(work: Sequence[tuple[str, list[Call]]], elements: Sequence[int], share: int, jobs: int) -> None:
    """Compile every ``jobs``-th program, from number ``share``."""
    pairs = [(op, config, call) for op, calls in work for config in candidates(op, elements) for call in calls]
    defaults = {op: tuning.DEFAULTS[op] for op, _ in work}
    for op, config, call in pairs[share::jobs]:
        use(op, config)
        call()
    for op, default in defaults.items():
        use(op, default)
    torch.cuda.synchronize()


def milliseconds(calls: list[Call]) -> float:
    """Milliseconds of all calls, in CUDA graphs: eager launches can take longer than the kernels."""
    return sum(do_bench_cudagraph(call, rep=5, return_mode="median") for call in calls)


def search(op: str, calls: list[Call], elements: Sequence[int]) -> tuple[dict[str, int], dict[str, float]]:
    """Best launch parameters of ``op``, and the milliseconds of every candidate.

    Of kernels with values of channels they are those of contiguous and channels-last memory together.
    """
    default, times = tuning.DEFAULTS[op], {}
    for config in candidates(op, elements):
        use(op, config)
        times[json.dumps(config)] = milliseconds(calls)
    use(op, default)
    return json.loads(min(times, key=times.__getitem__)), times


def search_all(options: NeuronSearch) -> dict[str, dict[str, dict[str, int]]]:
    """Search every op, element size and T; a process with a share only compiles and returns nothing."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for dtype, num_steps in itertools.product((DTYPES[name] for name in options.dtypes), options.steps):
        calls = neuron_calls(num_steps, dtype)
        work = [(op, calls[op]) for op in options.ops]
        if options.share is not None:
            compile_share(work, options.elements, share=options.share, jobs=options.jobs)
            continue
        for op, runs in work:
            best, times = search(op, runs, options.elements)
            default = milliseconds(runs)
            found.setdefault(op, {})[f"{dtype.itemsize}:{num_steps}"] = best
            if num_steps == 4 and "REGS" not in best:  # registers depend on T
                found[op][str(dtype.itemsize)] = best
            say(f"{op} {dtype} T={num_steps}: {min(times.values()):.4f} ms with {best}, default {default:.4f} ms")
            say({config: round(time, 4) for config, time in sorted(times.items(), key=lambda pair: pair[1])[:12]})
        del calls, work
        torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Search what the options name, print the results and update the file where asked."""
    options = tyro.cli(NeuronSearch, args=arguments, description=__doc__)
    start_from_defaults()
    for name in [name for name in tuning.DEFAULTS if ":" in name and name.partition(":")[0] in options.ops]:
        del tuning.DEFAULTS[name]  # parameters for a single T, which would override every candidate
    if options.share is None:
        compile_in_processes("timm_gac.bench.tune.neuron", options.jobs)
    found = search_all(options)
    if options.share is None:
        report(found, options.update)


if __name__ == "__main__":
    main()
