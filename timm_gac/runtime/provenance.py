"""What a measured number needs beside it: when, on which device, with which versions, from which commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PROVENANCE = ("date_utc", "device", "torch", "triton", "timm_gac", "commit", "backend")


def provenance(device: torch.device, backend: str, commit: str = "") -> dict[str, str]:
    """The `PROVENANCE` columns of a row.

    Args:
        device: Where the measurement runs.
        backend: The backend that the package's own operators use there (`gac_kernels.resolve_backend`).
        commit: Commit of the source; `source_commit` where empty.
    """
    return {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version_of("triton") or "none",
        "timm_gac": version_of("timm-gac") or "source",
        "commit": commit or source_commit(),
        "backend": backend,
    }


def device_name(device: torch.device) -> str:
    """Name of a GPU; of a CPU its model, where Linux tells it, its architecture and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(["CPU", *models[:1], platform.machine(), torch.backends.cpu.get_cpu_capability()])


def version_of(distribution: str) -> str:
    """Version of an installed distribution; empty where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def source_commit(folder: Path | None = None) -> str:
    """Commit of the source: ``TIMM_GAC_COMMIT`` where it is set, else what git says, else ``unknown``.

    Twelve digits of the hash, never the name of a tag, with ``-dirty`` behind them where tracked files are changed. A
    package that is installed inside another project's repository is not part of it, and its commit is unknown.

    Args:
        folder: Folder of the source; that of this file where None.
    """
    if given := os.environ.get("TIMM_GAC_COMMIT"):
        return given
    folder = Path(__file__).parent if folder is None else folder
    try:
        if not _git(folder, "ls-files", "--", "."):
            return "unknown"
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*") or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
