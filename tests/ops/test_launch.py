"""Launches past Triton's own reach the GPU as Triton's do; on a pretended GPU, whose launches do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gac_kernels.common import launch
from gac_kernels.common.triton import HAS_TRITON
from gac_kernels.eight_bit import hopper

STATISTICS = ["_batch_stats_kernel", "_finish_stats_kernel"]
BACKWARD = ["reduce_kernel", "finish_kernel", "apply_kernel"]
KERNELS = {"statistics": STATISTICS, "forward": ["forward_kernel"], "backward": BACKWARD}


EIGHT_BIT = {
    "weights": ["_scale_kernel", "_round_kernel"],
    "statistics": ["finish_statistics_kernel"],
    "forward in plain Triton": ["conv_kernel"],
    "forward in Gluon": ["sums_kernel"],
    "forward in Gluon, stride 2": ["sums_kernel"],
    "input gradient in Gluon": ["sums_kernel"],
    "input gradient, stride 2": ["transposed_kernel"],
    "weight gradient": ["weight_gradient_kernel", "_finish_kernel"],
    "weight gradient by pairs": ["weight_gradient_pairs_kernel", "_finish_kernel"],
    "bytes": ["bytes_kernel"],
    "norm": ["forward_kernel"],
    "norm and full spikes": ["forward_kernel"],
    "norm, backward": BACKWARD,
    "norm with a residual, backward": BACKWARD,
}


def run_child(name, cache):
    """What a child saw, by case."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    child = Path(__file__).with_name(name)
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_child("launch_child.py", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def of_eight_bits(tmp_path_factory):
    if hopper.GLUON_ERROR:
        pytest.skip("this Triton has no Gluon")
    return run_child("launch_eight_bit_child.py", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("case", ["statistics", "forward plain", "forward normed", "backward plain", "backward normed"])
def test_the_second_launch_is_that_of_triton_without_triton(results, case):
    found, kernels = results[case], KERNELS[case.split()[0]]
    assert found["kernels"] == kernels and all(found["same"])
    assert found["by Triton"] == [[True] * len(kernels), [False] * len(kernels)]


@pytest.mark.parametrize(
    ("case", "by_triton"),
    [
        ("another dtype", [True, False]),
        ("unaligned", [True, True]),
        ("aligned again", [False, False]),
        ("watched", [True, True]),
        ("unwatched", [False, False]),
        ("another device is current", [True, True]),
    ],
)
def test_triton_launches_what_it_has_not_compiled_for_and_what_somebody_watches(results, case, by_triton):
    found = results[case]
    assert found["kernels"] == STATISTICS and [run[0] for run in found["by Triton"]] == by_triton


@pytest.mark.parametrize("case", EIGHT_BIT)
def test_launches_in_8_bits_are_those_of_triton_without_triton(of_eight_bits, case):
    """With the same tensors as Triton's own first launch, and with others, which descriptors hold the addresses of."""
    found, kernels = of_eight_bits[case], EIGHT_BIT[case]
    assert found["kernels"] == kernels
    assert found["same"] and found["same elsewhere"] and found["moved"]
    triton, past_it = [True] * len(kernels), [False] * len(kernels)
    assert found["by Triton"] == [triton, past_it, past_it, triton]


@dataclass
class _Fields:
    base: torch.Tensor


class _Slots:
    __slots__ = ("base",)

    def __init__(self, base):
        self.base = base


def test_only_descriptors_that_are_nothing_but_fields_are_made_again():
    a, b = torch.zeros(4), torch.zeros(4)
    assert launch._can_be_made_again(_Fields(a))
    assert not launch._can_be_made_again(_Slots(a)) and not launch._can_be_made_again(a.data_ptr())
    made = launch._again(_Fields, vars(_Fields(a)), b)
    assert type(made) is _Fields and made.base is b
