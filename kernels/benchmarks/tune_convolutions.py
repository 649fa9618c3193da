"""Search launch parameters of the Hopper kernels of `spike_conv` and `conv_lif` for the layers of a network.

    python kernels/benchmarks/tune_convolutions.py gac_msresnet18_cifar --dtype int8 --batch 512 --update

Before a candidate is timed it must give what the other way gives: in int8 the bits of the plain Triton kernel, with a
shortcut and in 16 bits nearly all spikes of cuDNN's convolutions with the neuron, which it has to beat in 16 bits.
Candidates are compiled by --jobs processes first, since compiling takes seconds and timing milliseconds; they are timed
in CUDA graphs, since launching takes as long as a small layer. --update writes the best into the JSON file of this GPU
that `gac_kernels.tuning` reads; without it they are only printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.testing import do_bench_cudagraph
from tuned import compile_in_processes, start_from_defaults, update, use

import timm_gac
from gac_kernels import conv_lif, spike_conv
from gac_kernels.convolution.dispatch import Shape
from gac_kernels.convolution.hopper import launch as hopper
from timm_gac.models.integer import IntegerBlock, SpikeConv

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = {"int8": "spike_conv_hopper", "bfloat16": "conv_lif_hopper", "float16": "conv_lif_hopper"}
DIFFER = 3e-2  # share of spikes that 16-bit rounding of the convolution's output may turn over
GAIN = 0.98  # of the time of two passes, above which one pass is not worth its compilation
GRID = 2.0**-15  # to which residuals of int8 layers are rounded, as behind encoder and 1x1 shortcuts
COMPILE_BATCH = 128  # fills the GPU and is divisible by 16, as --batch: Triton compiles the same program for both


class Layer(NamedTuple):
    """One spike convolution of a network.

    Attributes:
        channels: C.
        out_channels: C'.
        height: Rows of its input.
        width: Columns of its input.
        stride: 1 or 2.
        residual: Whether there is one; in bfloat16 with int8 spikes, else in their dtype.
        membrane: Whether the membrane is kept.
        side_channels: Input channels of the shortcut that the kernel takes along, 0 without.
        side_stride: Its stride.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    stride: int
    residual: bool
    membrane: bool
    side_channels: int = 0
    side_stride: int = 1


def layers_of(model: str, image_size: int) -> list[Layer]:
    """The different spike convolutions of a registered model, in the order of their first call."""
    network = timm_gac.quantize(timm.create_model(model, num_steps=1).eval())
    found: dict[Layer, None] = {}

    def note(module: SpikeConv, inputs: tuple[Tensor, ...], side: nn.Conv2d | None) -> None:
        _, channels, height, width = inputs[0].shape
        layer = Layer(
            channels, len(module.weight), height, width, module.stride, len(inputs) > 1, module.keep_membrane,
            *((0, 1) if side is None else (side.in_channels, side.stride[0])),
        )  # fmt: skip
        found[layer] = None

    for block in network.modules():
        if isinstance(block, IntegerBlock):
            for module, side in ((block.conv1, None), (block.conv2, block.downsample)):
                if isinstance(module, SpikeConv):
                    module.register_forward_hook(lambda module, inputs, _, side=side: note(module, inputs, side))
    network(torch.zeros(1, 3, image_size, image_size))
    return list(found)


def candidates() -> Iterator[dict[str, int]]:
    """Launch parameters to try."""
    for copies, steps in itertools.product((2, 3, 4), (1, 2)):
        yield {"COPIES": copies, "STEPS": steps, "ONE_PASS": 1}


