"""Search launch parameters of neuron and encoder on this machine's GPU, for each element size and T.

    python kernels/benchmarks/tune.py --update
    python kernels/benchmarks/tune.py --ops lif_fwd lif_bwd --dtypes bfloat16 --steps 4

They are searched at one size that fills the GPU. --update writes the best into the JSON file of this GPU that
`gac_kernels.tuning` reads; without it they are only printed. A person runs this once a device and reviews the result;
nothing searches at run time. `tune_network.py` searches the batch-norm kernels, `tune_convolutions.py` convolutions.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from triton.testing import do_bench_cudagraph
from tuned import compile_in_processes, start_from_defaults, update, use

from gac_kernels import CIFAR, IMAGENET, tuning

NEURON_STEPS = 2**27
WARPS = (1, 2, 4, 8)
ELEMENTS_PER_THREAD = (2, 4, 8, 16)
TILES = (1, 4, 16)
NEURONS = ("lif_fwd", "lif_bwd", "lif_bwd_mask", "gac_fwd", "gac_bwd", "gac_fire_fwd", "gac_fire_bwd")
Call = Callable[[], object]


def neuron_calls(num_steps: int, dtype: torch.dtype) -> dict[str, list[Call]]:
    """One call of each kernel of neuron and encoder at a size that fills the GPU."""
    ops = torch.ops.gac_kernels
    shape = (NEURON_STEPS // num_steps // (128 * 32 * 32), 128, 32, 32)
    x, grad = (torch.randn(num_steps, *shape, device="cuda", dtype=dtype) for _ in range(2))
    no_mask = torch.empty(0, device="cuda", dtype=torch.uint8)
    mask = ops.lif(x, None, *IMAGENET.op_arguments, True, False)[2]
    frame, spatial = x[0].clone(), grad[0].clone()
    temporal = torch.randn(shape[0], num_steps, device="cuda", dtype=dtype)
    strides = x.stride()
    inputs = (frame, spatial, temporal)
    return {
        "lif_fwd": [lambda: ops.lif(x, None, *CIFAR.op_arguments, False, False)],
        "lif_bwd": [lambda: ops.lif_backward(grad, None, x, None, no_mask, strides, *CIFAR.op_arguments)],
        "lif_bwd_mask": [lambda: ops.lif_backward(grad, None, no_mask, None, mask, strides, *IMAGENET.op_arguments)],
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
    for warps, each in itertools.product(WARPS, elements):
        if warps * each < 4 or ("TILES" in default and (warps > 4 or each > 8)):
            continue
        for tiles in TILES if "TILES" in default else (0,):
            yield {"BLOCK": 32 * warps * each, "num_warps": warps} | ({"TILES": tiles} if tiles else {})


def compile_share(work: Sequence[tuple[str, list[Call]]], elements: Sequence[int], share: int, jobs: int) -> None:
    """Compile every ``jobs``-th program, from number ``share``."""
    for op, calls in work:
        default, programs = tuning.DEFAULTS[op], list(candidates(op, elements))
        for config in programs[share::jobs]:
            use(op, config)
            for call in calls:
                call()
        use(op, default)
    torch.cuda.synchronize()


def milliseconds(calls: list[Call]) -> float:
    """Time of all calls, each in a CUDA graph: eager launches can take longer than the kernels."""
    return sum(do_bench_cudagraph(call, rep=5, return_mode="median") for call in calls)


def search(op: str, calls: list[Call], elements: Sequence[int]) -> tuple[dict[str, int], dict[str, float]]:
    """Best launch parameters of ``op`` and the time of every candidate, in milliseconds."""
    default, times = tuning.DEFAULTS[op], {}
    for config in candidates(op, elements):
        use(op, config)
        times[json.dumps(config)] = milliseconds(calls)
    use(op, default)
    return json.loads(min(times, key=times.__getitem__)), times


def main() -> None:
    """Search every op, element size and T, print the results and update the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the best into this GPU's JSON file")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 6, 8], help="T to search")
    parser.add_argument("--ops", nargs="+", default=NEURONS, choices=NEURONS, help="kernels to search")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes to search")
    parser.add_argument("--elements", type=int, nargs="+", default=ELEMENTS_PER_THREAD, help="elements a thread to try")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    start_from_defaults()
    if args.share is None:
        compile_in_processes(args.jobs)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for dtype, num_steps in itertools.product((getattr(torch, name) for name in args.dtypes), args.steps):
        calls = neuron_calls(num_steps, dtype)
        work = [(op, calls[op]) for op in args.ops]
        if args.share is not None:
            compile_share(work, args.elements, args.share, args.jobs)
            continue
        for op, runs in work:
            best, times = search(op, runs, args.elements)
            default = milliseconds(runs)
            found.setdefault(op, {})[f"{dtype.itemsize}:{num_steps}"] = best
            if num_steps == 4:
                found[op][str(dtype.itemsize)] = best
            print(f"{op} {dtype} T={num_steps}: {min(times.values()):.4f} ms with {best}, default {default:.4f} ms")
            print({config: round(time, 4) for config, time in sorted(times.items(), key=lambda pair: pair[1])[:12]})
        del calls, work
        torch.cuda.empty_cache()
    if args.share is None:
        print(json.dumps(found, indent=2, sort_keys=True))
        if args.update:
            print(f"written to {update(found)}")


if __name__ == "__main__":
    main()
