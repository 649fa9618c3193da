"""Search launch parameters of the Hopper kernels of `spike_conv` and `conv_lif` for the layers of a network.

    python -m timm_gac.bench.tune.convolutions gac_msresnet18_cifar --dtype int8 --batch 512 --update

Each candidate is first compared with the alternative: bit for bit with the plain Triton kernel in int8; in nearly all
spikes with cuDNN's convolution followed by the neuron kernel in 16 bits and with a shortcut. In 16 bits it is used only
where it is faster than that alternative. Candidates are compiled by --jobs processes first, since compiling takes
seconds and timing milliseconds. They are timed in CUDA graphs, since a launch takes as long as a small layer. --update
writes the best into this GPU's JSON file, which `gac_kernels.tuning` reads; without it they are only printed.
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
from .shared import compile_in_processes, report, say, start_from_defaults, use

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = {"int8": "spike_conv_hopper", "bfloat16": "conv_lif_hopper", "float16": "conv_lif_hopper"}
DIFFER = 3e-2  # largest share of spikes that may differ, as 16-bit convolutions round their output
GAIN = 0.98  # one pass is used only below this fraction of the time of two passes
GRID = 2.0**-15  # residuals of int8 layers are rounded to multiples of it, as after encoder and 1x1 shortcuts
COMPILE_BATCH = 128  # fills the GPU; divisible by 16 like --batch, so Triton compiles the same program for both


@dataclass(frozen=True)
class ConvolutionSearch:
    """Options of the search over the layers of a model.

    Args:
        model: Registered model.
        image_size: Height and width of the images.
        dtype: Dtype of spikes and weights.
        batch: Images.
        num_steps: Time steps T.
        jobs: Processes that compile.
        update: Write the best parameters into this GPU's JSON file.
        share: Only compile this share of the candidates, of ``jobs``; the search starts such processes itself.
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
        residual: Whether there is one: bfloat16 with int8 spikes, else in the spikes' dtype.
        membrane: Whether the membrane is returned.
        shortcut_channels: Input channels of the 1x1 shortcut that the kernel computes too, 0 without.
        shortcut_stride: Its stride.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    stride: int
    residual: bool
    membrane: bool
    shortcut_channels: int = 0
    shortcut_stride: int = 1


def layers_of(model: str, image_size: int) -> list[Layer]:
    """The different spike convolutions of a registered model, in the order of their first call."""
    network = quantize(timm.create_model(model, num_steps=1).eval())
    found: dict[Layer, None] = {}

    def note(name: str, module: SpikeConv, inputs: tuple[Tensor, ...], _output: Any) -> None:
        shortcut = shortcuts[name]
        _, channels, height, width = inputs[0].shape
        layer = Layer(
            channels=channels,
            out_channels=len(module.weight),
            height=height,
            width=width,
            stride=module.stride,
            residual=len(inputs) > 1,
            membrane=module.keep_membrane,
            shortcut_channels=0 if shortcut is None else shortcut.in_channels,
            shortcut_stride=1 if shortcut is None else shortcut.stride[0],
        )
        found[layer] = None

    layers: dict[str, nn.Module] = {}
    shortcuts: dict[str, nn.Conv2d | None] = {}  # 1x1 convolutions that the layers' kernels compute too
    for name, block in network.named_modules():
        if isinstance(block, IntegerBlock):
            for part, shortcut in (("conv1", None), ("conv2", block.downsample)):
                if isinstance(getattr(block, part), SpikeConv):
                    layers[f"{name}.{part}"], shortcuts[f"{name}.{part}"] = getattr(block, part), shortcut
    with forward_hooks(layers, note):
        network(torch.zeros(1, 3, image_size, image_size))
    return list(found)


def candidates() -> Iterator[dict[str, int]]:
    """Launch parameters to try."""
    for copies, steps in itertools.product((2, 3, 4), (1, 2)):
        yield {"COPIES": copies, "STEPS": steps, "ONE_PASS": 1}


