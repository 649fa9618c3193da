"""count_spikes against PyTorch: counts, what is no spike, layouts, registration."""

from __future__ import annotations

import pytest
import torch

from gac_kernels import count_spikes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def fresh(x, num_steps):
    """Running counts in the layout of x, and the flag."""
    total = torch.zeros_like(x.unflatten(0, (num_steps, -1))[:, 0], dtype=torch.float32)
    return total, torch.zeros((), dtype=torch.bool, device=x.device)


def check(x, num_steps, real=False, total=None):
    own, flag = fresh(x, num_steps)
    total = own if total is None else total
    before = total.clone()
    count_spikes(x, num_steps, total, flag)
    assert torch.equal(total - before, (x != 0).unflatten(0, (num_steps, -1)).sum(1).float())
    assert flag.item() is real


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("num_steps", "shape"), [(4, (8, 3, 5, 4)), (1, (3, 2, 1, 7)), (6, (6, 40, 9, 5))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes_are_counted(backend, dtype, num_steps, shape, layout, device):
    x = torch.randint(-1, 2, shape, device=device).to(dtype).contiguous(memory_format=layout)
    check(x, num_steps)
    total, flag = fresh(x, num_steps)
    for _ in range(3):
        count_spikes(x, num_steps, total, flag)
    assert torch.equal(total, 3 * (x != 0).unflatten(0, (num_steps, -1)).sum(1).float()) and not flag


@pytest.mark.parametrize("value", [0.5, 2.0, -3.0, float("inf"), float("nan")])
def test_a_value_that_is_no_spike_is_seen_wherever_it_is(backend, value, device):
    for at in (0, 1999, 2000 * 6 - 1):
        x = torch.zeros(6, 2000, device=device)
        x.view(-1)[at] = value
        check(x, 3, real=True)


def test_other_ranks_and_strides(backend, device):
    spikes = (torch.rand(4, 3, 6, 8, device=device) < 0.5).float()
    check(spikes[:, :, ::2, 1:5], 2)
    check(spikes[:, :1, :1, :1].expand(4, 3, 2, 2), 4)
    check(spikes[:, 0, 0], 2)
    check(spikes[:, 0], 1)
    # Counts in another layout than x's.
    check(spikes.contiguous(memory_format=torch.channels_last), 2, total=torch.zeros(2, 3, 6, 8, device=device))


def test_nothing_changes_nothing(backend, device):
    total, flag = torch.ones(2, 3, device=device), torch.zeros((), dtype=torch.bool, device=device)
    count_spikes(torch.zeros(0, 3, device=device), 2, total, flag)
    assert total.eq(1).all() and not flag


def test_opcheck(backend, device):
    x = torch.eye(4, device=device)
    torch.library.opcheck(torch.ops.gac_kernels.count_spikes, (x, 2, *fresh(x, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_steps=3), "fold time"),
        (dict(x=torch.zeros(4)), "fold time"),
        (dict(total=torch.zeros(2, 4)), "float32 of shape"),
        (dict(total=torch.zeros(2, 3, dtype=torch.float64)), "float32 of shape"),
        (dict(total=torch.zeros(2, 6)[:, ::2]), "dense"),
        (dict(real=torch.zeros(2, dtype=torch.bool)), "one bool"),
        (dict(real=torch.zeros(())), "one bool"),
    ],
)
def test_bad_input_is_a_sentence(change, message):
    arguments = dict(x=torch.zeros(4, 3), num_steps=2, total=torch.zeros(2, 3), real=torch.zeros((), dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        count_spikes(**arguments | change)
