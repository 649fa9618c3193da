"""The command line: help, what it lists, and errors in one sentence."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import re
import resource
import statistics
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import timm_gac
from timm_gac import cli, hub
from timm_gac.bench import kernels as benchmark
from timm_gac.cli.main import COMMANDS as FUNCTIONS
from timm_gac.cli.main import _Announcer
from timm_gac.models.build import registered_names
from timm_gac.runtime.arguments import PATHS
from timm_gac.train.options import RunOptions
from timm_gac.train.recipes import Recipe
from warm import WarmPython

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *(
        "demo",
        "models",
        "data",
        "train",
        "eval",
        "predict",
        "inspect",
        "energy",
        "anytime",
        "gate",
        "compare",
        "gain",
        "convert",
        "quantize",
        "export",
        "push",
    ),
    *("verify", "bench", "bench kernels", "bench model", "bench loops", "bench scaling", "bench curves"),
)
HEAVY = {"torch", "timm", "accelerate", "matplotlib", "triton", "sklearn"}


def source_paths() -> dict[str, str]:
    """The environment with this checkout's packages first."""
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=source_paths())
    assert done.returncode == 0, done.stderr
    return done


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages in what ``python -X importtime`` wrote."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch(command: str) -> None:
    done = run_python("-X", "importtime", "-m", "timm_gac.cli", *command.split(), "--help")
    assert "tyro" in imported(done) and not imported(done) & HEAVY
    if command and command != "bench":
        assert "Example: timm-gac " + command in " ".join(done.stdout.split())


