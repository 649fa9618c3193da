"""What the searches for launch parameters share: candidates compiled by several processes, results in a GPU's file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from gac_kernels import tuning


def start_from_defaults() -> None:
    """Search from the defaults, not from an earlier result."""
    tuning._device_configs = lambda _: {}


def use(op: str, config: dict[str, int]) -> None:
    """Make every later launch of ``op`` use these parameters."""
    tuning.DEFAULTS[op] = config
    tuning.launch_config.cache_clear()
    tuning.shape_config.cache_clear()


def compile_in_processes(jobs: int) -> None:
    """Run this script ``jobs`` times with ``--share=0``, ``--share=1``, ...: each compiles its share into the cache.

    Compiling a kernel takes seconds, timing it milliseconds.

    Raises:
        SystemExit: One of them failed.
    """
    command = [sys.executable, *sys.argv]
    running = [subprocess.Popen([*command, f"--share={i}"]) for i in range(jobs)]
    if any([process.wait() for process in running]):
        raise SystemExit("expected all candidates to compile, got the error above")


def update(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Path:
    """Write results into this GPU's file, beside what it holds of other kernels and shapes."""
    path = Path(tuning.__file__).parent / "configs" / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for op, configs in found.items():
        stored[op] = stored.get(op, {}) | configs
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return path
