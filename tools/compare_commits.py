"""Time two versions of this package in turn: ``python tools/compare_commits.py OLD NEW`` on a GPU.

OLD and NEW are commits, or folders with a source tree. Each runs in a process of its own, with the same weights and
images: inference folded and in 8 bits at batch 16 and 512, and a training step at batch 128, each one CUDA graph. The
processes take turns, so a clock that changes meets both. It prints the medians and ends with 1 where a ratio of new to
old is above ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

# Runs in each tree, and so calls only what all versions have.
WORKER = """
import copy, json, sys, time
import timm, torch
import timm_gac

device, torch.backends.cudnn.benchmark = torch.device("cuda"), True
torch.manual_seed(0)
model = timm.create_model(sys.argv[1], num_classes=100).to(device, memory_format=torch.channels_last)
images = torch.randn(512, *model.pretrained_cfg["input_size"], device=device)
images = images.contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    for _ in range(12):  # running statistics with which neurons fire
        model.train()(images[:128])
model.eval()

def capture(step):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph

def inference(network, batch):
    given = images[:batch].clone(memory_format=torch.channels_last)
    kept.append(given)
    def step():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            network(given)
    return capture(step)

kept, graphs = [], {}
for name, make in (("8 bits", timm_gac.quantize), ("folded", timm_gac.fuse_for_inference)):
    network = make(copy.deepcopy(model))
    for batch in (16, 512):
        graphs[f"{name}, batch {batch}"] = inference(network, batch)
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
given, labels = images[:128].clone(memory_format=torch.channels_last), torch.randint(100, (128,), device=device)
def train():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(given).float(), labels)
    loss.backward()
    optimizer.step()
graphs["training, batch 128"] = capture(train)
print(json.dumps({"tree": timm_gac.__file__, "cases": list(graphs)}), flush=True)
for line in sys.stdin:
    case, seconds = json.loads(line)
    graph, count = graphs[case], 3
    while True:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        if took >= seconds:
            break
        count = max(2 * count, int(1.1 * count * seconds / took))
    print(took / count * 1e3, flush=True)
"""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit or a folder")
    parser.add_argument("new", help="a commit or a folder")
    parser.add_argument("--model", default="gac_msresnet18_cifar")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of a turn, at least (default: 0.4)")
    parser.add_argument("--limit", type=float, default=1.02, help="largest ratio of new to old (default: 1.02)")
    parser.add_argument("--json", type=Path, help="file for all times")
    return parser.parse_args(arguments)


def tree_of(version: str, folder: Path) -> Path:
    """The source tree of a commit, unpacked into a folder, or the folder that was given.

    Raises:
        ValueError: It is neither.
    """
    if (Path(version) / "timm_gac").is_dir():
        return Path(version).resolve()
    done = subprocess.run(["git", "archive", version, "timm_gac", "kernels"], capture_output=True)
    if done.returncode:
        raise ValueError(f"expected a commit or a folder with timm_gac in it, got {version!r}: name one of these")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Version:
    """A source tree's process."""

    def __init__(self, tree: Path, model: str) -> None:
        paths = [str(tree), str(tree / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipe: Any = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, model], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree
        )

    def read(self) -> Any:
        """Its next line, from JSON.

        Raises:
            RuntimeError: The process ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a version ended with status {self.process.wait()}: what it said stands above")
        return json.loads(line)

    def time(self, case: str, seconds: float) -> float:
        """Milliseconds of one replay."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([case, seconds]) + "\n")
        self.process.stdin.flush()
        return float(self.read())

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Time both, print the medians; 1 where the new version is slower than the limit allows."""
    args = options(arguments)
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        versions = {}
        for name in ("old", "new"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            versions[name] = Version(tree_of(getattr(args, name), folder), args.model)
            stack.callback(versions[name].end)
        ready = {name: version.read() for name, version in versions.items()}
        for name, said in ready.items():
            print(f"{name}: {said['tree']}", flush=True)
        for case in ready["new"]["cases"]:
            times[case] = {name: [] for name in versions}
            for _ in range(args.rounds):
                for name, version in versions.items():
                    times[case][name].append(version.time(case, args.seconds))
            old, new = (statistics.median(times[case][name]) for name in ("old", "new"))
            print(f"{case}: {new:.4f} ms, before {old:.4f} ms, ratio {new / old:.4f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(times, indent=1))
    ratios = [statistics.median(pair["new"]) / statistics.median(pair["old"]) for pair in times.values()]
    return int(max(ratios) > args.limit)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"compare_commits: {error}")
