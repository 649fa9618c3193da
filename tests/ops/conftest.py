"""Shared set-up of the ops' tests."""

from __future__ import annotations

import pytest

from gac_kernels.convolution.hopper import launch as hopper_conv


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls of the Hopper kernel are divided as those that fill the GPU."""
    monkeypatch.setattr(hopper_conv, "multiprocessors", lambda _: 1)
