"""Search launch parameters of the Hopper kernel of `spike_conv` for the layers of a network.

    python kernels/benchmarks/tune_spike_conv.py gac_msresnet18_cifar --batch 512 --update

Every candidate must give the bits of the plain Triton kernel before it is timed. Candidates are compiled by --jobs
processes first, since compiling takes seconds and timing milliseconds. --update writes the best into the JSON file of
this GPU that `gac_kernels.tuning` reads; without it they are only printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench

import timm_gac
from gac_kernels import spike_conv, spike_conv_gluon, tuning
from gac_kernels.spike_conv_backend import Shape
from timm_gac.models.integer import SpikeConv

OP = "spike_conv_hopper"
COMPILE_BATCH = 16  # divisible by 16, as the batches that matter are: Triton compiles the same program for both


class Layer(NamedTuple):
    """One spike convolution of a network.

    Attributes:
        channels: C.
        out_channels: C'.
        height: Rows of its input.
        width: Columns of its input.
        stride: 1 or 2.
        residual: Whether there is one, in bfloat16.
        membrane: Whether the membrane is kept.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    stride: int
    residual: bool
    membrane: bool


def layers_of(model: str, image_size: int) -> list[Layer]:
    """The different spike convolutions of a registered model, in the order of their first call."""
    network = timm_gac.quantize(timm.create_model(model, num_steps=1).eval())
    found: dict[Layer, None] = {}

    def note(module: SpikeConv, inputs: tuple[Tensor, ...], _: object) -> None:
        _, channels, height, width = inputs[0].shape
        residual = len(inputs) > 1 and inputs[1] is not None
        found[Layer(channels, len(module.weight), height, width, module.stride, residual, module.keep_membrane)] = None

    for module in network.modules():
        if isinstance(module, SpikeConv):
            module.register_forward_hook(note)
    network(torch.zeros(1, 3, image_size, image_size))
    return list(found)


def candidates() -> Iterator[dict[str, int]]:
    """Launch parameters to try."""
    for warps, ring, steps in itertools.product((4, 8), (2, 3, 4, 5, 6), (1, 2)):
        yield {"BLOCK_M": 16 * warps, "BLOCK_N": 128, "RING": ring, "STEPS": steps, "num_warps": warps}


