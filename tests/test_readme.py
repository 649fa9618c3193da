"""The README tells the truth: its Python runs, its commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.split("#")[0].split()
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.strip().splitlines()[0])
def test_python_runs(snippet, tmp_path):
    subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path, timeout=240)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 3 and ["make", "demo"] in COMMANDS and ["make", "test"] in COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_exist(command):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert command[0] == "timm-gac"
        arguments = [sys.executable, "-m", "timm_gac.cli", command[1], "--help"]
        assert "usage" in subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=240).stdout


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
