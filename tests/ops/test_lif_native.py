"""The neuron in C: the bits of the blocks in PyTorch, on any number of threads; and what happens without a compiler."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif, lif_reference
from gac_kernels.neuron import blocks, native
from gac_kernels.neuron.lif import can_keep_mask, mask_dtype
from gac_kernels.spec import SURROGATES

# T, then neurons that lie side by side: less than a block of them and more; steps of each width of the mask, and more.
SHAPES = [(4, 2, 3, 16, 16), (3, 2500), (8, 1300), (16, 300), (20, 700), (130, 300)]
NUMBERS = dict(threshold=0.9, decay=0.37, width=0.8)


def needs_compiler():
    if not native._compiler():
        pytest.skip("needs a C compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The compiled functions, and a library that has them."""
    needs_compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        library = native._Library()
        library.build()
    assert library.functions is not None
    return library


@pytest.fixture
def small(monkeypatch):
    """Small tensors are computed in C too, in several parts."""
    monkeypatch.setattr(native, "_LEAST", 1)
    monkeypatch.setattr(native, "_PART", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def inputs(shape, state, last):
    x = torch.randn(shape) * 1.5
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, NUMBERS["threshold"], 0.1]
    x.view(-1)[: len(special)] = torch.tensor(special)
    first, at_last = (torch.randn(shape[1:]) if there else None for there in (state, last))
    return x, first, torch.randn(shape), at_last


def run(x, state, grad, at_last, surrogate, detach, soft):
    """All that both passes write, over memory that holds something else."""
    keep = can_keep_mask(len(x), surrogate, detach, soft)
    spikes, last = torch.full_like(x, 7.0), torch.full_like(x[0], 7.0)
    mask = torch.full((x[0].numel() if keep else 0,), 77, dtype=mask_dtype(len(x)) if keep else torch.uint8)
    nothing = x.new_empty(0)
    dynamics = (NUMBERS["threshold"], NUMBERS["decay"])
    blocks.lif_forward(x, state, spikes, last, mask, *dynamics, NUMBERS["width"], soft)
    in_place = x.clone()
    blocks.lif_forward(in_place, state, in_place, nothing, nothing, *dynamics, NUMBERS["width"], soft)
    grad_x, grad_in_place = torch.full_like(x, 7.0), x.clone()
    grad_state = nothing if state is None else torch.full_like(x[0], 7.0)
    numbers = (*dynamics, surrogate, NUMBERS["width"], detach, soft)
    blocks.lif_backward(grad, at_last, x, state, mask, grad_x, grad_state, *numbers)
    blocks.lif_backward(grad, at_last, grad_in_place, state, mask, grad_in_place, nothing, *numbers)
    return dict(
        spikes=spikes,
        last=last,
        mask=mask,
        in_place=in_place,
        grad_x=grad_x,
        grad_state=grad_state,
        grad_in_place=grad_in_place,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("surrogate", range(len(SURROGATES)), ids=SURROGATES)
def test_bits_of_the_blocks(shape, surrogate, compiled, small, monkeypatch):
    used = []
    monkeypatch.setattr(native, "_run", lambda *arguments, run=native._run: used.append(run(*arguments)))
    torch.manual_seed(0)
    expected = 0
    for detach, soft, state, last in itertools.product((True, False), repeat=4):
        case = (*inputs(shape, state, last), surrogate, detach, soft)
        wide = can_keep_mask(len(case[0]), surrogate, detach, soft) and shape[0] > 16  # eight bytes a neuron
        if shape[0] <= 128:
            expected += 2 - wide + 2 * (not wide and SURROGATES[surrogate] != "sigmoid")
        results, absent = [], native._Library()
        absent._asked = True  # neither takes one that an earlier process left on this machine, nor makes one
        for library in (compiled, absent):
            monkeypatch.setattr(native, "_library", library)
            results.append(run(*case))
        for name, one in results[0].items():
            other = results[1][name]
            assert one.dtype == other.dtype
            same = (one == other) | ((one != one) & (other != other))
            assert same.all(), (name, detach, soft, state, last)
    assert len(used) == expected


def test_time_that_lies_inside(compiled, small, monkeypatch):
    """Of (B, T, N) in memory: parts begin and end in the middle of a row."""
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 4, 1111).transpose(0, 1) for _ in range(2))
    state, at_last = torch.randn(3, 1111), torch.randn(3, 1111)
    results = []
    for library in (compiled, native._Library()):
        monkeypatch.setattr(native, "_library", library)
        results.append(run(x, state, grad, at_last, 1, True, False))
        assert results[-1]["spikes"].stride() == x.stride()
    assert all(torch.equal(one, results[1][name]) for name, one in results[0].items())


