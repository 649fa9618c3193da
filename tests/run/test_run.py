"""A script that knows nothing of this package finds its models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from timm_gac.run.__main__ import main
from warm import WarmPython

SCRIPT = """
import argparse
import timm
from beside import SIZE

parser = argparse.ArgumentParser()
parser.add_argument("--model")
args = parser.parse_args()
assert __name__ == "__main__" and __file__.endswith("script.py")
network = timm.create_model(args.model, num_classes=SIZE)
print(type(network).__module__, network.num_classes)
raise SystemExit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("SIZE = 7\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_plugins_before_the_script_are_imported(script: Path, warm_python: WarmPython) -> None:
    (script.parent / "mine.py").write_text(
        "from gac_kernels import INTEGER, register_neuron\n"
        "import dataclasses\n"
        "register_neuron(dataclasses.replace(INTEGER, name='mine'))\n"
    )
    script.write_text(
        "import sys, timm\nprint(timm.create_model('test_gac_msresnet', neuron='mine').spec.neuron, *sys.argv[1:])\n"
    )
    done = warm_python(["-m", "timm_gac.run", "--plugin", str(script.parent / "mine.py"), str(script), "--plugin", "x"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mine", "--plugin", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin"], "expected a file or a module after --plugin, got nothing"),
        (["--plugin", "none.py", "SCRIPT"], "expected a Python file for --plugin, got 'none.py'"),
        (["--plugin=json"], "expected a script, got none"),
    ],
)
def test_plugins_that_are_none_are_told(script: Path, capsys, arguments: list[str], message: str) -> None:
    assert main([str(script) if word == "SCRIPT" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_script_finds_the_models(script: Path, warm_python: WarmPython) -> None:
    done = warm_python(["-m", "timm_gac.run", str(script), "--model", "test_gac_msresnet"])
    assert done.returncode == 3, done.stderr
    assert done.stdout.split() == ["timm_gac.models.network", "7"]


def test_arguments_and_path_are_put_back(script: Path) -> None:
    before = sys.argv, sys.path
    with pytest.raises(SystemExit) as ended:
        main([str(script), "--model", "test_gac_msresnet"])
    assert ended.value.code == 3 and (sys.argv, sys.path) == before
    sys.modules.pop("beside", None)


def test_help_and_errors_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "SCRIPT" in capsys.readouterr().out
    cases = {(): "expected a script, got none", ("--model", "a"): "behind its path", (str(tmp_path),): "is no file"}
    for arguments, message in cases.items():
        assert main(arguments) == 2
        errors = capsys.readouterr().err
        assert message in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(("name", "known"), [("onnx_export.py", "True"), ("validate.py", "False")])
def test_timm_s_onnx_exporter_knows_what_the_operators_are_made_of(
    name: str, known: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    op = "torch.ops.gac_kernels.lif.default"
    (tmp_path / name).write_text(f"import torch\nprint({op} in torch._decomp.decomposition_table)\n")
    assert main([str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.strip() == known
