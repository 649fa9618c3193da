"""Search launch parameters of the Hopper kernels of `spike_conv` and `conv_lif` for the layers of a network.

    python -m timm_gac.bench.tune.convolutions gac_msresnet18_cifar --dtype int8 --batch 512 --update

Before a candidate is timed it must give what the other way gives: in int8 the bits of the plain Triton kernel, with a
shortcut and in 16 bits nearly all spikes of cuDNN's convolutions with the neuron, which it has to beat in 16 bits.
Candidates are compiled by --jobs processes first, since compiling takes seconds and timing milliseconds; they are timed
in CUDA graphs, since launching takes as long as a small layer. --update writes the best into the JSON file of this GPU
that `gac_kernels.tuning` reads; without it they are only printed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.testing import do_bench_cudagraph

from gac_kernels import conv_lif, spike_conv
from gac_kernels.convolution.dispatch import Shape
from gac_kernels.convolution.hopper import launch as hopper

from ...inference.integer import IntegerBlock, SpikeConv
from ...inference.quantize import quantize
from ...inference.record import forward_hooks
from .shared import compile_in_processes, say, start_from_defaults, update, use

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = {"int8": "spike_conv_hopper", "bfloat16": "conv_lif_hopper", "float16": "conv_lif_hopper"}
DIFFER = 3e-2  # share of spikes that 16-bit rounding of the convolution's output may turn over
GAIN = 0.98  # of the time of two passes, above which one pass is not worth its compilation
GRID = 2.0**-15  # to which residuals of int8 layers are rounded, as behind encoder and 1x1 shortcuts
COMPILE_BATCH = 128  # fills the GPU and is divisible by 16, as --batch: Triton compiles the same program for both


@dataclass(frozen=True)
class ConvolutionSearch:
    """Whose layers are searched, and at which size.

    Args:
        model: Registered model.
        image_size: Pixels a side.
        dtype: Of spikes and weights.
        batch: Images.
        num_steps: T.
        jobs: Processes that compile.
        update: Write the best into this GPU's JSON file.
        share: Compile one of ``jobs`` shares of the candidates and end; the search starts such processes itself.
    """

    model: tyro.conf.Positional[str]
    image_size: int = 32
    dtype: Literal["int8", "bfloat16", "float16"] = "int8"
    batch: int = 512
    num_steps: int = 4
    jobs: int = 8
    update: bool = False
    share: int | None = None


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
    network = quantize(timm.create_model(model, num_steps=1).eval())
    found: dict[Layer, None] = {}

    def note(name: str, module: SpikeConv, inputs: tuple[Tensor, ...], _output: Any) -> None:
        side = sides[name]
        _, channels, height, width = inputs[0].shape
        layer = Layer(
            channels, len(module.weight), height, width, module.stride, len(inputs) > 1, module.keep_membrane,
            *((0, 1) if side is None else (side.in_channels, side.stride[0])),
        )  # fmt: skip
        found[layer] = None

    layers: dict[str, nn.Module] = {}
    sides: dict[str, nn.Conv2d | None] = {}  # 1x1 shortcuts that layers take along
    for name, block in network.named_modules():
        if isinstance(block, IntegerBlock):
            for part, side in (("conv1", None), ("conv2", block.downsample)):
                if isinstance(getattr(block, part), SpikeConv):
                    layers[f"{name}.{part}"], sides[f"{name}.{part}"] = getattr(block, part), side
    with forward_hooks(layers, note):
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
        source: tuple[int, ...] = size
        if layer.side_channels:
            side = (layer.out_channels, layer.side_channels, 1, 1)
            self.shortcut = torch.randn(side, device="cuda", generator=make).div_(layer.side_channels**0.5).to(real)
            source = (size[0], layer.side_channels, *(n * layer.side_stride for n in size[2:]))
        if layer.residual:
            residual = torch.empty(source, device="cuda", dtype=real, memory_format=layout)
            self.residual = residual.normal_(generator=make)
        self.membrane = torch.empty_like(self.out if layer.membrane else self.out[:0], dtype=real)
        self.shape = Shape(
            channels=layer.channels,
            out_channels=layer.out_channels,
            height=size[2],
            width=size[3],
            stride=layer.stride,
            residual=layer.residual,
            shortcut=self.shortcut is not None,
        )

    def __call__(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run it with the launch parameters of the moment."""
        rest: dict[str, Any] = {"stride": self.layer.stride, "return_membrane": self.layer.membrane}
        rest |= {"residual": self.residual, "shortcut": self.shortcut}
        if self.dtype == torch.int8:
            return spike_conv(self.spikes, self.weight, self.scale, self.bias, self.num_steps, grid=GRID, **rest)
        return conv_lif(self.spikes, self.weight, self.bias, self.num_steps, **rest)

    def other(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run the other way: plain Triton, or two passes."""
        with mock.patch.object(hopper, "plan", lambda *_: "the other way is asked for"):
            return self()

    def agrees(self, got: Tensor | tuple[Tensor, Tensor], expected: Tensor | tuple[Tensor, Tensor]) -> bool:
        """Whether the outputs are the same, to the bit or nearly."""
        mine, theirs = (value if isinstance(value, tuple) else (value,) for value in (got, expected))
        if self.dtype == torch.int8 and self.shortcut is None:
            return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        return torch.ne(mine[-1], theirs[-1]).float().mean().item() <= DIFFER

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


def search_all(options: ConvolutionSearch, layers: list[Layer]) -> dict[str, dict[str, int]]:
    """Search all layers, print a table, and return the best parameters by the layers' keys."""
    found, op, dtype = {}, OPS[options.dtype], DTYPES[options.dtype]
    title = f"{options.model}, T={options.num_steps}, batch {options.batch}, {options.dtype}"
    table = Table("layer", "best", "ms", "TOP/s", "other way, ms", title=title)
    for layer in layers:
        call = Call(layer, options.batch, options.num_steps, dtype)
        best, times, other = search(call, op)
        found[call.shape.keys()[-1]] = best
        least = min(times.values())
        described = " ".join(f"{name}={value}" for name, value in best.items())
        rate = call.operations() / least / 1e9
        table.add_row(str(tuple(layer)), described, f"{least:.3f}", f"{rate:,.0f}", f"{other:.3f}")
        say(f"{layer} { {name: round(value, 4) for name, value in sorted(times.items(), key=lambda item: item[1])} }")
    Console(width=160).print(table)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Search all layers, print a table and the JSON, and update the file where asked."""
    options = tyro.cli(ConvolutionSearch, args=arguments, description=__doc__)
    layers = layers_of(options.model, options.image_size)
    start_from_defaults()
    if options.share is not None:
        compile_share(layers, options.num_steps, options.dtype, options.share, options.jobs)
        return
    compile_in_processes("timm_gac.bench.tune.convolutions", options.jobs)
    torch.backends.cudnn.benchmark = True
    found = {OPS[options.dtype]: search_all(options, layers)}
    say(json.dumps(found, indent=2, sort_keys=True))
    if options.update:
        say(f"written to {update(found)}")


if __name__ == "__main__":
    main()
