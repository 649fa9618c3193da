"""As `launch_child`, the launches of training in 8 bits, some of which read tensors by descriptors."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gac_kernels import CIFAR
from gac_kernels.common import launch as launch_module
from gac_kernels.eight_bit import convolution, hopper, norm
from gac_kernels.eight_bit.weight_gradient import weight_gradient
from gac_kernels.eight_bit.weights import EightBitWeight, round_weight
from launch_child import pretend, seen

T, B, C, SIZE = 4, 4, 64, 8
CL = torch.channels_last


class SameMemory:
    """Allocations that give, in each run, what they gave in the first one."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.given: Iterator[int] = iter(())
        for name in ("empty", "empty_like"):
            setattr(torch, name, functools.partial(self.allocate, getattr(torch, name)))

    def allocate(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The next tensor of a run."""
        nth = next(self.given)
        if nth == len(self.made):
            self.made.append(function(*args, **kwargs))
        return self.made[nth]

    def run(self, function: Callable[[], Any]) -> list[tuple[str, list[Any], bool]]:
        """What reached the GPU."""
        self.given = itertools.count()
        return seen(function)


def frames(dtype: torch.dtype) -> Tensor:
    return torch.zeros(T * B, C, SIZE, SIZE, dtype=dtype).contiguous(memory_format=CL)


def inputs() -> dict[str, Tensor]:
    """Of all kernels, at new addresses."""
    words = torch.zeros(SIZE, SIZE, C, B, dtype=torch.int32)
    return {
        "weight": torch.zeros(C, C, 3, 3).contiguous(memory_format=CL),
        "integers": torch.zeros(C, 3, 3, C, dtype=torch.int8),
        "turned_weight": torch.zeros(C, 3, 3, C, dtype=torch.float8_e4m3fn),
        "spikes": frames(torch.int8),
        "turned": words,
        "turned_gradient": words.clone(),
        "x": frames(torch.bfloat16),
        "residual": frames(torch.bfloat16),
        "gradient": frames(torch.float8_e4m3fn),
        **{name: torch.zeros(C) for name in ("scale", "mean", "var", "gamma", "beta")},
        "affine": torch.zeros(2, C),
        "partial": torch.zeros(5, 3, C),
        "divisor": torch.zeros(1),
    }


def cases(of: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Launches of each kernel with these inputs."""
    weight = EightBitWeight(of["integers"], of["turned_weight"], of["scale"])
    own = norm.Norm(of["gamma"], of["beta"], of["mean"], of["var"], 1e-5, of["affine"])
    x, residual, neuron = of["x"], of["residual"], CIFAR.op_arguments
    plain = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}  # no COPIES: plain Triton
    return {
        "weights": lambda: round_weight(of["weight"]),
        "statistics": lambda: convolution.finish_statistics(
            of["partial"], of["mean"], of["var"], 0.1, None, (of["gamma"], of["beta"], 1e-5)
        ),
        "forward in plain Triton": lambda: convolution.forward(
            of["spikes"], weight, 1, torch.bfloat16, T, config=plain
        ),
        "forward in Gluon": lambda: convolution.forward(of["spikes"], weight, 1, torch.bfloat16, T),
        "forward in Gluon, stride 2": lambda: convolution.forward(of["spikes"], weight, 2, torch.bfloat16, T),
        "input gradient in Gluon": lambda: convolution.input_gradient(
            of["gradient"], weight, of["divisor"], (SIZE, SIZE), 1, torch.bfloat16, T
        ),
        "input gradient, stride 2": lambda: convolution.input_gradient(
            of["gradient"], weight, of["divisor"], (2 * SIZE, 2 * SIZE), 2, torch.bfloat16, T, plain
        ),
        "weight gradient": lambda: weight_gradient(
            of["turned_gradient"], of["turned"], of["scale"], of["divisor"], of["weight"], 1, plain
        ),
        "weight gradient by pairs": lambda: weight_gradient(
            of["turned_gradient"], of["turned"], of["scale"], of["divisor"], of["weight"], 1
        ),
        "bytes": lambda: norm.to_spikes(x, T),
        "norm": lambda: norm.norm_and_fire(x, residual, own, norm.NO_NORM, T, neuron, True, False),
        "norm and full spikes": lambda: norm.norm_and_fire(x, residual, own, own, T, neuron, False, True),
        "norm, backward": lambda: norm.backward(
            residual, None, x, None, None, own, norm.NO_NORM, of["scale"], T, neuron, False
        ),
        "norm with a residual, backward": lambda: norm.backward(
            residual, residual, x, residual, residual, own, own, of["scale"], T, neuron, True
        ),
    }


if __name__ == "__main__":
    pretend()
    hopper.wrong_device = lambda _: ""
    memory = SameMemory()
    here, elsewhere = cases(inputs()), cases(inputs())
    results = {}
    memory.run(here["forward in Gluon"])  # which some versions of Triton compile by their second plan only
    launch_module.forget_launches()
    for name in here:
        memory.made = []
        first, second, moved = (memory.run(case[name]) for case in (here, here, elsewhere))
        with launch_module.by_triton():
            moved_by_triton = memory.run(elsewhere[name])
        results[name] = {
            "kernels": [kernel for kernel, *_ in first],
            "same": [call[:2] for call in first] == [call[:2] for call in second],
            "same elsewhere": [call[:2] for call in moved] == [call[:2] for call in moved_by_triton],
            "moved": all(a[1] != b[1] for a, b in zip(second, moved, strict=True)),
            "by Triton": [[by for *_, by in run] for run in (first, second, moved, moved_by_triton)],
        }
    sys.stdout.write(json.dumps(results))