class Call:
    """A layer with random operands."""

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
        if layer.shortcut_channels:
            weight_shape, scale = (layer.out_channels, layer.shortcut_channels, 1, 1), layer.shortcut_channels**0.5
            self.shortcut = torch.randn(weight_shape, device="cuda", generator=make).div_(scale).to(real)
            source = (size[0], layer.shortcut_channels, *(n * layer.shortcut_stride for n in size[2:]))
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
        """Run it with the current launch parameters."""
        operands: dict[str, Any] = {"weight": self.weight, "bias": self.bias, "num_steps": self.num_steps}
        operands |= {"stride": self.layer.stride, "return_membrane": self.layer.membrane}
        operands |= {"residual": self.residual, "shortcut": self.shortcut}
        if self.dtype == torch.int8:
            return spike_conv(self.spikes, scale=self.scale, grid=GRID, **operands)
        return conv_lif(self.spikes, **operands)

    def alternative(self) -> Tensor | tuple[Tensor, Tensor]:
        """Run it without the Hopper kernel: plain Triton in int8, two passes in 16 bits."""
        with mock.patch.object(hopper, "plan_call", lambda *_, **__: "the alternative is asked for"):
            return self()

    def agrees(self, got: Tensor | tuple[Tensor, Tensor], expected: Tensor | tuple[Tensor, Tensor]) -> bool:
        """Whether the outputs are equal: bit for bit in int8 without shortcut, else in nearly all spikes."""
        mine, theirs = (value if isinstance(value, tuple) else (value,) for value in (got, expected))
        if self.dtype == torch.int8 and self.shortcut is None:
            return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        return torch.ne(mine[-1], theirs[-1]).float().mean().item() <= DIFFER

    def fits(self, config: dict[str, int]) -> bool:
        """Whether the kernel uses these parameters unchanged."""
        plan = hopper.plan_call(
            spikes=self.spikes,
            out=self.out,
            residual=self.residual,
            shortcut=self.shortcut,
            membrane=self.membrane,
            num_steps=self.num_steps,
            stride=self.layer.stride,
            config=config,
        )
        if isinstance(plan, str):
            raise SystemExit(f"expected a layer for the Hopper kernel, got {self.layer}: {plan}")
        copies = plan.copies if plan.shared else plan.copies // 2
        return (copies, plan.steps) == (config["COPIES"], config["STEPS"])

    def operations(self) -> int:
        """Additions and multiplications of the convolution."""
        pixels = len(self.spikes) * self.shape.height * self.shape.width
        return 2 * 9 * self.shape.channels * self.shape.out_channels * pixels


def compile_share(options: ConvolutionSearch, layers: list[Layer], share: int) -> None:
    """Compile every ``jobs``-th candidate of every layer, from number ``share``."""
    work = [(layer, config) for layer in layers for config in candidates()]
    for layer, config in work[share :: options.jobs]:
        call = Call(layer, COMPILE_BATCH, options.num_steps, DTYPES[options.dtype])
        use(OPS[options.dtype], config)
        if call.fits(config):
            call()
    torch.cuda.synchronize()


def search(call: Call, op: str) -> tuple[dict[str, int], dict[str, float], float]:
    """Best parameters of a layer, milliseconds of every candidate, and milliseconds of the alternative."""
    expected = call.alternative()
    times = {}
    for config in candidates():
        use(op, config)
        if not call.fits(config):
            continue
        if not call.agrees(call(), expected):
            raise SystemExit(f"expected the alternative's output for {call.layer}, got another with {config}")
        times[json.dumps(config)] = do_bench_cudagraph(call, rep=12, return_mode="median")
    if not times:
        raise SystemExit(f"expected a batch that fills the GPU with whole tiles of {call.layer}: give a larger --batch")
    best = json.loads(min(times, key=times.__getitem__))
    alternative = do_bench_cudagraph(call.alternative, rep=12, return_mode="median")
    if call.dtype == torch.int8:
        del best["ONE_PASS"]
    elif min(times.values()) > GAIN * alternative:
        best = {"ONE_PASS": 0}
    return best, times, alternative


def search_all(options: ConvolutionSearch, layers: list[Layer]) -> dict[str, dict[str, int]]:
    """Search all layers, print a table, and return the best parameters by layer key."""
    found, op, dtype = {}, OPS[options.dtype], DTYPES[options.dtype]
    title = f"{options.model}, T={options.num_steps}, batch {options.batch}, {options.dtype}"
    table = Table("layer", "best", "ms", "TOP/s", "alternative, ms", title=title)
    for layer in layers:
        call = Call(layer, options.batch, options.num_steps, dtype)
        best, times, alternative = search(call, op)
        found[call.shape.keys()[-1]] = best
        least = min(times.values())
        described = " ".join(f"{name}={value}" for name, value in best.items())
        rate = call.operations() / least / 1e9
        table.add_row(str(tuple(layer)), described, f"{least:.3f}", f"{rate:,.0f}", f"{alternative:.3f}")
        say(f"{layer} { {name: round(value, 4) for name, value in sorted(times.items(), key=lambda item: item[1])} }")
    Console(width=160).print(table)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Search all layers, print a table and the JSON, and update the file where asked."""
    options = tyro.cli(ConvolutionSearch, args=arguments, description=__doc__)
    layers = layers_of(options.model, options.image_size)
    start_from_defaults()
    if options.share is not None:
        compile_share(options, layers, options.share)
        return
    compile_in_processes("timm_gac.bench.tune.convolutions", options.jobs)
    torch.backends.cudnn.benchmark = True
    found = {OPS[options.dtype]: search_all(options, layers)}
    report(found, options.update)


if __name__ == "__main__":
    main()
