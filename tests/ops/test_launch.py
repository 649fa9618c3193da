"""Launches past Triton's own reach the GPU as Triton's do; on a pretended GPU, whose launches do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gac_kernels.common.triton import HAS_TRITON

STATISTICS = ["_batch_stats_kernel", "_finish_stats_kernel"]
BACKWARD = ["reduce_kernel", "finish_kernel", "apply_kernel"]
KERNELS = {"statistics": STATISTICS, "forward": ["forward_kernel"], "backward": BACKWARD}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the child saw, by case."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    child = Path(__file__).with_name("launch_child.py")
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
