"""Fetches timm's own model tests, of the installed version, and runs them on our models.

    python tests/timm_suite/run.py --models test_gac_msresnet
    python tests/timm_suite/run.py --models all -- -x -k forward

The file comes out of timm's source distribution (wheels do not have it), is kept under .cache/ and never committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "timm_suite"
# pip's words where no index answers: it then knows no version of timm at all.
UNREACHABLE = ("(from versions: none)", "ConnectionError", "NameResolutionError", "ProxyError", "timed out")


class RegistryUnreachableError(RuntimeError):
    """The package registry does not answer, and the file is not in the cache."""


def fetch(timm_version: str | None = None) -> Path:
    """Path of timm's ``test_models.py`` of this version, downloaded on first use.

    Raises:
        RegistryUnreachableError: It is not cached and the registry does not answer.
        RuntimeError: The download failed for another reason; the message is pip's.
    """
    timm_version = timm_version or version("timm")
    target = CACHE / f"timm-{timm_version}" / "test_models.py"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = target.parent / f"timm-{timm_version}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(archive.parent), f"timm=={timm_version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            unreachable = any(word in done.stderr for word in UNREACHABLE)
            raise (RegistryUnreachableError if unreachable else RuntimeError)(done.stderr.strip()[-2000:])
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"timm-{timm_version}/tests/test_models.py")
        assert member is not None
        partial = target.with_suffix(".partial")
        partial.write_bytes(member.read())
    partial.replace(target)
    return target


def run(models: str, arguments: list[str], report: Path | None = None) -> int:
    """Run the suite in a process of its own and return pytest's exit status.

    Args:
        models: Comma-separated name patterns, or ``all``.
        arguments: Further arguments for pytest.
        report: JSON file to write the counts to.
    """
    suite = fetch()
    paths = [Path(__file__).parent, ROOT, ROOT / "kernels" / "torch-ext", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "TIMM_SUITE_MODELS": "*" if models == "all" else models,
    }
    if report is not None:
        environment["TIMM_SUITE_REPORT"] = str(report)
    # An empty configuration: the options and markers of this repository are not timm's.
    command = [sys.executable, "-m", "pytest", str(suite), "-p", "timm_suite_plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-c", os.devnull, "--rootdir", str(suite.parent), "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, cwd=suite.parent).returncode


def main() -> int:
    """Command line: parse, run, return pytest's exit status."""
    parser = argparse.ArgumentParser(description="Run timm's own model tests on the models of timm_gac.")
    parser.add_argument("--models", default="all", help="comma-separated name patterns, or 'all' (default)")
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    return run(options.models, options.arguments)


if __name__ == "__main__":
    sys.exit(main())
