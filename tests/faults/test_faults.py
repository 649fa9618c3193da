"""Every script of this folder shows one fault that a user met: it exits with 1 while the fault stands.

The scripts run in this process, since importing PyTorch for each would take longer than they do. Each also runs by
itself: ``python tests/faults/NAME.py``.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted(path for path in Path(__file__).parent.glob("[0-9]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_fault_is_mended(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    assert status in (None, 0, False), f"exit {status}: {capsys.readouterr().out[-2000:]}"
