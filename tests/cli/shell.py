"""The commands there are, and Python as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


COMMANDS = (
    *(
        "demo",
        "models",
        "data",
        "train",
        "eval",
        "predict",
        "inspect",
        "energy",
        "anytime",
        "gate",
        "compare",
        "gain",
        "convert",
        "quantize",
        "export",
        "push",
    ),
    *("verify", "bench", "bench kernels", "bench model", "bench loops", "bench scaling", "bench curves"),
)


def source_paths() -> dict[str, str]:
    """The environment with this checkout's packages first."""
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=source_paths())
    assert done.returncode == 0, done.stderr
    return done


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages in what ``python -X importtime`` wrote."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)}
