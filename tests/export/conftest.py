"""Readers of exported files: a test that wants one is skipped where it is missing, and fails in CI if it exists."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import pytest

# The oldest Python for which a reader exists. Below it the extra does not install it, so that CI skips its tests too.
OLDEST_PYTHON = {"spikingjelly": (3, 11)}


@pytest.fixture
def needs():
    """``needs("onnx")`` imports a package; without it the test is skipped, or fails where ``CI`` is set."""

    def imported(name: str) -> ModuleType:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            oldest = OLDEST_PYTHON.get(package, (3, 0))
            if sys.version_info < oldest:
                pytest.skip(f"{name} wants Python {'.'.join(map(str, oldest))}")
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")
        return importlib.import_module(name)

    return imported
