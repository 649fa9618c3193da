"""The command line: help, what it lists, and errors in one sentence."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import timm

from timm_gac import benchmark, cli, hub


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ["demo", "convert", "models", "push", "verify", "bench"]),
        (["demo"], ["--out", "--epochs", "--seed"]),
        (["convert"], ["FILE", "OUT_FOLDER", "--num-classes", "--overwrite"]),
        (["quantize"], ["MODEL", "OUT_FOLDER", "--clip", "--overwrite"]),
        (["bench"], ["kernels", "model"]),
        (["bench", "kernels"], ["--ops", "--quick", "--csv"]),
        (["bench", "model"], ["--providers", "--num-steps", "--profile"]),
        (["models"], ["PATTERN"]),
        (["push"], ["RUN_OR_FOLDER", "--repo-id", "--dry-run", "--overwrite", "--label-names"]),
        (["verify"], ["REPO_OR_FOLDER", "--revision"]),
        (["energy"], ["MODEL", "--data", "--costs", "--num-steps", "--out"]),
        (["inspect"], ["MODEL", "IMAGE", "--images", "--num-steps", "--out"]),
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
    assert [name for name in timm.list_models(module="spiking_resnet") if f"{name} " not in text] == []
    row = next(line for line in text.splitlines() if line.split()[:1] == ["gac_msresnet34"])
    assert row.split() == ["gac_msresnet34", "GAC", "ImageNet", "21,932,984", "4", "1000", "3x224x224"]


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
        ["bench", "kernels", "--ops", "no_such_op"],
        ["bench", "model", "--providers", "no_such_network"],
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


def test_unknown_subcommand_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["frobnicate"])
    assert leaving.value.code == 2


def test_convert_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []

    def convert(file: Path, out: Path, *options: Any) -> Path:
        calls.append((file, out, *options))
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
    assert "'sklearn'" in errors and "install timm-gac[demo]" in errors
