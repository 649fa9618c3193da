"""Compile the Hopper kernels without a GPU and print which tensor core instructions each variant has.

It fails where the instructions that round the residual are not there.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gac_kernels.convolution.hopper import launch as hopper_conv
from gac_kernels.reference import grid_shift


class Hopper:
    """What Triton asks of a GPU before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _CompileOnly:
    """A kernel whose launch ends after compiling."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def compile_and_print(*args, **kwargs) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            ptx = compiled.asm["ptx"]
            found = sorted(set(re.findall(r"wgmma\.mma_async\S*\.(s8|bf16)\.(?:s8|bf16)", ptx)))
            # Adding 384 rounds to the grid, unless a compiler brings it together with what takes it away again.
            tile = math.prod(kwargs[name] for name in ("BH", "NB", "BW", "BN", "STEPS"))
            groups = 2 if kwargs.get("COPIES") else 1
            rounds = kwargs["RESIDUAL"] or kwargs.get("SHORTCUT_CHUNKS")
            elements = groups * tile // (32 * kwargs["num_warps"]) if rounds else 0
            additions = len(re.findall(r"add\S*\.f32\s.*0f43C00000", ptx))
            assert additions == elements, f"{additions} of {elements} additions that round"
            print(*(f"wgmma.{name}" for name in found))

        return compile_and_print


def compile_variant(
    stride: int, residual: bool, steps: int, copies: int = 0, shortcut: bool = False, shared: bool = False
) -> None:
    """Compile one variant."""

    def tensor(channels: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(8, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    out = tensor(128, 16 // stride, torch.int8)
    kept = tensor(128, 16 // stride, torch.bfloat16) if residual else torch.empty(0)
    weight = torch.zeros(128, 64, 3, 3, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    kernel = torch.zeros(128, 96, 1, 1, dtype=torch.bfloat16) if shortcut else None
    source = tensor(96, 32 // stride, torch.bfloat16) if shortcut else kept if residual else None
    plan = hopper_conv.Plan(
        tile=(8, 1, 8),
        block_n=128,
        block_k=64,
        ring=3,
        steps=steps,
        copies=copies,
        shared=shared,
    )
    hopper_conv.launch(
        plan=plan,
        spikes=tensor(64, 16, torch.int8),
        weight=weight,
        scale=torch.ones(128),
        bias=torch.zeros(128),
        residual=source,
        shortcut=kernel,
        num_steps=4,
        stride=stride,
        threshold=1.0,
        decay=0.5,
        soft_reset=False,
        shift=grid_shift(2.0**-15),
        out=out,
        membrane=kept,
    )


if __name__ == "__main__":
    driver.set_active(Hopper())
    hopper_conv.ring_kernel = _CompileOnly(hopper_conv.ring_kernel)
    hopper_conv.pair_kernel = _CompileOnly(hopper_conv.pair_kernel)
    hopper_conv.on_device = lambda _: contextlib.nullcontext()
    shared = "--rows-shared" in sys.argv
    compile_variant(stride=2, residual=True, steps=1)
    compile_variant(stride=1, residual=True, steps=2, copies=2, shared=shared)
    compile_variant(stride=2, residual=False, steps=1, copies=3, shared=shared)
    compile_variant(stride=1, residual=True, steps=1, copies=2, shortcut=True, shared=shared)
