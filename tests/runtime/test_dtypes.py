"""One table of dtypes by name."""

from __future__ import annotations

import pytest
import torch

from timm_gac.runtime.dtypes import AUTOCAST, DTYPES, autocast


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