def test_help_lists_each_command_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], ["bench"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, "--help"])
        text = capsys.readouterr().out
        lines = re.findall(r"^[^\w\n]+(\w+) +(\w.*?)[ │]*$", text.partition("(required)")[2], re.MULTILINE)
        listed = {" ".join([*words, name]) for name, _ in lines}
        assert listed == {name for name in COMMANDS if name.split()[:-1] == words}
        assert all(line.endswith(".") for _, line in lines), lines


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


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_an_empty_word_is_not_the_current_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.split()
    for given, before, kind in (
        ([""], words[-1], "a path or a name"),
        (["--out", ""], "--out", "a path"),
        (["--json="], "--json", "a path"),
        (["--data_dir", ""], "--data_dir", "a path"),
        (["--against", "a.npz", ""], "a.npz", "a path"),
        (["--device", ""], "--device", "a value"),
    ):
        assert cli.main([*words, *given]) == 2
        assert f"expected {kind} after '{before}', got an empty word: give one" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_every_option_that_takes_a_path_is_known_as_one() -> None:
    """Options of all commands whose values are annotated as paths, and those that take a path as a word too."""
    configs = [RunOptions, Recipe]
    options = {"data", "data_dir", "init", "teacher", "label_names", "plugin"}
    for place in FUNCTIONS.values():
        module, _, function = place.partition(":")
        command = getattr(importlib.import_module(f"timm_gac.cli.{module}"), function)
        hints = get_type_hints(command, include_extras=True)
        configs += [hint.__origin__ for hint in hints.values() if is_dataclass(getattr(hint, "__origin__", None))]
        options |= {name for name, hint in hints.items() if "Path" in str(hint) and "Positional" not in str(hint)}
    for config in configs:
        options |= {field.name for field in fields(config) if "Path" in str(field.type)}
    assert sorted(f"--{name.replace('_', '-')}" for name in options) == sorted(PATHS)


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


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ["demo", "convert", "models", "push", "verify", "bench"]),
        (["demo"], ["--out", "--epochs", "--seed"]),
        (["convert"], ["FILE", "OUT_FOLDER", "--num-classes", "--overwrite"]),
        (["train"], ["RECIPE", "--epochs", "--no-flip", "--out", "--resume"]),
        (["eval"], ["MODEL", "--data", "--data-dir", "--split", "--images", "--device"]),
        (["predict"], ["IMAGE", "--model", "--exit", "--device"]),
        (["bench", "loops"], ["--only", "--timm-train", "--seconds"]),
        (["bench", "scaling"], ["--processes", "--check"]),
        (["bench", "curves"], ["--seeds", "--data"]),
        (["quantize"], ["MODEL", "OUT_FOLDER", "--clip", "--overwrite"]),
        (["export"], ["MODEL", "OUT.{nir,onnx,pt2}", "--num-steps", "--batch-size", "--fold", "--overwrite"]),
        (["bench"], ["kernels", "model"]),
        (["bench", "kernels"], ["--ops", "--quick", "--csv"]),
        (["bench", "model"], ["--providers", "--num-steps", "--profile"]),
        (["models"], ["PATTERN"]),
        (["push"], ["RUN_OR_FOLDER", "--repo-id", "--dry-run", "--overwrite", "--label-names"]),
        (["verify"], ["REPO_OR_FOLDER", "--revision"]),
        (["energy"], ["MODEL", "--data", "--costs", "--num-steps", "--out"]),
        (["inspect"], ["MODEL", "IMAGE", "--images", "--num-steps", "--out"]),
        (["gate"], ["MODEL", "--data", "--no-replace", "--calibration-images", "--json"]),
        (["compare"], ["MODEL", "--data", "--formats", "--json"]),
        (["gain"], ["FILE", "--against", "--draws"]),
        (["anytime"], ["MODEL", "--data", "--against", "--confidences", "--out"]),
    ],
    ids=lambda value: "-".join(value) or "top" if isinstance(value, list) else None,
)
def test_help(arguments: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([*arguments, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in shown if word not in text] == []


def test_models_lists_every_model_with_its_parameters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert [name for name in registered_names() if f"{name} " not in text] == []
    row = next(line for line in text.splitlines() if line.split()[:1] == ["ann_resnet18_cifar"])
    assert row.split() == ["ann_resnet18_cifar", "ANN", "-", "12,548,260", "-", "100", "3x32x32", "-"]
    row = next(line for line in text.splitlines() if line.split()[:1] == ["gac_msresnet34"])
    assert row.split() == [
        "gac_msresnet34",
        "GAC",
        "ImageNet",
        "21,932,984",
        "4",
        "1000",
        "3x224x224",
        "in293,",
        "tiny_imagenet",
    ]
    row = next(line for line in text.splitlines() if line.split()[:1] == ["gac_msresnet18_cifar"])
    assert row.split()[-1] == "cifar100"
    assert max(map(len, text.splitlines())) <= 100


def test_models_takes_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "test_gac*"]) == 0
    text = capsys.readouterr().out
    assert "test_gac_msresnet" in text and "msresnet34" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "no_such_model"],
        ["convert", "no_such_file.pth", "folder"],
        ["demo", "--epochs", "0"],
        ["push", "no_such_folder", "--repo-id", "me/x"],
        ["push", "no_such_folder", "--repo-id", "x", "--dry-run"],
        ["verify", "no_such_folder"],
        ["energy", "no_such_model", "--data", "digits"],
        ["energy", "test_gac_msresnet", "--data", "digits", "--costs", "x"],
        ["inspect", "test_gac_msresnet", "no_such_picture.png"],
        ["anytime", "test_gac_msresnet", "--data", "no_such_file.npz"],
        ["gate", "msresnet18_cifar", "--data", "digits"],
        ["compare", "test_gac_msresnet", "--data", "digits"],
        ["gain", "no_such_file.npz", "--against", "no_such_file.npz"],
        ["bench", "kernels", "--ops", "no_such_op"],
        ["bench", "model", "--providers", "no_such_network"],
        ["bench", "loops", "--only", "no_such_loop"],
        ["bench", "curves", "--seeds", "1"],
        ["train", "cifar100", "--epochs", "0"],
        ["export", "no_such_model", "a.pt2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_user_errors_are_one_sentence(
    arguments: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    captured = capfd.readouterr()
    assert "expected" in captured.err and "Traceback" not in captured.err
    assert captured.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "frobnicate"),
        (["bench", "frobnicate"], "frobnicate"),
        (["train", "no_such_recipe"], "no_such_recipe"),
        (["train", "cifar100", "--no-such-field", "1"], "--no-such-field"),
        (["train", "cifar100", "--epochs", "many"], "many"),
        (["energy", "test_gac_msresnet", "--data", "digits", "--split", "none"], "none"),
    ],
)
def test_what_cannot_be_parsed_is_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trian"], "'train'"),
        (["evaluate"], "'eval'"),
        (["bench", "kernel"], "'kernels'"),
        (["train", "cifar1000"], "'cifar100'"),
    ],
)
def test_a_misspelled_name_gets_the_nearest(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    captured = capsys.readouterr()
    assert f"got {arguments[-1]!r} (did you mean {meant}" in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"timm-gac {timm_gac.__version__}\n"


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


LATE = [
    ["demo", "--out", "OUT"],
    ["energy", "test_gac_msresnet", "--data", "digits", "--out", "OUT"],
    ["inspect", "test_gac_msresnet", "a.png", "--out", "OUT"],
    ["anytime", "test_gac_msresnet", "--data", "digits", "--out", "OUT"],
    ["eval", "test_gac_msresnet", "--data", "digits", "--json", "OUT/a.json"],
    ["gate", "test_gac_msresnet", "--data", "digits", "--json", "OUT/a.json"],
    ["predict", "a.png", "--model", "test_gac_msresnet", "--json", "OUT/a.json"],
    ["convert", "a.pth", "OUT"],
    ["quantize", "test_gac_msresnet", "OUT"],
]


@pytest.mark.parametrize("out", ["/proc/nowhere", "FILE/below"])
@pytest.mark.parametrize("arguments", LATE, ids=lambda arguments: arguments[0])
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list[str], out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_gac.hub.open_network", None)  # opening a network is work already
    monkeypatch.setattr("timm_gac.hub.convert_checkpoint", None)
    monkeypatch.setattr("timm_gac.cli.digits.train", None)
    (tmp_path / "file").touch()
    place = out.replace("FILE", str(tmp_path / "file"))
    assert cli.main([word.replace("OUT", place) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert "choose another" in error and error.count("\n") == 1 and [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("arguments", LATE[:4], ids=lambda arguments: arguments[0])
def test_a_missing_package_is_said_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_gac.hub.open_network", None)
    monkeypatch.setattr("timm_gac.cli.digits.train", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([word.replace("OUT", str(tmp_path / "out")) for word in arguments]) == 2
    assert "'matplotlib'" in (error := capsys.readouterr().err) and "pip install matplotlib" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "missing", "end"),
    [
        (
            ["demo"],
            ("matplotlib", "sklearn", "accelerate"),
            "packages 'matplotlib', 'sklearn', 'accelerate' for this, got none: "
            "pip install matplotlib scikit-learn accelerate\n",
        ),
        (["demo"], ("sklearn",), "package 'sklearn' for this, got none: pip install scikit-learn\n"),
        (
            ["export", "test_gac_msresnet", "a.onnx"],
            ("onnx", "onnxscript", "onnxruntime"),
            "packages 'onnx', 'onnxscript', 'onnxruntime' for this, got none: pip install \"timm-gac[export]\"\n",
        ),
    ],
    ids=["demo", "one", "extra"],
)
def test_all_missing_packages_are_named_at_once(
    given: list[str],
    missing: tuple[str, ...],
    end: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    monkeypatch.chdir(tmp_path)
    assert cli.main(given) == 2
    assert capsys.readouterr().err.endswith(end)


def test_convert_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []

    def convert(file: Path, out: Path, **options: Any) -> Path:
        calls.append((file, out, *options.values()))
        return out

    monkeypatch.setattr(hub, "convert_checkpoint", convert)
    assert cli.main(["convert", "a.pth", "b", "--model", "gac_msresnet34", "--num-classes", "10", "--overwrite"]) == 0
    assert calls == [(Path("a.pth"), Path("b"), "gac_msresnet34", 10, None, True)]
    assert "local-dir:b" in capsys.readouterr().out


def test_bench_kernels_reports_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[benchmark.KernelBenchConfig] = []
    row = dict.fromkeys(benchmark.COLUMNS) | {"op": "lif", "status": "failed check"}

    def measure(config: benchmark.KernelBenchConfig) -> list[dict[str, Any]]:
        configs.append(config)
        return [row]

    monkeypatch.setattr(benchmark, "bench_kernels", measure)
    assert cli.main(["bench", "kernels", "--ops", "lif", "--quick"]) == 1
    assert configs == [benchmark.KernelBenchConfig(ops=("lif",), quick=True)]
    assert "failed check" in capsys.readouterr().out


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    errors = capsys.readouterr().err
    # PyPI's name of the package: an extra of this one is no remedy outside of a clone.
    assert "expected scikit-learn" in errors and "pip install scikit-learn" in errors and "timm-gac[" not in errors


def test_a_line_says_that_pytorch_loads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    announcer = _Announcer()
    monkeypatch.setattr(sys, "meta_path", [announcer, *sys.meta_path])
    for name in ("json", "torch"):
        announcer.find_spec(name, None)
    assert capsys.readouterr().err == "loading PyTorch ...\n" and announcer not in sys.meta_path
