"""The mark on outputs of inputs that are not finite: which rows get NaN, and that the others keep their bits."""

from __future__ import annotations

import pytest
import torch

from gac_kernels import CIFAR, spike_conv
from gac_kernels.spikes.not_finite import _fits, mark_not_finite_

BAD = float("nan"), float("inf"), -float("inf")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "out_size"), [((3, 5, 7), (11,)), ((3, 40, 40), (9, 3, 2)), ((1, 1, 1), (4, 5))])
def test_rows_and_bits(backend, size, out_size, dtype, layout, device):
    x = torch.randn(5, *size, device=device).to(dtype).contiguous(memory_format=layout)
    out = torch.randn(5, *out_size, device=device).to(dtype)
    out = out.contiguous(memory_format=layout) if out.ndim == 4 else out
    variance = torch.rand(70, device=device)
    for row, value in zip((0, 2, 4), BAD, strict=True):
        x[row, -1, -1, -1] = value
        before = out.clone()
        marked = mark_not_finite_(out.clone(), x, variance)
        assert marked[: row + 1 : 2].isnan().all()
        rest = [i for i in range(5) if i not in range(0, row + 1, 2)]
        assert torch.equal(marked[rest], before[rest])
    assert mark_not_finite_(out.clone(), torch.ones_like(x), torch.full_like(variance, BAD[0])).isnan().all()


def test_large_finite_values_are_no_mark(backend, device):
    x = torch.full((2, 3, 8, 8), torch.finfo(torch.float16).max, dtype=torch.float16, device=device)
    out = torch.ones(2, 3, device=device)
    assert torch.equal(mark_not_finite_(out.clone(), x), out)


def test_what_the_kernel_leaves_to_pytorch(backend, device):
    out = torch.ones(2, 3, device=device)
    assert _fits(out, torch.ones(2, 3, 4, 4, device=device), None) == (backend == "triton")
    for x in (
        torch.ones(2, 3, 128, 128, device=device),  # large
        torch.ones(2, 4, 4, 3, device=device)[..., 0:2],  # in pieces
        torch.ones(2, 3, device=device, dtype=torch.float64),
    ):
        assert not _fits(out, x, None)
        x[1, -1] = float("nan")
        assert mark_not_finite_(out.clone(), x).isnan().any(1).tolist() == [False, True]
    mark_each = torch.func.vmap(lambda o, x: mark_not_finite_(o.clone(), x))
    marked = mark_each(out[:, None], torch.ones(2, 1, 3, device=device))
    assert torch.equal(marked[:, 0], out)


def test_a_grid_is_looked_at_again_after_a_write(device, monkeypatch):
    """Only then: on a GPU the host would wait for the answer at every call."""
    spikes = torch.ones(2, 4, 3, 3, dtype=torch.int8, device=device)
    weight = torch.ones(4, 4, 3, 3, dtype=torch.int8, device=device)
    scale, bias = torch.ones(4, device=device), torch.zeros(4, device=device)
    looks, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda *given: looks.append(given) or equal(*given))
    for _ in range(3):
        spike_conv(spikes, weight, scale, bias, 2, CIFAR, grid=0.25)
    assert len([given for given in looks if given[1] is scale]) == 1
    scale.mul_(0.3)
    with pytest.raises(ValueError, match=r"expected scale in multiples of grid=0\.25"):
        spike_conv(spikes, weight, scale, bias, 2, CIFAR, grid=0.25)
    scale.data = torch.full_like(scale, 0.5)
    spike_conv(spikes, weight, scale, bias, 2, CIFAR, grid=0.25)
