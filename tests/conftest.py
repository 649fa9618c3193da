"""Shared set-up: the device under test, Triton's interpreter where there is no GPU, and no compiling ahead."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    # Before the first import of triton: it decides when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Networks are called as often as tests say; those of compiling ahead switch it on.
os.environ.setdefault("TIMM_GAC_COMPILE_AHEAD", "0")
# Inductor believes the processor's flags; to try out each kind of vector unit it starts six compilers and Pythons.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest

from quick_interpreter import quicken
from warm import WarmPython

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
# Nothing that imports and the collection of tests make is garbage: looking for some is a fifth of an import of timm.
gc.disable()

# These compile C++ or start several processes, a minute of two cores together: TIMM_GAC_LONG_TESTS=1 runs them too.
LONG = (
    "test_a_c_plus_plus_program_runs_a_compiled_package",
    "test_compilers_for_a_gpu_find_the_triton_kernels",
    "test_timm_script_gets_our_network_and_data",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out long tests where they are not asked for."""
    if os.environ.get("TIMM_GAC_LONG_TESTS") != "1":
        for item in items:
            if item.name.partition("[")[0] in LONG:
                item.add_marker(pytest.mark.skip(reason="long: TIMM_GAC_LONG_TESTS=1 runs it"))


def pytest_collection_finish() -> None:
    """Have no collection of garbage look through PyTorch's modules and all tests again, which takes half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """``warm_python(arguments)`` runs a Python program without importing PyTorch and timm anew."""
    with WarmPython() as python:
        yield python


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialised memory is filled with NaN (or the largest integer), so an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the ops in turn."""
    from gac_kernels import use_backend

    with use_backend(request.param):
        yield request.param
