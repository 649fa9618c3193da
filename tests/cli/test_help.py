"""The help of each command."""

from __future__ import annotations

import re

import pytest

from shell import COMMANDS
from timm_gac import cli


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
