"""The command line: arguments, paths, one sentence for an error; the commands models, convert and bench."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import timm_gac
from shell import COMMANDS
from timm_gac import cli, hub
from timm_gac.bench import kernels as benchmark
from timm_gac.cli.main import COMMANDS as FUNCTIONS
from timm_gac.models.build import registered_names
from timm_gac.runtime.arguments import PATHS
from timm_gac.train.options import RunOptions
from timm_gac.train.recipes import Recipe


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
