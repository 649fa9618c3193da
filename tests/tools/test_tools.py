"""The scripts of tools/, the Makefile and the workflows: each check finds what it is for."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import yaml

import check_wheel
import count_tokens
import publish
import timm_gac
from warm import WarmPython

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
VERSION = timm_gac.__version__


def test_tokens_are_those_of_the_code_alone() -> None:
    source = '"""A docstring."""\n\nx = 1  # a comment\n\n\ndef f(a):\n    """Another."""\n    return a  # fmt: skip\n'
    size = count_tokens.measure(source)
    assert size.tokens == 11  # x = 1 def f ( a ) : return a
    assert (size.lines, size.skips, size.function) == (8, 1, (3, "f"))


def write_wheel(path: Path, code: str, requires: list[str]) -> zipfile.ZipFile:
    """A wheel of one module."""
    lines = ["Metadata-Version: 2.4", "Name: timm-gac", "Version: 1", *(f"Requires-Dist: {line}" for line in requires)]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("timm_gac/__init__.py", code)
        wheel.writestr("timm_gac-1.dist-info/METADATA", "\n".join(lines) + "\n\n")
        wheel.writestr("timm_gac-1.dist-info/RECORD", str(path))
    return zipfile.ZipFile(path)


CODE = "import json\nimport torch\n\n\ndef f():\n    from PIL import Image\n    import matplotlib.pyplot\n"
REQUIRES = ["torch>=2", "pillow", 'matplotlib; extra == "bench"', 'pytest; extra == "test"']


def test_requirements_are_what_is_imported(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "good.whl", CODE, REQUIRES)
    assert check_wheel.check_requirements(wheel) == {"matplotlib"}


@pytest.mark.parametrize(
    ("code", "requires", "message"),
    [
        (CODE + "    import sklearn\n", REQUIRES, r"\['scikit-learn'\] imported but not declared and \[\]"),
        (CODE, REQUIRES[1:], r"\['torch'\] imported but not declared"),
        (CODE, [*REQUIRES, "accelerate"], r"\[\] imported but not declared and \['accelerate'\]"),
        (CODE, [*REQUIRES, 'accelerate; extra == "train"'], r"and \['accelerate'\] declared but not imported"),
    ],
)
def test_wrong_requirements_are_found(code: str, requires: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_wheel.check_requirements(write_wheel(tmp_path / "bad.whl", code, requires))


def test_missing_and_other_files_are_found(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "small.whl", CODE, REQUIRES)
    with pytest.raises(ValueError, match=r"'gac_kernels/__init__\.py'.* missing"):
        check_wheel.check_contents(wheel)
    same = write_wheel(tmp_path / "same.whl", CODE, REQUIRES)
    check_wheel.check_same(Path(str(wheel.filename)), Path(str(same.filename)))
    other = write_wheel(tmp_path / "other.whl", CODE + "x = 1\n", REQUIRES)
    with pytest.raises(ValueError, match=r"\['timm_gac/__init__\.py'\] different"):
        check_wheel.check_same(Path(str(wheel.filename)), Path(str(other.filename)))


FILES = (f"timm_gac-{VERSION}-py3-none-any.whl", f"timm_gac-{VERSION}.tar.gz")
PACKAGE = publish.Target("package", "timm-gac", ROOT / "dist", FILES)
CHANGES = f"## [{VERSION}] - 2026-01-31\n"


def test_only_a_release_is_published() -> None:
    publish.check([PACKAGE], f"v{VERSION}", CHANGES)
    with pytest.raises(ValueError, match=f"expected a clean checkout of the tag v{VERSION}, got v0"):
        publish.check([PACKAGE], "v0", CHANGES)
    with pytest.raises(ValueError, match=r"CHANGELOG\.md, got none"):
        publish.check([PACKAGE], f"v{VERSION}", CHANGES.replace("2026-01-31", "unreleased"))
    with pytest.raises(ValueError, match=r"in dist, got"):
        publish.check([publish.Target("package", "", ROOT, FILES[:1])], f"v{VERSION}", CHANGES)
    with pytest.raises(ValueError, match="expected safetensors only"):
        publish.check([publish.Target("model", "a/b", ROOT, ("model.pt",))], f"v{VERSION}", CHANGES)


def test_a_dry_run_shows_the_files_and_sends_nothing(warm_python: WarmPython) -> None:
    offline = "import socket\ndef refuse(*_): raise AssertionError('connected')\nsocket.socket.connect = refuse\n"
    code = f"{offline}import sys, publish\nsys.argv[1:] = ['--only', 'space']\nraise SystemExit(publish.main())"
    environment = {"PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}:{ROOT / 'kernels' / 'torch-ext'}", "PATH": "/usr/bin:/bin"}
    done = warm_python(["-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    assert "app.py" in done.stdout and "nothing was sent" in done.stdout


def test_every_target_is_phony_and_explained() -> None:
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].replace("\\", " ").split()) == TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_only_and_pin_actions(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert steps
    for step in steps:
        if "run" in step:
            command, *targets = step["run"].split()
            assert command == "make" and targets and set(targets) <= TARGETS, step
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"]), step
