"""Kernels that a function needs are compiled side by side before it; on a pretended GPU, whose launches do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gac_kernels import compile_ahead
from gac_kernels.common.triton import HAS_TRITON

POOL, RATE = ["_pool_frames_finish_kernel", "_pool_frames_kernel"], "_firing_rate_kernel"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the child did, by case."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    folder = tmp_path_factory.mktemp("cache")
    (folder / "a file").write_text("no folder")  # in which nobody can write, not even root
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "missing" / "cache")
    child = Path(__file__).with_name("compile_ahead_child.py")
    done = subprocess.run(
        [sys.executable, child, folder / "a file" / "cache"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_missing_kernels_are_compiled_and_loaded_on_threads_before_the_answer(results):
    case = results["several"]
    assert case["answer"] == "answer"
    assert case["launches before each call"] == [0, 0] and case["launched"] == case["loaded"] == 3
    assert case["compiled"] == sorted([RATE, *POOL]) and case["threads"] == ["gac-kernels"]
    assert not case["logged"]


def test_a_function_without_missing_kernels_is_called_once(results):
    case = results["again"]
    assert (case["launches before each call"], case["launched"], case["compiled"]) == ([0], 3, [])


def test_kernels_of_others_are_launched_as_ever(results):
    case = results["foreign"]
    assert (case["launches before each call"], case["launched"], case["compiled"]) == ([0], 1, ["foreign_kernel"])


def test_within_itself_it_is_one(results):
    case = results["nested"]
    assert (case["launches before each call"], case["launched"], case["compiled"]) == ([0, 0], 1, [RATE])


def test_a_kernel_that_does_not_compile_raises_its_error_when_it_is_launched(results):
    case = results["refused"]
    assert case["answer"] == "CompilationError" and case["launches before each call"] == [0, 0]


def test_kernels_that_take_a_function(results):
    case = results["function"]
    assert (case["launches before each call"], case["launched"], case["threads"]) == ([0, 0], 1, ["gac-kernels"])


def test_an_error_of_the_function_is_raised_while_kernels_wait_to_be_compiled(results):
    case = results["raises"]
    assert case["answer"] == "ArithmeticError" and case["launches before each call"] == [0]


def test_a_line_says_what_it_waits_for(results):
    assert results["slow"]["logged"] == ["compiling 1 kernel for a GPU, at the first call only"]


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(results):
    case = results["unwritable"]
    assert case["answer"] == "answer" and case["moved"] and case["compiled"] == [RATE]
    assert case["logged"][0].startswith("Triton's cache cannot be written")


def test_on_a_cpu_the_function_is_called_once():
    calls = []
    assert compile_ahead(lambda: calls.append(0) or "answer", "cpu") == "answer" and len(calls) == 1
