"""The README keeps its word: its Python runs, its commands and names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_gac  # noqa: F401  (registers the models)
from timm_gac import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].split() for block in blocks("console") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_that_needs_a_file_compiles() -> None:
    for code in blocks("py"):
        compile(code, "README.md", "exec")


def test_opens_with_the_two_commands() -> None:
    assert commands()[:2] == [["make", "demo"], ["make", "test"]]


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = [*commands(), *(words.split() for words in re.findall(r"`((?:make|timm-gac) [a-z -]+)`", README))]
    assert len(named) >= 6
    for program, *rest in named:
        if program == "make":
            assert rest[0] in targets, rest
            continue
        assert program == "timm-gac"
        subcommands = rest[: 2 if rest[0] == "bench" else 1]
        with pytest.raises(SystemExit) as leaving:
            cli.main([*subcommands, "--help"])
        assert leaving.value.code == 0, rest
        shown = capsys.readouterr().out
        assert [option for option in rest if option.startswith("--") and option not in shown] == []


def test_models_and_parameters_are_the_real_ones() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    registered = set(timm.list_models(module="spiking_resnet"))
    assert {name for name in registered if "gac_" in name} <= named <= registered
    row = r"^\| `(\w+)` \|.*?\| (\d+,[\d,]*\d) ?(?:\((\d+) classes(?:, T=(\d+))?\))?"
    counts = re.findall(row, README, flags=re.MULTILINE)
    assert len(counts) >= 7
    for name, count, classes, steps in counts:
        sizes = {"num_classes": int(classes)} if classes else {}
        model = timm.create_model(name, device="meta", num_steps=int(steps or 4), **sizes)
        assert sum(parameter.numel() for parameter in model.parameters()) == int(count.replace(",", "")), name


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
