"""Every script of this folder shows one fault that a user met: it exits with 1 while the fault stands.

The scripts run in this process, since importing PyTorch for each would take longer than they do. Each also runs by
itself: ``python tests/faults/NAME.py``.
"""

from __future__ import annotations

import logging
import os
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = sorted(path for path in Path(__file__).parent.glob("[0-9]*.py"))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a script sets for its whole process is undone for the tests that share this one."""
    environment, disabled, pixels = os.environ.copy(), logging.root.manager.disable, Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        yield
    os.environ.clear()
    os.environ.update(environment)
    logging.disable(disabled)
    Image.MAX_IMAGE_PIXELS = pixels


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_fault_is_mended(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    assert status in (None, 0, False), f"exit {status}: {capsys.readouterr().out[-2000:]}"
