"""One table of dtypes by name."""

from __future__ import annotations

import pytest
import torch

from timm_gac.runtime.dtypes import AUTOCAST, DTYPES, autocast, computing, float32_as


def test_the_tables_agree_with_torch() -> None:
    assert all(getattr(torch, name) is dtype for name, dtype in DTYPES.items())
    assert {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16} == AUTOCAST


@pytest.mark.parametrize("precision", AUTOCAST)
def test_autocast_computes_in_the_precision(precision: str) -> None:
    a = torch.randn(4, 4)
    with autocast(torch.device("cpu"), precision):
        assert (a @ a).dtype == (AUTOCAST[precision] or torch.float32)
    with torch.autocast("cpu", torch.bfloat16), autocast(torch.device("cpu"), precision):  # also inside another
        assert (a @ a).dtype == (AUTOCAST[precision] or torch.float32)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a precision out of .*'bfloat16'.*, got 'half': choose one"):
        autocast(torch.device("cpu"), "half")


@pytest.mark.parametrize("newer", [False, True])
def test_float32_as_is_over_after_the_block(newer: bool) -> None:
    """Whichever of PyTorch's two ways to switch TensorFloat-32 has been used."""
    cudnn = torch.backends.cudnn

    def switch(on: bool) -> None:
        if newer:
            cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if on else "ieee"
        else:
            cudnn.allow_tf32 = on

    try:
        for outside in (True, False):
            switch(outside)
            before = cudnn.conv.fp32_precision
            for inside in (True, False):
                with pytest.raises(KeyError, match="of the block"), float32_as("tf32" if inside else "ieee"):
                    assert (cudnn.conv.fp32_precision == "tf32") == inside
                    raise KeyError("of the block")
            assert cudnn.conv.fp32_precision == before
            assert newer or cudnn.allow_tf32 == outside
    finally:
        cudnn.allow_tf32 = True


@pytest.mark.parametrize("owner", ["torch.backends", "torch.backends.cudnn"])
def test_float32_as_counts_where_tf32_is_allowed_for_all(owner: str) -> None:
    """Convolutions fall back on what the backend says, and that on what PyTorch says."""
    cudnn = torch.backends.cudnn
    place = cudnn if owner.endswith("cudnn") else torch.backends
    before = place.fp32_precision
    place.fp32_precision = "tf32"
    try:
        for form in ("ieee", "tf32"):
            with float32_as(form):
                assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == (form, form)
            assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("tf32", "tf32")
    finally:
        place.fp32_precision = before
        cudnn.allow_tf32 = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TensorFloat-32 is a GPU's")
def test_float32_on_a_gpu_is_float32() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False)
    x = torch.randn(8, 64, 16, 16)
    exact = torch.nn.functional.conv2d(x.double(), conv.weight.double(), padding=1)
    conv, x, device = conv.cuda(), x.cuda(), torch.device("cuda")

    def error(context) -> float:
        with context, torch.no_grad():
            return ((conv(x).cpu().double() - exact).norm() / exact.norm()).item()

    assert error(computing(device, None)) < 1e-6 and error(autocast(device, "float32")) < 1e-6
    assert 1e-5 < error(autocast(device, "tf32")) < 1e-3