class Call:
    """A layer with random operands of a batch."""

    def __init__(self, layer: Layer, batch: int, num_steps: int, dtype: torch.dtype) -> None:
        self.layer, self.num_steps, self.dtype, layout = layer, num_steps, dtype, torch.channels_last
        make = torch.Generator("cuda").manual_seed(0)
        shape = (num_steps * batch, layer.channels, layer.height, layer.width)
        spikes = torch.empty(shape, device="cuda", dtype=torch.int8, memory_format=layout).random_(0, 5, generator=make)
        self.spikes = spikes.eq_(0).to(dtype)
        weight = torch.randint(-127, 128, (layer.out_channels, layer.channels, 3, 3), device="cuda", generator=make)
        unit = 1 / (40 * layer.channels**0.5)
        weight = weight if dtype == torch.int8 else weight * unit
        self.weight = weight.to(dtype).contiguous(memory_format=layout)
        self.scale = torch.full((layer.out_channels,), unit, device="cuda")
        self.bias = torch.randn(layer.out_channels, device="cuda", generator=make) * 0.1
        size = (shape[0], layer.out_channels, -(-layer.height // layer.stride), -(-layer.width // layer.stride))
        self.out = torch.empty(size, device="cuda", dtype=dtype, memory_format=layout)
        real = torch.bfloat16 if dtype == torch.int8 else dtype
        self.residual = self.shortcut = None
        source = size
        if layer.side_channels:
            side = (layer.out_channels, layer.side_channels, 1, 1)
            self.shortcut = torch.randn(side, device="cuda", generator=make).div_(layer.side_channels**0.5).to(real)
            source = (size[0], layer.side_channels, *(n * layer.side_stride for n in size[2:]))
        if layer.residual:
            residual = torch.empty(source, device="cuda", dtype=real, memory_format=layout)
            self.residual = residual.normal_(generator=make)
        self.membrane = torch.empty_like(self.out if layer.membrane else self.out[:0], dtype=real)
        self.shape = Shape(
            layer.channels,
            layer.out_channels,
            size[2],
            size[3],
            layer.stride,
            layer.residual,
            self.shortcut is not None,
        )

    def __call__(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run it with the launch parameters of the moment."""
        rest = {"stride": self.layer.stride, "residual": self.residual, "return_membrane": self.layer.membrane}
        rest["shortcut"] = self.shortcut
        if self.dtype == torch.int8:
            return spike_conv(self.spikes, self.weight, self.scale, self.bias, self.num_steps, grid=GRID, **rest)
        return conv_lif(self.spikes, self.weight, self.bias, self.num_steps, **rest)

    def other(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run the other way: plain Triton, or two passes."""
        with mock.patch.object(hopper, "plan", lambda *_: "the other way is asked for"):
            return self()

    def agrees(self, got: Tensor | tuple[Tensor, Tensor], expected: Tensor | tuple[Tensor, Tensor]) -> bool:
        """Whether the outputs are the same, to the bit or nearly."""
        pairs = list(zip(got, expected, strict=True)) if isinstance(got, tuple) else [(got, expected)]
        if self.dtype == torch.int8 and self.shortcut is None:
            return all(torch.equal(a, b) for a, b in pairs)
        spikes, wanted = pairs[-1]
        return (spikes != wanted).float().mean().item() <= DIFFER

    def fits(self, config: dict[str, int]) -> bool:
        """Whether the parameters are used as they are."""
        made = hopper.plan(
            self.spikes,
            self.out,
            self.residual,
            self.shortcut,
            self.membrane,
            self.num_steps,
            self.layer.stride,
            config,
        )
        if isinstance(made, str):
            raise SystemExit(f"expected a layer for the Hopper kernel, got {self.layer}: {made}")
        copies = made.copies if made.shared else made.copies // 2
        return (copies, made.steps) == (config["COPIES"], config["STEPS"])

    def operations(self) -> int:
        """Additions and multiplications of the convolution."""
        pixels = len(self.spikes) * self.shape.height * self.shape.width
        return 2 * 9 * self.shape.channels * self.shape.out_channels * pixels


def compile_share(layers: list[Layer], num_steps: int, dtype: str, share: int, jobs: int) -> None:
    """Compile every ``jobs``-th candidate of every layer, from number ``share``."""
    work = [(layer, config) for layer in layers for config in candidates()]
    for layer, config in work[share::jobs]:
        call = Call(layer, COMPILE_BATCH, num_steps, DTYPES[dtype])
        use(OPS[dtype], config)
        if call.fits(config):
            call()
    torch.cuda.synchronize()


def search(call: Call, op: str) -> tuple[dict[str, int], dict[str, float], float]:
    """Best parameters of a layer, milliseconds of every candidate, and those of the other way."""
    expected = call.other()
    times = {}
    for config in candidates():
        use(op, config)
        if not call.fits(config):
            continue
        if not call.agrees(call(), expected):
            raise SystemExit(f"expected what the other way gives for {call.layer}, got something else with {config}")
        times[json.dumps(config)] = do_bench_cudagraph(call, rep=12, return_mode="median")
    if not times:
        raise SystemExit(f"expected a batch that fills the GPU with whole tiles of {call.layer}: give a larger --batch")
    best = json.loads(min(times, key=times.__getitem__))
    other = do_bench_cudagraph(call.other, rep=12, return_mode="median")
    if call.dtype == torch.int8:
        del best["ONE_PASS"]
    elif min(times.values()) > GAIN * other:
        best = {"ONE_PASS": 0}
    return best, times, other


def main() -> None:
    """Search all layers, print a table and the JSON, and update the file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registered model")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of spikes and weights")
    parser.add_argument("--batch", type=int, default=512, help="images")
    parser.add_argument("--num-steps", type=int, default=4, help="T")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--update", action="store_true", help="write the best into this GPU's JSON file")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    layers = layers_of(args.model, args.image_size)
    start_from_defaults()
    if args.share is not None:
        compile_share(layers, args.num_steps, args.dtype, args.share, args.jobs)
        return
    compile_in_processes(args.jobs)
    console, found, op = Console(width=160), {}, OPS[args.dtype]
    torch.backends.cudnn.benchmark = True
    title = f"{args.model}, T={args.num_steps}, batch {args.batch}, {args.dtype}"
    table = Table("layer", "best", "ms", "TOP/s", "other way, ms", title=title)
    for layer in layers:
        call = Call(layer, args.batch, args.num_steps, DTYPES[args.dtype])
        best, times, other = search(call, op)
        found[call.shape.keys()[-1]] = best
        least = min(times.values())
        described = " ".join(f"{name}={value}" for name, value in best.items())
        table.add_row(
            str(tuple(layer)), described, f"{least:.3f}", f"{call.operations() / least / 1e9:,.0f}", f"{other:.3f}"
        )
        print(
            layer,
            {name: round(value, 4) for name, value in sorted(times.items(), key=lambda item: item[1])},
            flush=True,
        )
    console.print(table)
    print(json.dumps({op: found}, indent=2, sort_keys=True))
    if args.update:
        print(f"written to {update({op: found})}")


if __name__ == "__main__":
    main()
