"""firing_rate against PyTorch's mean over time: values, gradients, layouts, registration."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from gac_kernels import firing_rate

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def spikes_of(shape, dtype, layout, device):
    return (torch.rand(shape, device=device) < 0.4).to(dtype).contiguous(memory_format=layout)


def expected(x, num_steps):
    """Exact in float64, rounded once."""
    return x.double().unflatten(0, (num_steps, -1)).mean(0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("num_steps", "shape"), [(4, (2, 3, 5, 4)), (1, (3, 1, 7, 1)), (6, (1, 40, 5, 9))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(backend, dtype, num_steps, shape, layout, device, poisoned):
    x = spikes_of((num_steps * shape[0], *shape[1:]), dtype, layout, device)
    if dtype == torch.int8:
        rate = firing_rate(x, num_steps)
        assert rate.dtype == torch.float32
        torch.testing.assert_close(rate.double(), expected(x, num_steps), rtol=1e-7, atol=0)
        assert firing_rate(x, num_steps, torch.bfloat16).dtype == torch.bfloat16
        return
    rate = firing_rate(x.requires_grad_(), num_steps)
    assert rate.dtype == dtype and rate.is_contiguous(memory_format=layout)
    assert_close("rate", rate, expected(x, num_steps).to(dtype))
    # As from global pooling: one value a channel, which is not dense.
    grad = torch.randn(*shape[:2], 1, 1, device=device).to(dtype).expand(shape)
    (gx,) = torch.autograd.grad(rate, x, grad)
    assert_close("gradient", gx, (grad / num_steps).repeat(num_steps, 1, 1, 1))
    assert gx.is_contiguous(memory_format=layout)


def test_many_spikes_are_counted_exactly(backend, device):
    """A count of 256 and more, which neither bfloat16 nor int8 could hold."""
    x = torch.ones(1024, 2, 1, 3, device=device, dtype=torch.bfloat16)
    x[::4, 0], x[1, 1] = 0, 0
    assert torch.equal(firing_rate(x, 1024)[:, 0].float(), torch.full((1, 1, 3), 0.75, device=device))
    for spikes in (x, x.to(torch.int8)):
        assert torch.equal(firing_rate(spikes, 1024, torch.float32), expected(x, 1024).float())


def test_strided_and_expanded_inputs(backend, device):
    x = spikes_of((8, 3, 6, 8), torch.float32, torch.contiguous_format, device)[:, :, ::2, 1:5]
    torch.testing.assert_close(firing_rate(x, 4).double(), expected(x, 4))
    x = torch.ones(1, 3, 1, 1, device=device).expand(6, 3, 2, 2)
    assert firing_rate(x, 3).eq(1).all()


def test_float64_is_exact(device):
    x = spikes_of((6, 2, 3, 3), torch.float64, torch.channels_last, device).requires_grad_()
    assert torch.equal(firing_rate(x, 3), expected(x, 3))
    assert torch.equal(firing_rate(x.detach().to(torch.int8), 3, torch.float64), expected(x, 3))
    assert torch.autograd.gradcheck(lambda x: firing_rate(x, 3), x)


def test_no_samples_is_no_error(backend, device):
    x = torch.zeros(0, 3, 2, 2, device=device, requires_grad=True)
    firing_rate(x, 4).sum().backward()
    assert x.grad.shape == x.shape


def test_opcheck_and_compile(backend, device):
    x = spikes_of((4, 3, 5, 2), torch.float32, torch.channels_last, device).requires_grad_()
    torch.library.opcheck(torch.ops.gac_kernels.firing_rate, (x, 2))
    compiled = torch.compile(lambda x: firing_rate(x, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), firing_rate(x, 2))


@pytest.mark.parametrize(
    ("x", "num_steps", "message"),
    [
        (torch.zeros(4, 3, 2), 2, r"\(T\*B, C, H, W\)"),
        (torch.zeros(4, 3, 2, 2, dtype=torch.int32), 2, "int8"),
        (torch.zeros(4, 3, 2, 2), 3, "divides"),
        (torch.zeros(4, 3, 2, 2), 0, "divides"),
    ],
)
def test_bad_input_is_a_sentence(x, num_steps, message):
    with pytest.raises(ValueError, match=message):
        firing_rate(x, num_steps)


def test_a_16_bit_rate_of_wider_spikes_has_a_wide_gradient(device):
    """A third of a gradient in bfloat16 is no number of bfloat16."""
    x = torch.ones(3, 1, 1, 1, device=device, dtype=torch.float64, requires_grad=True)
    firing_rate(x, 3, torch.bfloat16).backward(torch.ones(1, 1, 1, 1, device=device, dtype=torch.bfloat16))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3), rtol=1e-12, atol=0)
