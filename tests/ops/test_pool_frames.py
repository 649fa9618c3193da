"""pool_frames against PyTorch's mean and amax: values, gradients shared by ties, layouts, registration."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from gac_kernels import pool_frames, use_backend
from gac_kernels.reference import state_dtype
from gac_kernels.tuning import DEFAULTS

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK = DEFAULTS["pool_frames"]["BLOCK"]


def expected(x):
    return x.mean((1, 2, 3)), x.amax((1, 2, 3))


def check(x, kept=(0, 1)):
    """Values and the gradient of the outputs ``kept``, against PyTorch in float64 rounded once; the gradient."""
    x, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    outputs, references = pool_frames(x), expected(wide)
    assert_close("mean", outputs[0], references[0].to(state_dtype(x.dtype)))
    assert outputs[1].dtype == x.dtype and torch.equal(outputs[1].double(), references[1])
    grads = [torch.randn(x.shape[0], device=x.device).to(outputs[i].dtype) for i in kept]
    (gx,) = torch.autograd.grad([outputs[i] for i in kept], x, grads)
    (reference,) = torch.autograd.grad([references[i] for i in kept], wide, [grad.double() for grad in grads])
    assert_close("gradient", gx, reference.to(x.dtype))
    return gx


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 64, 9, 15), (65, 1, 1, 1), (7, 5, 1, 7), (2, 16, 32, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend, dtype, shape, layout, device, poisoned):
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    assert check(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kept", [(0,), (1,)], ids=["mean", "maximum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_one_alone(backend, dtype, kept, device, poisoned):
    check(torch.randn(3, 4, 5, 6, device=device).to(dtype), kept)


def test_ties_share_the_gradient(backend, device, poisoned):
    """All elements, some in several blocks of which one is smaller throughout, and zeros of both signs."""
    size = 3 * BLOCK + 7
    x = torch.full((4, 1, 1, size), -1.0, device=device)
    x[1, ..., [3, BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, size - 1]] = 2.0
    x[1, ..., BLOCK : 2 * BLOCK] = 1.0
    x[2, ..., [1, BLOCK, size - 2]] = torch.tensor([0.0, -0.0, 0.0], device=device)
    x[3] = -torch.inf
    check(x[:3])
    x.requires_grad_()
    pool_frames(x)[1].sum().backward()
    assert [row.count_nonzero().item() for row in x.grad] == [size, 5, 3, size]
    assert torch.equal(x.grad[1].unique(), torch.tensor([0.0, 0.2], device=device))


def test_more_blocks_than_the_second_kernel_takes_at_once(backend, device, poisoned):
    x = torch.randint(-50, 50, (2, 1, 257, BLOCK + 1), device=device).to(torch.bfloat16)
    x[0, 0, 0, 0] = x[0, 0, -1, -1] = 64
    x[1, 0, 130, 5] = 64
    check(x)


def test_strided_expanded_and_shifted(backend, device, poisoned):
    x = torch.randn(4, 6, 5, 7, device=device)
    for view in (x[::2, :, :, 1:], x[:1].expand(3, -1, -1, -1), x.transpose(1, 3), x[1:], x[:, :1]):
        check(view)
    mean, maximum = pool_frames(x.requires_grad_())
    (mean.sum() + maximum.sum()).backward()  # gradients with stride 0
    twin = x.detach().clone().requires_grad_()
    sum(y.sum() for y in expected(twin)).backward()
    assert_close("gradient", x.grad, twin.grad)


def test_no_samples(backend, device):
    x = torch.randn(0, 2, 3, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    mean, maximum = pool_frames(x)
    assert mean.shape == maximum.shape == (0,) and (mean.dtype, maximum.dtype) == (torch.float32, torch.bfloat16)
    (mean.sum() + maximum.sum()).backward()
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_as_in_pytorch(backend, dtype, device):
    """One NaN first, last, in a block beside infinities of both signs; infinities alone are no NaN for the maximum."""
    x = torch.randn(5, 1, 1, 2 * BLOCK + 3, device=device).to(dtype)
    x[0, ..., 0] = x[1, ..., -1] = x[2, ..., BLOCK + 5] = torch.nan
    x[2:4, ..., BLOCK + 6], x[2:4, ..., BLOCK + 7] = torch.inf, -torch.inf
    x[4, ..., 7] = torch.inf
    twin = x.clone().requires_grad_()
    outputs, references = pool_frames(x.requires_grad_()), expected(twin.float())
    for output, reference in zip(outputs, references, strict=True):
        torch.testing.assert_close(output.float(), reference, equal_nan=True, rtol=1e-5, atol=0)
    assert outputs[1].isnan().tolist() == [True, True, True, False, False]
    for mean, maximum in (outputs, references):
        (mean.sum() + 2 * maximum.float().sum()).backward()
    torch.testing.assert_close(x.grad, twin.grad, equal_nan=True)


def test_twice_the_same_bits(backend, device):
    x = torch.randn(7, 8, 33, 32, device=device, requires_grad=True)
    runs = [pool_frames(x) for _ in range(2)]
    grads = [torch.autograd.grad(run, x, [torch.ones_like(y) for y in run])[0] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and torch.equal(*grads)


def test_float64(device):
    x = torch.randn(2, 2, 3, 2, device=device, dtype=torch.float64)
    check(x)
    assert torch.autograd.gradcheck(pool_frames, x.requires_grad_())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_registration(backend, layout, device):
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.gac_kernels.pool_frames, (x,))
    mean, maximum, ties = torch.ops.gac_kernels.pool_frames(x)
    assert mean.requires_grad and maximum.requires_grad and not ties.requires_grad
    compiled = torch.compile(lambda a: sum(pool_frames(a * 2)), fullgraph=True, backend="aot_eager")
    twin = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, reference = compiled(x), sum(expected(twin * 2))
    torch.testing.assert_close(y, reference)
    y.sum().backward(), reference.sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_bad_input(device):
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(ValueError, match="4 axes"):
        pool_frames(x)
    with pytest.raises(ValueError, match=r"got torch.int32: convert it"):
        pool_frames(x[None].int())
    with pytest.raises(ValueError, match=r"at least one element, got shape \(1, 2, 0, 4\)"):
        pool_frames(x[None, :, :0])
    with use_backend("triton"), pytest.raises(ValueError, match="float64"):
        pool_frames(x[None].double())
