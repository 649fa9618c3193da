"""``--plugin``: neurons of one's own in the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_gac import cli
from timm_gac.runtime.plugins import take_plugins
from timm_gac.train.__main__ import main as train_main
from warm import WarmPython

ROOT = Path(__file__).parents[2]


def test_the_option_may_stand_anywhere() -> None:
    given = ["--plugin", "a.py", "eval", "folder", "--plugin=b", "--data", "digits"]
    assert take_plugins(given) == (["a.py", "b"], ["eval", "folder", "--data", "digits"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["models", "--plugin"], "expected a file or a module after --plugin, got nothing"),
        (["--plugin", "--help"], "expected a file or a module after --plugin, got --help"),
        (["--plugin", "missing.py", "models"], "expected a Python file for --plugin, got 'missing.py'"),
        (["--plugin", "no_such.module", "models"], "expected a module for --plugin, got 'no_such.module'"),
    ],
)
def test_bad_plugins_are_a_sentence(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_a_plugin_lacks_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "lacking_plugin.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("lacking_plugin", "lacking_plugin.py"):
        assert cli.main(["--plugin", name, "models"]) == 2
        assert "expected the package 'no_such_package'" in capsys.readouterr().err


def test_a_file_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "counting_plugin.py"
    file.write_text("from pathlib import Path\nlog = Path(__file__ + '.log').open('a')\nlog.write('x')\nlog.close()\n")
    for _ in range(2):
        assert cli.main(["models", "test_gac_msresnet", "--plugin", str(file)]) == 0
    assert Path(f"{file}.log").read_text() == "x"
    del sys.modules["counting_plugin"]


def test_the_trainer_as_a_module_takes_them(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``accelerate launch -m timm_gac.train`` starts it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "trainer_plugin.py"
    file.write_text(
        "import dataclasses\nfrom gac_kernels import TERNARY, register_neuron\n"
        "register_neuron(dataclasses.replace(TERNARY, name='test_of_the_trainer'), replace=True)\n"
    )
    show = ["digits", "--neuron", "test_of_the_trainer", "--show"]
    assert train_main(show) == 2 and "--plugin" in capsys.readouterr().err
    assert train_main([*show, "--plugin", str(file)]) == 0
    assert "test_of_the_trainer" in capsys.readouterr().out
    del sys.modules["trainer_plugin"]


def test_trains_and_evaluates_a_neuron_of_ones_own(warm_python: WarmPython, tmp_path: Path) -> None:
    """In processes of their own, since what is registered stays."""
    pytest.importorskip("triton", reason="the example has Triton functions")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    run, answers = tmp_path / "run", tmp_path / "eval.json"
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

    def timm_gac(*arguments: str) -> subprocess.CompletedProcess[str]:
        return warm_python(["-m", "timm_gac.cli", *arguments], env=environment)

    plugin = ("--plugin", str(ROOT / "examples" / "own_neuron.py"))
    train = ("train", "digits", "--neuron", "synaptic", "--epochs", "1", "--num-steps", "2", "--out", str(run))
    refused = timm_gac(*train)
    assert refused.returncode == 2 and "synaptic" in refused.stderr
    done = timm_gac(*train, *plugin)
    assert done.returncode == 0, done.stderr
    evaluate = ("eval", str(run), "--data", "digits", "--images", "20", "--json", str(answers))
    assert timm_gac(*evaluate).returncode == 2
    done = timm_gac(*plugin, *evaluate)
    assert done.returncode == 0, done.stderr
    assert json.loads(answers.read_text())["images"] == 20
