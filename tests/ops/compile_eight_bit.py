"""Compile the kernels that train in 8 bits for Hopper without a GPU and print what instructions they end in."""

from __future__ import annotations

import re
import sys

import torch
from triton.runtime import driver

from compile_for_hopper import Hopper
from gac_kernels import CIFAR
from gac_kernels.common import tiles
from gac_kernels.common.launch import forget_launches
from gac_kernels.convolution.hopper.plan import Plan
from gac_kernels.eight_bit import convolution, hopper, norm, transposed, weight_gradient, weights

CL = torch.channels_last


class _CompileOnly:
    """A kernel whose launch ends after compiling."""

    def __init__(self, kernel, label: str) -> None:
        self.kernel, self.label = kernel, label

    def __getitem__(self, grid):
        def compile_and_print(*args, **kwargs) -> None:
            ptx = self.kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]
            found = [
                f"wgmma.{name}" for name in ("s8", "e4m3") if re.search(rf"wgmma\.mma_async\S*\.{name}\.{name}", ptx)
            ]
            found += ["cvt.e4m3"] if "cvt.rn.satfinite.e4m3x2.f32" in ptx else []
            found += ["tma"] if "cp.async.bulk.tensor" in ptx else []
            assert "mma.sync" not in ptx, "products on a slower path"
            # The ptxas of CUDA 12.8 and 12.9 loses the second use of what is packed into a word.
            for pair in re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32\s+(%rs\d+)", ptx):
                packed = re.search(rf"mov\.b32\s+%r\d+, \{{[^}}]*{pair}\b", ptx)
                uses = len(re.findall(rf"{pair}\b", ptx)) - 1
                assert not packed or uses == 1, f"{pair} of {self.label} is read {uses} times"
            if found:
                print(f"{self.label}: {' '.join(found)}")

        return compile_and_print


def tensor(channels: int, size: int, dtype: torch.dtype, frames: int = 8) -> torch.Tensor:
    return torch.zeros(frames, channels, size, size, dtype=dtype).contiguous(memory_format=CL)


if __name__ == "__main__":
    driver.set_active(Hopper())
    tiles.multiprocessors = hopper.multiprocessors = weight_gradient.multiprocessors = lambda _: 132
    for module, name in (
        (weights, "_scale_kernel"),
        (weights, "_round_kernel"),
        (convolution, "finish_statistics_kernel"),
        (weight_gradient, "_finish_kernel"),
        (norm, "apply_kernel"),
        (norm, "reduce_kernel"),
        (norm, "finish_kernel"),
        (norm, "forward_kernel"),
        (norm, "bytes_kernel"),
    ):
        setattr(module, name, _CompileOnly(getattr(module, name), name))
    kernel, of_weight, gluon = convolution.conv_kernel, weight_gradient.weight_gradient_kernel, hopper.sums_kernel
    ones, grads = torch.ones(128), tensor(128, 8, torch.float8_e4m3fn)
    rounded = weights.round_weight(torch.zeros(128, 128, 3, 3))

    def multiply(label: str, x: torch.Tensor, size: int, stride: int) -> torch.Tensor | None:
        """A convolution in plain Triton, as the device is no Hopper GPU; returns its statistics."""
        convolution.conv_kernel = _CompileOnly(kernel, label)
        forget_launches()
        if x.dtype == torch.int8:
            return convolution.forward(x, rounded, stride, torch.bfloat16)[1]
        convolution.input_gradient(x, rounded, ones[:1], (size, size), stride, torch.bfloat16)
        return None

    partial = multiply("forward", tensor(128, 8, torch.int8), 8, 1)
    convolution.finish_statistics(partial, ones, ones, 0.1, None, (ones, ones, 1e-5))
    multiply("input_gradient", grads, 8, 1)
    transposed.transposed_kernel = _CompileOnly(transposed.transposed_kernel, "input_gradient, stride 2")
    multiply("input_gradient", grads, 16, 2)
    weight_gradient.weight_gradient_kernel = _CompileOnly(of_weight, "weight_gradient")
    turned = torch.zeros(8, 8, 128, 128, dtype=torch.int32)
    weight_gradient.weight_gradient(turned, turned, ones, ones[:1], torch.zeros(128, 128, 3, 3), 1)
    weight_gradient.weight_gradient_pairs_kernel = _CompileOnly(
        weight_gradient.weight_gradient_pairs_kernel, "weight_gradient, pairs"
    )
    few = torch.zeros(8, 8, 64, 128, dtype=torch.int32)
    weight_gradient.weight_gradient(few, few, ones[:64], ones[:1], torch.zeros(64, 64, 3, 3), 1)
    shared = "--rows-shared" in sys.argv  # which Triton 3.8 refuses
    plan = Plan(tile=(8, 1, 8), block_n=128, block_k=64, ring=3, steps=1, copies=2, shared=shared)
    out = tensor(128, 8, torch.bfloat16)
    for label, x, weight, stats in (
        ("hopper forward", tensor(128, 8, torch.int8), rounded.integers, True),
        ("hopper input_gradient", grads, rounded.turned, False),
    ):
        hopper.sums_kernel = _CompileOnly(gluon, label)
        work = hopper.Work(x.shape, out.shape, x.dtype, out.dtype, x.device, num_steps=4, stride=1, stats=stats)
        prepared = hopper.prepare_launch(plan, work, promote=not stats)
        sums = torch.zeros(prepared.parts, 3, 128) if stats else None
        scale, divisor = (ones, None) if stats else (None, ones[:1])
        prepared.launch(x, x, weight, out, scale, divisor, sums)
    # So many images that a program has all of its block, and threads store words.
    x, own = tensor(128, 2, torch.bfloat16, 128), norm.Norm(ones, ones, ones, ones, 1e-5, torch.ones(2, 128))
    norm.to_spikes(x, 4)
    norm.norm_and_fire(x, x, own, norm.NO_NORM, 4, CIFAR.op_arguments, True, False)
    norm.backward(x, x, x, None, x, own, norm.NO_NORM, ones, 4, CIFAR.op_arguments, True)
    norm.backward(x, None, x, None, None, own, norm.NO_NORM, ones, 4, CIFAR.op_arguments, False)