@pytest.mark.parametrize("spec", [CIFAR, IMAGENET, LIFSpec(reset="soft", surrogate="atan")], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_operator_against_its_definition(spec, layout, compiled, small, monkeypatch):
    monkeypatch.setattr(native, "_library", compiled)
    torch.manual_seed(0)
    x = torch.randn(4 * 3, 8, 10, 10).contiguous(memory_format=layout).unflatten(0, (4, 3))
    grad = torch.randn_like(x)
    answers = []
    for function in (lif, lif_reference):
        leaf = x.clone().requires_grad_()
        spikes = function(leaf, spec)
        spikes.backward(grad)
        answers.append((spikes.detach(), leaf.grad))
    assert torch.equal(answers[0][0], answers[1][0])
    # A step's gradient is a few float32 operations, in another order; gradients here are of the order of 1.
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["double", "int8 spikes", "few", "thin"])
def test_what_is_left_to_the_blocks(case, compiled, monkeypatch):
    monkeypatch.setattr(native, "_library", compiled)
    x = torch.zeros(
        (4, 2**14) if case != "few" else (4, 64), dtype=torch.float64 if case == "double" else torch.float32
    )
    spikes = torch.empty_like(x, dtype=torch.int8) if case == "int8 spikes" else torch.empty_like(x)
    if case == "thin":  # time lies inside: four neurons side by side
        x, spikes = (torch.zeros(2**12, 4, 4).transpose(0, 1) for _ in range(2))
    nothing = x.new_empty(0)
    assert not native.forward(x, None, spikes, nothing, nothing, 1.0, 0.5, 1.0, False)


def test_it_is_compiled_in_the_background_once_there_was_enough_work(monkeypatch, tmp_path):
    needs_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_WORTH", 3 * 2**16)
    built = []
    monkeypatch.setattr(native, "_compile", lambda: built.append(1) or tmp_path / "nothing")
    monkeypatch.setattr(native.threading.Thread, "start", lambda thread: thread.run())
    library = native._Library()
    asked = []
    for _ in range(5):
        library.get(2**16)
        asked.append(len(built))
    assert asked == [0, 0, 1, 1, 1]


def test_a_kept_library_is_loaded_at_once(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = native._kept()
    assert native._Library().get(1) is None
    place.parent.mkdir(parents=True)
    shutil.copy(compiled.functions._name, place)
    assert native._Library().get(1) is not None
    monkeypatch.setenv(native.SWITCH, "0")
    assert native._Library().get(1) is None


def test_without_a_compiler_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native, "_compiler", list)
    library = native._Library()
    with caplog.at_level(logging.INFO, "gac_kernels"):
        library.build()
    assert library.get(2**30) is None and "expected a C compiler" in caplog.text


def test_a_compiler_that_fails_is_asked_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "_command", lambda: (sys.executable, "-c", "raise SystemExit(3)"))
    monkeypatch.setattr(native, "_compiler", lambda: [sys.executable])
    library = native._Library()
    with caplog.at_level(logging.INFO, "gac_kernels"):
        library.build()
        library.get(2**30)
    assert len(caplog.records) == 1 and "exit status 3" in caplog.text


def test_a_place_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    needs_compiler()
    (tmp_path / "a file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    monkeypatch.setattr(native, "_command", lambda: (*native._compiler(), "-O0", "-shared", "-fPIC"))
    library = native._Library()
    library.build()
    made = Path(library.functions._name)
    assert made.exists() and made.parent == Path(os.environ.get("TMPDIR", "/tmp"))
    made.unlink()


def test_a_forked_child_has_threads_of_its_own(compiled, tmp_path):
    """The pool's threads stay with the parent; a child that waited for them would never end."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = """
import os, sys, torch
from gac_kernels.neuron import native
native._library.functions = native._load(native.Path(sys.argv[1]))
native._PART = 1000
torch.set_num_threads(3)
x = torch.ones(4, 2**14)
def run():
    spikes, nothing = torch.empty_like(x), torch.empty(0)
    assert native.forward(x, None, spikes, nothing, nothing, 0.5, 0.5, 1.0, False)
    return bool((spikes.numpy() == 1).all())  # PyTorch's own threads do not survive a fork
assert run()
child = os.fork()
if child == 0:
    os._exit(0 if run() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script, compiled.functions._name], timeout=120)
    assert done.returncode == 0
