"""The mark on outputs of inputs that are not finite: which rows get NaN, and that the others keep their bits."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from gac_kernels import CIFAR, firing_rate, spike_conv, use_backend
from gac_kernels.spikes import firing_rate as module
from gac_kernels.spikes.firing_rate import _launch_marked as launch
from gac_kernels.spikes.firing_rate import marked_firing_rate
from gac_kernels.spikes.not_finite import _fits, mark_not_finite_
from timm_gac import quantize

BAD = float("nan"), float("inf"), -float("inf")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "out_size"), [((3, 5, 7), (11,)), ((3, 40, 40), (9, 33, 33)), ((1, 1, 1), (4, 5))])
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


@pytest.fixture
def launched(monkeypatch):
    """Launches of the kernel that marks firing rates."""
    calls = []
    monkeypatch.setattr(module, "_launch_marked", lambda *args: calls.append(args) or launch(*args))
    return calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.int8, torch.float32),
        (torch.int8, torch.bfloat16),
        (torch.int8, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("frame", [(3, 2, 3), (9, 37, 61)], ids=str)
def test_rates_are_marked_in_one_kernel(backend, frame, dtype, out, layout, device, launched):
    """Of three samples the larger frames are more blocks than programs."""
    num_steps, x = 3, torch.randn(3, 3, 9, 5, device=device)
    spikes = (torch.rand(3 * num_steps, *frame, device=device) < 0.4).to(dtype).contiguous(memory_format=layout)
    variance = torch.rand(7, device=device)
    for value in (1.0, *BAD):
        x[1, 2, 8, 4] = value
        for given in (x, x.to(torch.bfloat16), x.contiguous(memory_format=torch.channels_last)):
            right = mark_not_finite_(firing_rate(spikes, num_steps, out), given, variance)
            launched.clear()
            rate = marked_firing_rate(spikes, num_steps, given, variance, out)
            assert len(launched) == (backend == "triton")
            assert rate.dtype == right.dtype and rate.stride() == right.stride()
            assert torch.equal(rate.isnan(), right.isnan()) and torch.equal(rate.nan_to_num(5.0), right.nan_to_num(5.0))
            assert rate[1].isnan().all() == (value != 1.0) and rate[::2].isfinite().all()
    assert marked_firing_rate(spikes, num_steps, x, torch.full_like(variance, BAD[0]), out).isnan().all()


def test_rates_are_marked_without_the_kernel_where_it_cannot(backend, device, launched):
    spikes = torch.ones(4, 3, 4, 4, device=device)
    for x in (torch.ones(2, 3, 128, 128, device=device), torch.ones(2, 4, 4, 3, device=device)[..., 0:2]):
        x[1, -1] = float("nan")
        assert marked_firing_rate(spikes, 2, x).isnan().all((1, 2, 3)).tolist() == [False, True]
    x = torch.ones(2, 3, device=device)
    with use_backend("auto"):
        assert marked_firing_rate(spikes.double(), 2, x).dtype == torch.float64
    traced = torch.jit.trace(lambda s, x: marked_firing_rate(s, 2, x), (spikes, x), check_trace=False)
    assert torch.equal(traced(torch.zeros_like(spikes), x), torch.zeros(2, 3, 4, 4, device=device))
    with FlopCounterMode(display=False):
        marked_firing_rate(spikes, 2, x)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(spikes, spikes)
        assert torch.equal(forward_ad.unpack_dual(marked_firing_rate(dual, 2, x)).tangent, spikes[:2])
    assert not launched
    with pytest.raises(ValueError, match="num_steps"):
        marked_firing_rate(spikes, 3, x)


@torch.no_grad()
def test_a_watched_rate_is_called(backend, device, launched):
    network = quantize(timm.create_model("test_gac_msresnet").eval()).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    x[1, 0, 3, 3] = float("inf")
    logits = network(x)
    assert len(launched) == (backend == "triton")
    seen = []
    network.rate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    launched.clear()
    again = network(x)
    assert len(seen) == 1 and not launched and torch.equal(again[0], logits[0])
    assert all(one[1].isnan().all() and one[0].isfinite().all() for one in (logits, again))


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
