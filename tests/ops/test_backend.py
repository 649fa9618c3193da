"""The backend switch: resolution, forcing, refusal, no silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gac_kernels import backend, lif, requested_backend, resolve_backend, use_backend


def test_resolution(monkeypatch):
    monkeypatch.delenv("TIMM_GAC_BACKEND", raising=False)
    assert resolve_backend("cpu") == "eager"
    assert resolve_backend("cuda", torch.float64) == "eager"
    assert resolve_backend("cuda") == ("triton" if backend.HAS_TRITON else "eager")
    with use_backend("eager"):
        assert resolve_backend("cuda") == "eager"
        with use_backend("auto"):
            assert requested_backend() == "auto"
        assert requested_backend() == "eager"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("TIMM_GAC_BACKEND", "EAGER")
    assert requested_backend() == "eager"
    monkeypatch.setenv("TIMM_GAC_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="expected TIMM_GAC_BACKEND out of"):
        lif(torch.ones(2, 3))


def test_triton_refuses_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="expected a CUDA device for backend 'triton', got 'cpu'"):
            lif(torch.ones(2, 3))
        with pytest.raises(ValueError, match="got float64"):
            lif(torch.ones(2, 3, dtype=torch.float64))
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with use_backend("triton"), pytest.raises(ValueError, match="expected Triton for backend 'triton', got none"):
        lif(torch.ones(2, 3))
    monkeypatch.setattr(backend, "_warned", False)
    with use_backend("auto"), pytest.warns(UserWarning, match="Triton is missing"):
        assert resolve_backend("cuda") == "eager"
    with pytest.raises(ValueError, match="expected a backend out of"), use_backend("cuda"):
        pass


def test_works_without_triton():
    """With Triton not importable the package imports and computes, and says so when Triton is asked for."""
    code = """
import sys
sys.modules["triton"] = None
import torch, gac_kernels
x = torch.randn(3, 4)
assert torch.equal(gac_kernels.lif(x), gac_kernels.lif_reference(x))
try:
    with gac_kernels.use_backend("triton"):
        gac_kernels.lif(x)
except ValueError as error:
    assert "expected Triton" in str(error)
else:
    raise SystemExit("Triton was asked for, is absent, and nothing was raised")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
