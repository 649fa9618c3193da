"""Check and time the kernels that train in 8 bits: ``python tools/check_eight_bit.py`` on a Hopper GPU.

Every kernel runs on every shape of a network's 3x3 convolutions, and is compared with its definition at a small batch.
Then each is timed at the whole batch beside cuDNN and the norms in bfloat16, and so are whole training steps as CUDA
graphs in both precisions. Without a GPU the checks alone run, in Triton's interpreter (TRITON_INTERPRET=1).

It ends with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from gac_kernels import tuning
from timm_gac.bench.eight_bit import Case, build, cases_of, shapes_of
from timm_gac.bench.harness import measure_time
from timm_gac.bench.steps import make_step, measure_step

FOUND = "result "


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gac_msresnet18_cifar")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128, help="for times")
    parser.add_argument("--check-batch", type=int, default=32)
    parser.add_argument("--parts", default="check,step,time", help="in this order; profile adds the step's kernels")
    parser.add_argument("--only", default="", help="cases whose name has one of these words in it, by commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile and check side by side")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case is begun after so many")
    parser.add_argument("--variants", type=Path, help="JSON: kernel, or step, to launch parameters to try beside these")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU and bfloat16; in the interpreter, which cuts bits off where a GPU rounds, float32."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32


def check_cases(cases: list[Case], args: argparse.Namespace, until: float) -> dict[str, dict[str, Any]]:
    """Errors of each case, and what is wrong with it; the first launch of a case compiles it."""
    torch.backends.cudnn.allow_tf32 = False
    device, dtype = device_and_dtype()
    found = {}
    for case in cases:
        if time.time() > until:
            break
        began = time.time()
        try:
            built = build(case, args.num_steps, args.check_batch, device, dtype)
            errors, wrong = built.check(built.run())
        except Exception as error:  # the others are to be checked all the same
            errors, wrong = {}, f"{type(error).__name__}: {str(error)[-600:]}"
        found[str(case)] = {"errors": errors, "wrong": wrong, "s": round(time.time() - began, 1)}
        if args.share is not None:
            print(FOUND + json.dumps({str(case): found[str(case)]}), flush=True)
    return found


def check_in_processes(cases: list[Case], args: argparse.Namespace, until: float) -> dict[str, dict[str, Any]]:
    """`check_cases`, shared among processes: Triton compiles on one core."""
    command = [sys.executable, *sys.argv, "--seconds", str(until - time.time()), "--share"]
    children = [
        subprocess.Popen([*command, str(share)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for share in range(args.jobs)
    ]
    found: dict[str, dict[str, Any]] = {}
    for child in children:
        try:
            out, _ = child.communicate(timeout=max(1.0, until + 5.0 - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
        for line in out.splitlines():
            found |= json.loads(line.removeprefix(FOUND)) if line.startswith(FOUND) else {}
    for case in cases:
        found.setdefault(str(case), {"errors": {}, "wrong": "not checked in time", "s": 0.0})
    return found


def in_graph_us(run: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of a launch in a CUDA graph of four, so that the host costs nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(4):
            run()
    return round(1e3 * measure_time(graph.replay, device, target_ms=4.0, warmup_ms=1.0).median_ms / 4, 1)


def time_cases(cases: list[Case], args: argparse.Namespace, until: float) -> dict[str, dict[str, float]]:
    """Microseconds of each case and, once a shape, of the same work in 16 bits."""
    torch.backends.cudnn.benchmark = True
    device, dtype = device_and_dtype()
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        if time.time() > until:
            print("no time left for", case)
            break
        built = build(case, args.num_steps, args.batch, device, dtype)
        row = found[str(case)] = {"us": in_graph_us(built.run, device)}
        if built.baseline is not None and case.config is None:
            row["16 bits"] = in_graph_us(built.baseline, device)
        print(f"{case}:", ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return found


def step_of(args: argparse.Namespace, int8: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A training step in bfloat16, with convolutions in 8 bits or not, and its inputs."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    network = timm.create_model(args.model, num_classes=100, num_steps=args.num_steps)
    network = network.to(device, memory_format=torch.channels_last)
    network.set_int8_convs(int8)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(100, (args.batch,), device=device)
    step = make_step(network, "train", "bfloat16", device, compiled=False)
    return step, (images.contiguous(memory_format=torch.channels_last), labels)


def time_steps(args: argparse.Namespace, variants: list[dict[str, dict[str, int]]], until: float) -> dict[str, Any]:
    """Whole steps as CUDA graphs: in 16 bits, in 8, and in 8 with other launch parameters, given by operator."""
    torch.backends.cudnn.benchmark = True
    found: dict[str, Any] = {}
    defaults = dict(tuning.DEFAULTS)
    for name, int8, changed in [("16 bits", False, {}), ("8 bits", True, {}), *(("8 bits", True, v) for v in variants)]:
        if time.time() > until:
            print("no time left for the step", name, changed)
            continue
        tuning.DEFAULTS |= {op: defaults[op] | config for op, config in changed.items()}
        tuning.launch_config.cache_clear()
        tuning.shape_config.cache_clear()
        step, inputs = step_of(args, int8)
        row = measure_step(step, inputs, torch.device("cuda"), graph=True, steps=40, seconds=2.0)
        row["images_per_s"] = round(args.batch / row["median_ms"] * 1e3)
        label = f"{name} {json.dumps(changed) if changed else ''}".strip()
        found[label] = row | {"loss": step(*inputs).item()}
        print(f"step, {label}: {row['images_per_s']} images/s, {row['median_ms']:.3f} ms, {row['peak_gib']:.2f} GiB,",
              f"loss {found[label]['loss']:.4f}", flush=True)  # fmt: skip
        if "profile" in args.parts and int8 and not changed:
            found["profile"] = profile(step, inputs)
        tuning.DEFAULTS |= defaults
    return found


def profile(step: Any, inputs: tuple[torch.Tensor, ...]) -> list[tuple[str, int, int]]:
    """Kernels of a step: name, calls and microseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        step(*inputs)
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    found = [(event.key[:80], event.count, round(event.self_device_time_total)) for event in events]
    found.sort(key=lambda row: -row[2])
    for name, calls, us in found[:32]:
        print(f"{us:8d} us {calls:4d} {name}")
    return found


def main() -> int:
    """Check, time, print, and write the results."""
    args = options()
    began = time.time()
    until = began + args.seconds
    variants = json.loads(args.variants.read_text()) if args.variants else {}
    cases = cases_of(shapes_of(args.model, args.num_steps, args.image_size), variants)
    words = [word for word in args.only.split(",") if word]
    cases = [case for case in cases if not words or any(word in str(case) for word in words)]
    if args.share is not None:
        check_cases(cases[args.share :: args.jobs], args, until)
        return 0
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for part in args.parts.split(","):
        if part == "check":
            check = check_in_processes if args.jobs > 1 else check_cases
            results["checks"] = check(cases, args, until if args.parts == "check" else began + 0.6 * args.seconds)
            for name, row in results["checks"].items():
                if row["wrong"]:
                    print("WRONG", name, row)
            print(f"{len(results['checks'])} cases checked, {time.time() - began:.0f} s", flush=True)
        elif part == "step":
            results["steps"] = time_steps(args, variants.get("step", []), until)
        elif part == "time":
            right = {name for name, row in results.get("checks", {}).items() if not row["wrong"]}
            results["times"] = time_cases([c for c in cases if "checks" not in results or str(c) in right], args, until)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return int(any(row["wrong"] for row in results.get("checks", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
