"""Shared by the searches: setting launch parameters, compiling candidates in several processes, a GPU's JSON file."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from gac_kernels import tuning
from gac_kernels.common.launch import forget_launches


@functools.cache
def _no_configs(device: str) -> dict[str, dict[str, dict[str, int]]]:
    return {}


def start_from_defaults() -> None:
    """Ignore the results of earlier searches."""
    tuning._device_configs = _no_configs


def use(op: str, config: dict[str, int]) -> None:
    """Use these parameters for every later launch of ``op``."""
    tuning.DEFAULTS[op] = config
    tuning.launch_config.cache_clear()
    tuning.shape_config.cache_clear()
    forget_launches()


def say(text: object) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def compile_in_processes(module: str, jobs: int) -> None:
    """Run a search ``jobs`` times with ``--share=0``, ``--share=1``, ...: each compiles a share into Triton's cache.

    Args:
        module: Name of the search's module, which gets this process's options.
        jobs: Number of processes.

    Raises:
        SystemExit: A process failed.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    running = [subprocess.Popen([*command, f"--share={i}"]) for i in range(jobs)]
    if any([process.wait() for process in running]):
        raise SystemExit("expected all candidates to compile, got the error above")


def report(found: Mapping[str, Mapping[str, Mapping[str, int]]], write: bool) -> None:
    """Print results, and add them to this GPU's file where asked for."""
    say(json.dumps(found, indent=2, sort_keys=True))
    if write:
        say(f"written to {update(found)}")


def update(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Path:
    """Add results to this GPU's file, in which those of other kernels and shapes stay.

    Args:
        found: For each op, launch parameters by the key under which a launch looks them up.

    Returns:
        The file.
    """
    path = Path(tuning.__file__).parent / "configs" / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for op, configs in found.items():
        stored[op] = stored.get(op, {}) | configs
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return path
