"""Search launch parameters on this machine's GPU and print, or write, the JSON that `gac_kernels.tuning` reads.

    python kernels/benchmarks/tune.py --out kernels/torch-ext/gac_kernels/configs

A person runs it once a device and reviews the result; nothing searches at run time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from triton.testing import do_bench

from gac_kernels import CIFAR, IMAGENET, LIFSpec, tuning

NEURON_STEPS = 2**27
WARPS = (1, 2, 4, 8)
ELEMENTS_PER_THREAD = (2, 4, 8, 16)
TILES = (1, 4, 16)
OPS = ("lif_fwd", "lif_bwd", "lif_bwd_mask", "gac_fwd", "gac_bwd", "gac_fire_fwd", "gac_fire_bwd")


def scalars(spec: LIFSpec) -> tuple[float, float, int, float, bool, bool]:
    """The spec as the raw ops take it."""
    return spec.threshold, spec.decay, spec.surrogate_id, spec.width, spec.detach_reset, spec.soft_reset


def workloads(num_steps: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One call of each kernel at a size that fills the GPU."""
    ops = torch.ops.gac_kernels
    shape = (NEURON_STEPS // num_steps // (128 * 32 * 32), 128, 32, 32)
    x, grad = (torch.randn(num_steps, *shape, device="cuda", dtype=dtype) for _ in range(2))
    no_mask = torch.empty(0, device="cuda", dtype=torch.uint8)
    mask = ops.lif(x, None, *scalars(IMAGENET), True, False)[2]
    frame, spatial = x[0].clone(), grad[0].clone()
    temporal = torch.randn(shape[0], num_steps, device="cuda", dtype=dtype)
    strides = x.stride()
    frame_and_scores = (frame, spatial, temporal)
    return {
        "lif_fwd": lambda: ops.lif(x, None, *scalars(CIFAR), False, False),
        "lif_bwd": lambda: ops.lif_backward(grad, None, x, None, no_mask, strides, *scalars(CIFAR)),
        "lif_bwd_mask": lambda: ops.lif_backward(grad, None, no_mask, None, mask, strides, *scalars(IMAGENET)),
        "gac_fwd": lambda: ops.gated_lif(frame, spatial, temporal, *scalars(CIFAR)),
        "gac_bwd": lambda: ops.gated_lif_backward(grad, frame, spatial, temporal, *scalars(CIFAR)),
        "gac_fire_fwd": lambda: ops.gac_fire(*frame_and_scores, False, *scalars(CIFAR)),
        "gac_fire_bwd": lambda: ops.gac_fire_backward(grad, x, *frame_and_scores, None, *scalars(CIFAR)),
    }


def search(op: str, run: Callable[[], object], per_thread: Sequence[int]) -> tuple[dict[str, int], dict[str, float]]:
    """Best launch parameters of ``op`` and the median of every candidate, in milliseconds."""
    times = {}
    for warps in WARPS:
        for elements in per_thread:
            if warps * elements < 4 or ("TILES" in tuning.DEFAULTS[op] and (warps > 4 or elements > 8)):
                continue
            for tiles in TILES if "TILES" in tuning.DEFAULTS[op] else (0,):
                candidate = {"BLOCK": 32 * warps * elements, "num_warps": warps} | ({"TILES": tiles} if tiles else {})
                tuning.DEFAULTS[op] = candidate
                tuning.launch_config.cache_clear()
                times[json.dumps(candidate)] = do_bench(run, warmup=5, rep=25, return_mode="median")
    return json.loads(min(times, key=times.__getitem__)), times


def main() -> None:
    """Search every op, element size and T, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write <device name>.json to; an existing file is refused")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 6, 8], help="T to search")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, help="kernels to search")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes to search")
    parser.add_argument("--elements", type=int, nargs="+", default=ELEMENTS_PER_THREAD, help="elements a thread to try")
    args = parser.parse_args()
    name = torch.cuda.get_device_name().replace(" ", "_")
    target = args.out / f"{name}.json" if args.out else None
    if target is not None and target.exists():
        raise SystemExit(f"expected no file at {target}, found one: move it away to search again")
    tuning._device_configs = lambda _: {}  # the search starts from the defaults, not from an earlier result
    result: dict[str, dict[str, dict[str, int]]] = {}
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for num_steps in args.steps:
            calls = workloads(num_steps, dtype)
            for op, run in ((op, calls[op]) for op in args.ops):
                best, times = search(op, run, args.elements)
                result.setdefault(op, {})[f"{dtype.itemsize}:{num_steps}"] = best
                if num_steps == 4:
                    result[op][str(dtype.itemsize)] = best
                print(op, dtype, num_steps, {k: round(v, 4) for k, v in times.items()}, flush=True)
            torch.cuda.empty_cache()
    text = json.dumps(result, indent=2, sort_keys=True)
    print(text)
    if target is not None:
        target.write_text(text + "\n")


if __name__ == "__main__":
    main()
