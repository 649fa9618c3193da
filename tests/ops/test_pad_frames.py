"""pad_frames against PyTorch's padding and ReLU: values, gradients, layouts, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gac_kernels import pad_frames

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def expected(x, before, after, rectify):
    return F.pad(x.relu() if rectify else x, [before, after, before, after])


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 64, 2, 17), (3, 1, 1, 1), (2, 5, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(backend, dtype, shape, layout, rectify, device, poisoned):
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
    twin = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, reference = pad_frames(x, 1, 2, rectify), expected(twin, 1, 2, rectify)
    assert torch.equal(y, reference) and y.is_contiguous(memory_format=layout)
    grad = torch.randn(y.shape, device=device).to(dtype)
    y.backward(grad)
    reference.backward(grad)
    assert torch.equal(x.grad, twin.grad)


def test_asymmetric_none_and_strided(backend, device, poisoned):
    x = torch.randn(4, 6, 5, 7, device=device)[::2, :, :, 1:]
    assert torch.equal(pad_frames(x, 3, 0), expected(x, 3, 0, False))
    assert torch.equal(pad_frames(x, 0, 0, rectify=True), x.relu())
    assert pad_frames(x[:0], 1, 2).shape == (0, 6, 8, 9)


def test_keeps_nan(backend, device):
    x = torch.full((1, 2, 2, 2), torch.nan, device=device)
    assert pad_frames(x, 1, 1, rectify=True)[:, :, 1:3, 1:3].isnan().all()


def test_float64_gradients(device):
    x = torch.randn(2, 2, 3, 2, device=device, dtype=torch.float64, requires_grad=True)
    for rectify in (False, True):
        assert torch.autograd.gradcheck(lambda a, r=rectify: pad_frames(a, 1, 2, r), x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_registration(layout, device):
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.gac_kernels.pad_frames, (x, 1, 2, True))
    compiled = torch.compile(lambda a: pad_frames(a, 1, 2, True) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected(x, 1, 2, True) * 2)


def test_bad_input(device):
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(ValueError, match="4"):
        pad_frames(x, 1, 2)
    with pytest.raises(ValueError, match="index the tensor"):
        pad_frames(x[None], -1, 2)
