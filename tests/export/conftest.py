"""Readers of exported files: a test that wants one is skipped where it is missing, and fails so in CI."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import pytest


@pytest.fixture
def needs():
    """``needs("onnx")`` imports a package; without it the test is skipped, or fails where ``CI`` is set."""

    def imported(name: str) -> ModuleType:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")
        return importlib.import_module(name)

    return imported
