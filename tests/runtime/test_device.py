"""What --device means in every command."""

from __future__ import annotations

import pytest
import torch

from timm_gac.runtime.device import device_type, resolve_device


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_cuda_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_type("auto") == ("cuda" if there else "cpu")
    assert [device_type(name) for name in ("cpu", "cuda:1", "meta")] == ["cpu", "cuda", "meta"]


def test_a_device_of_this_machine():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "no_such_device"):
        with pytest.raises(ValueError, match=f"expected a device of this machine, got '{name}'"):
            resolve_device(name)
