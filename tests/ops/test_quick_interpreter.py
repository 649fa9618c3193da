"""The interpreter as the tests run it computes what Triton's own does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gac_kernels.common.triton import INTERPRETED
from quick_interpreter import OLDEST
from warm import WarmPython

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
ROOT = Path(__file__).parents[2]

# Blocks of three axes and of none, masks, reductions, bits, 16-bit types, and a size that is no power of two.
PROGRAM = """
import torch
from triton.runtime import interpreter
from gac_kernels import CIFAR, firing_rate, gac_fire, lif, use_backend

found = []
with use_backend("triton"):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        current = torch.randn(3, 2, 3, 5, 7).mul(1.5).to(dtype).requires_grad_()
        spikes = lif(current, CIFAR)
        found += [spikes, *torch.autograd.grad(spikes, current, torch.randn_like(spikes))]
        leaves = [torch.randn(s).mul(1.5).to(dtype).requires_grad_() for s in ((2, 3, 5, 7), (2, 3, 5, 7), (2, 3))]
        gated, spikes = gac_fire(*leaves, CIFAR)
        found += [gated, spikes, *torch.autograd.grad(spikes, leaves, torch.randn_like(spikes))]
        found.append(firing_rate(spikes.detach().flatten(0, 1), 3))
quick = interpreter._get_np_dtype.__module__ == "quick_interpreter"
torch.save({"quick": quick, "found": [x.detach() for x in found]}, FILE)
"""


def test_kernels_compute_the_same_bits(warm_python: WarmPython, tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion=".".join(map(str, OLDEST)))
    files = [tmp_path / "quick", tmp_path / "plain"]
    exec(PROGRAM, {"FILE": files[0]})
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = warm_python(["-c", f"FILE = {str(files[1])!r}\n{PROGRAM}"], env=env)
    assert done.returncode == 0, done.stderr
    quick, plain = (torch.load(file, weights_only=True) for file in files)
    assert quick["quick"] and not plain["quick"]
    assert len(quick["found"]) == 16 and sum(x.count_nonzero() for x in quick["found"]) > 1000
    assert all(torch.equal(a, b) for a, b in zip(quick["found"], plain["found"], strict=True))
