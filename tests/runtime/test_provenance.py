"""A row says where and with what it was measured, and the commit is a hash with and without a tag."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from timm_gac.runtime.provenance import PROVENANCE, device_name, provenance, source_commit, version_of


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TIMM_GAC_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


@pytest.mark.parametrize("tag", [(), ("-m", "annotated", "v0.1.0"), ("v0.1.0",)], ids=["none", "annotated", "light"])
def test_the_commit_is_a_hash_with_and_without_a_tag(repository: Path, tag: tuple[str, ...]) -> None:
    if tag:
        git(repository, "tag", *tag)
    expected = git(repository, "rev-parse", "HEAD")[:12]
    assert source_commit(repository / "package") == expected
    (repository / "package" / "file.py").write_text("a = 2\n")
    assert source_commit(repository / "package") == f"{expected}-dirty"


def test_a_package_inside_a_foreign_repository_has_no_commit(repository: Path, tmp_path: Path) -> None:
    installed = repository / "ignored" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "file.py").write_text("a = 1\n")
    assert source_commit(installed) == "unknown"


def test_the_environment_names_the_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GAC_COMMIT", "0123456789ab")
    assert source_commit(repository / "package") == "0123456789ab"
    assert provenance(torch.device("cpu"), "eager")["commit"] == "0123456789ab"
    assert provenance(torch.device("cpu"), "eager", "ffff")["commit"] == "ffff"


def test_no_git_is_no_error(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert source_commit(repository / "package") == "unknown"


def test_a_row_names_device_and_versions() -> None:
    row = provenance(torch.device("cpu"), "eager")
    assert tuple(row) == PROVENANCE and all(row.values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row["date_utc"])
    assert row["device"] == device_name(torch.device("cpu")) and row["device"].startswith("CPU ")
    assert (row["torch"], row["backend"]) == (torch.__version__, "eager")
    assert version_of("torch") and version_of("no-such-distribution") == ""
