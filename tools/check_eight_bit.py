"""Check and time the kernels that train in 8 bits: ``python tools/check_eight_bit.py`` on a Hopper GPU.

Every kernel runs on every shape of a network's 3x3 convolutions, and is compared with its definition at a small batch.
Then each is timed at the whole batch beside cuDNN and the norms in bfloat16, and so are whole training steps as CUDA
graphs in both precisions. Without a GPU the checks alone run, in Triton's interpreter (TRITON_INTERPRET=1).

``--parts plain`` trains in a plain loop, kernel by kernel: ten steps have to leave the same bits when Triton launches
all kernels (TIMM_GAC_DIRECT_LAUNCH=0) and when `common.launch` does, and both are timed in turn.

It ends with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch

from gac_kernels import tuning
from gac_kernels.common import launch
from timm_gac.bench.eight_bit import Case, build, cases_of, shapes_of
from timm_gac.bench.harness import measure_time
from timm_gac.bench.steps import make_step, measure_step, synchronize, time_block
from timm_gac.runtime.capture import captured

FOUND = "result "
STEPS = 10  # of which all bits are compared
ROUNDS = 5  # of times in turn


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gac_msresnet18_cifar")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128, help="for times")
    parser.add_argument("--check-batch", type=int, default=32)
    parser.add_argument("--parts", default="check,step,time", help="in this order; also: plain, profile (with step)")
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
    graph, _ = captured(lambda: [run() for _ in range(4)], device, stream)
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


def network_of(args: argparse.Namespace, int8: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A network with convolutions in 8 bits or not, and images and labels."""
    device, _ = device_and_dtype()
    torch.manual_seed(0)
    network = timm.create_model(args.model, num_classes=100, num_steps=args.num_steps)
    network = network.to(device, memory_format=torch.channels_last)
    network.set_int8_convs(int8)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(100, (args.batch,), device=device)
    return network, (images.contiguous(memory_format=torch.channels_last), labels)


def step_of(network: Any) -> Any:
    """A training step, in bfloat16 on a GPU."""
    device, _ = device_and_dtype()
    return make_step(network, "train", "bfloat16" if device.type == "cuda" else "float32", device, compiled=False)


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
        launch.forget_launches()
        network, inputs = network_of(args, int8)
        step = step_of(network)
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


def steps_bits(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What training steps in 8 bits leave: each loss, then parameters, their gradients and running statistics."""
    network, inputs = network_of(args, int8=True)
    step = step_of(network)
    found = {f"loss {i}": step(*inputs).clone() for i in range(STEPS)}
    for name, value in network.named_parameters():
        found[name] = value.detach().clone()
        if value.grad is not None:
            found[f"gradient at {name}"] = value.grad.clone()
    return found | {name: value.clone() for name, value in network.named_buffers()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that have not the same bits; a NaN is the same as itself."""
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())
    return [
        name
        for name in a
        if not torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
    ]


@contextmanager
def launches_of_triton() -> Iterator[Counter[str]]:
    """Launches by way of Triton's own look at the arguments, by kernel."""
    from triton.runtime.jit import JITFunction

    seen: Counter[str] = Counter()
    run: Any = JITFunction.run

    def count(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        seen[getattr(kernel, "__name__", str(kernel))] += 1
        return run(kernel, *args, **kwargs)

    JITFunction.run = count  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def check_plain(args: argparse.Namespace) -> dict[str, Any]:
    """Plain loops with launches by Triton and past it: whether their bits are the same, and their times in turn."""
    device, _ = device_and_dtype()
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic = False, True
    began = time.time()
    with launch.by_triton():
        first, again = steps_bits(args), steps_bits(args)
    direct = steps_bits(args)
    result: dict[str, Any] = {"direct": launch.DIRECT, "tensors": len(first)}
    wrong = ""
    if device.type == "cuda" and not launch.DIRECT:
        wrong = "nothing is launched past Triton here: unset TIMM_GAC_DIRECT_LAUNCH"
    elif not_repeated := differing(first, again):
        wrong = f"Triton's own launches do not repeat their bits, so nothing can be said: {not_repeated[:8]}"
    elif differ := differing(first, direct):
        wrong = f"{len(differ)} of {len(first)} tensors have other bits: {differ[:8]}"
    print(f"plain, {STEPS} steps: {wrong or f'the same bits in {len(first)} tensors'}, {time.time() - began:.0f} s",
          flush=True)  # fmt: skip
    del first, again, direct
    cudnn.benchmark, cudnn.deterministic = True, False
    variants = {"16 bits": (False, False), "8 bits by Triton": (True, True), "8 bits": (True, False)}
    times: dict[str, list[float]] = {label: [] for label in variants}
    built = {int8: network_of(args, int8) for int8 in (False, True)}
    steps = {int8: step_of(network) for int8, (network, _) in built.items()}
    length = 20 if device.type == "cuda" else 1
    for _ in range(ROUNDS):
        for label, (int8, slow) in variants.items():
            with launch.by_triton() if slow else nullcontext():
                for _ in range(3):  # launches are prepared anew
                    steps[int8](*built[int8][1])
                synchronize(device)
                times[label].append(time_block(steps[int8], built[int8][1], device, length))
    for label, found in times.items():
        median = statistics.median(found)
        result[label] = {"ms": [round(ms, 3) for ms in found], "images_per_s": round(args.batch / median * 1e3)}
        print(f"plain, {label}: {result[label]['images_per_s']} images/s, {median:.2f} ms a step "
              f"({min(found):.2f} to {max(found):.2f})", flush=True)  # fmt: skip
    with launches_of_triton() as seen:
        steps[True](*built[True][1])
        synchronize(device)
    result["launched by Triton in a step"] = dict(seen)
    print("plain, launched by Triton in a step all the same:", dict(seen) or "none", flush=True)
    return result | {"wrong": wrong}


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
        elif part == "plain":
            results["plain"] = check_plain(args)
        elif part == "time":
            right = {name for name, row in results.get("checks", {}).items() if not row["wrong"]}
            results["times"] = time_cases([c for c in cases if "checks" not in results or str(c) in right], args, until)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    checked = [*results.get("checks", {}).values(), results.get("plain", {"wrong": ""})]
    return int(any(row["wrong"] for row in checked))


if __name__ == "__main__":
    sys.exit(main())
