"""What starting costs and imports: of the command line, the console script and other programs."""

from __future__ import annotations

import resource
import statistics
import sys
from pathlib import Path

import pytest

from shell import COMMANDS, imported, run_python, source_paths
from timm_gac.cli.main import _Announcer
from warm import WarmPython

HEAVY = {"torch", "timm", "accelerate", "matplotlib", "triton", "sklearn"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch(command: str) -> None:
    done = run_python("-X", "importtime", "-m", "timm_gac.cli", *command.split(), "--help")
    assert "tyro" in imported(done) and not imported(done) & HEAVY
    if command and command != "bench":
        assert "Example: timm-gac " + command in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["", "train", "bench model"])
def test_help_takes_under_a_second(command: str) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python("-m", "timm_gac.cli", *command.split(), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, not wall time: the tests beside this one must not count.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < 1.0, seconds


def test_the_console_script_has_the_public_names_and_the_models(tmp_path: Path) -> None:
    script = tmp_path / "timm-gac"
    script.write_text(
        "import sys, timm_gac\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(timm_gac, 'no_such_name')\n"
        "from timm_gac.cli import main\n"
        "main(['models', 'test_gac*'])\n"
        "print(*(getattr(timm_gac, name) is not None for name in timm_gac.__all__))\n"
        "from timm_gac import LIF, quantize\n"
        "import timm, timm_gac.layers.neuron\n"
        "assert LIF is timm_gac.layers.neuron.LIF and callable(quantize)\n"
        "assert timm.list_models(module='spiking_resnet')\n"
    )
    shown = run_python(str(script)).stdout
    assert "test_gac_msresnet" in shown and set(shown.splitlines()[-1].split()) == {"True"}


def test_any_other_program_imports_everything_at_once(warm_python: WarmPython, tmp_path: Path) -> None:
    code = "import timm_gac, timm\nassert timm.list_models(module='spiking_resnet') and 'LIF' in vars(timm_gac)\n"
    script = tmp_path / "timm-gac.py"
    script.write_text(code)
    # A process that the command line spawned has its arguments, but was started otherwise.
    for arguments in ([str(script)], ["-c", "import sys\nsys.argv = ['/bin/timm-gac', 'train']\n" + code]):
        done = warm_python(arguments, env=source_paths())
        assert done.returncode == 0, done.stderr


def test_waiting_threads_sleep_unless_told_otherwise(tmp_path: Path) -> None:
    script = tmp_path / "timm-gac"
    script.write_text(
        "import os, sys\n"
        "os.environ.pop('OMP_WAIT_POLICY', None)\n"
        "from timm_gac.cli import main\n"
        "main(['--version'])\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'passive' and 'torch' not in sys.modules\n"
        "os.environ['OMP_WAIT_POLICY'] = 'active'\n"
        "main(['--version'])\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'active'\n"
    )
    run_python(str(script))


def test_a_line_says_that_pytorch_loads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    announcer = _Announcer()
    monkeypatch.setattr(sys, "meta_path", [announcer, *sys.meta_path])
    for name in ("json", "torch"):
        announcer.find_spec(name, None)
    assert capsys.readouterr().err == "loading PyTorch ...\n" and announcer not in sys.meta_path