class Call:
    """A layer with random operands of a batch."""

    def __init__(self, layer: Layer, batch: int, num_steps: int) -> None:
        self.layer, self.num_steps, layout = layer, num_steps, torch.channels_last
        make = torch.Generator("cuda").manual_seed(0)
        shape = (num_steps * batch, layer.channels, layer.height, layer.width)
        spikes = torch.empty(shape, device="cuda", dtype=torch.int8, memory_format=layout).random_(0, 5, generator=make)
        self.spikes = spikes.eq_(0)
        weight = torch.randint(-127, 128, (layer.out_channels, layer.channels, 3, 3), device="cuda", generator=make)
        self.weight = weight.to(torch.int8).contiguous(memory_format=layout)
        self.scale = torch.full((layer.out_channels,), 1 / (40 * layer.channels**0.5), device="cuda")
        self.bias = torch.randn(layer.out_channels, device="cuda", generator=make) * 0.1
        size = (shape[0], layer.out_channels, -(-layer.height // layer.stride), -(-layer.width // layer.stride))
        self.residual = None
        if layer.residual:
            residual = torch.empty(size, device="cuda", dtype=torch.bfloat16, memory_format=layout)
            self.residual = residual.normal_(generator=make)
        self.out = torch.empty(size, device="cuda", dtype=torch.int8)
        kept = self.residual if self.residual is not None else self.out.float()
        self.membrane = kept if layer.membrane else kept[:0]
        self.shape = Shape(layer.channels, layer.out_channels, size[2], size[3], layer.stride, layer.residual)

    def __call__(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run it with the launch parameters of the moment."""
        return spike_conv(
            self.spikes, self.weight, self.scale, self.bias, self.num_steps, stride=self.layer.stride,
            residual=self.residual, return_membrane=self.layer.membrane,
        )  # fmt: skip

    def plain(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run the plain Triton kernel."""
        with mock.patch.object(spike_conv_gluon, "plan", lambda *_: "the plain kernel is asked for"):
            return self()

    def fits(self, config: dict[str, int]) -> bool:
        """Whether the parameters are used as they are."""
        made = spike_conv_gluon.plan(
            self.spikes, self.out, self.residual, self.membrane, self.num_steps, self.layer.stride, config
        )
        if isinstance(made, str):
            raise SystemExit(f"expected a layer for the Hopper kernel, got {self.layer}: {made}")
        return (made.num_warps, made.ring, made.steps) == (config["num_warps"], config["RING"], config["STEPS"])

    def operations(self) -> int:
        """Additions and multiplications of the convolution."""
        pixels = len(self.spikes) * self.shape.height * self.shape.width
        return 2 * 9 * self.shape.channels * self.shape.out_channels * pixels


def use(config: dict[str, int]) -> None:
    """Make every later launch use these parameters."""
    tuning.DEFAULTS[OP] = config
    tuning.shape_config.cache_clear()


def same(got: Tensor | tuple[Tensor, Tensor], expected: Tensor | tuple[Tensor, Tensor]) -> bool:
    """Whether all bits agree."""
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    return all(torch.equal(a, b) for a, b in pairs)


def compile_share(layers: list[Layer], num_steps: int, share: int, jobs: int) -> None:
    """Compile every ``jobs``-th candidate of every layer, from number ``share``."""
    work = [(layer, config) for layer in layers for config in candidates()]
    for layer, config in work[share::jobs]:
        call = Call(layer, COMPILE_BATCH, num_steps)
        use(config)
        if call.fits(config):
            call()
    torch.cuda.synchronize()


def search(call: Call) -> tuple[dict[str, int], dict[str, float], float]:
    """Best parameters of a layer, milliseconds of every candidate, and those of the plain kernel."""
    expected = call.plain()
    times = {}
    for config in candidates():
        use(config)
        if not call.fits(config):
            continue
        if not same(call(), expected):
            raise SystemExit(f"expected the plain kernel's bits for {call.layer}, got others with {config}")
        times[json.dumps(config)] = do_bench(call, warmup=3, rep=12, return_mode="median")
    best = json.loads(min(times, key=times.__getitem__))
    return best, times, do_bench(call.plain, warmup=3, rep=12, return_mode="median")


def main() -> None:
    """Search all layers, print a table and the JSON, and update the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registered model")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=512, help="images")
    parser.add_argument("--num-steps", type=int, default=4, help="T")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--update", action="store_true", help="write the best into this GPU's JSON file")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    layers = layers_of(args.model, args.image_size)
    tuning._device_configs = lambda _: {}  # the search starts from the defaults, not from an earlier result
    if args.share is not None:
        compile_share(layers, args.num_steps, args.share, args.jobs)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    if any([process.wait() for process in [subprocess.Popen([*command, f"--share={i}"]) for i in range(args.jobs)]]):
        raise SystemExit("expected all candidates to compile, got the error above")
    console, found = Console(), {}
    table = Table("layer", "best", "ms", "TOP/s", "plain ms", title=f"{args.model}, T={args.num_steps}, {args.batch}")
    for layer in layers:
        call = Call(layer, args.batch, args.num_steps)
        best, times, plain = search(call)
        found[call.shape.keys()[-1]] = best
        least = min(times.values())
        described = " ".join(f"{name}={value}" for name, value in best.items())
        table.add_row(
            str(tuple(layer)), described, f"{least:.3f}", f"{call.operations() / least / 1e9:,.0f}", f"{plain:.3f}"
        )
        print(
            layer,
            {name: round(value, 4) for name, value in sorted(times.items(), key=lambda item: item[1])},
            flush=True,
        )
    console.print(table)
    print(json.dumps({OP: found}, indent=2, sort_keys=True))
    if args.update:
        name = torch.cuda.get_device_name().replace(" ", "_")
        path = Path(tuning.__file__).parent / "configs" / f"{name}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        stored[OP] = stored.get(OP, {}) | found
        path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
