"""What commands refuse before they work: two files of one name, files that would be lost, options without effect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

from timm_gac import cli
from timm_gac.cli.inspect import InspectConfig, run_inspect
from timm_gac.cli.sources import open_images
from timm_gac.hub import save_model_folder
from timm_gac.runtime.files import check_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = timm.create_model("test_gac_msresnet", num_classes=10, in_chans=1).eval()
    names = {"label_names": [str(digit) for digit in range(10)]}
    out = save_model_folder(model, tmp_path / "run" / "model")
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    return out.parent


def everything(folder: Path) -> dict[Path, bytes | None]:
    """What lies in a folder: the content of files, None of folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval RUN --data digits --json a.npz --answers ./a.npz", "two files for --json and --answers, got 'a.npz'"),
        ("eval RUN --data digits --data-dir nope", "no data_dir for 'digits', which needs none, got 'nope'"),
        ("energy RUN --data a.png --data-dir nope", "no --data-dir for pictures such as 'a.png', got 'nope'"),
        (
            "eval RUN --data folder --data-dir pictures",
            "classes among 0, 1, 2, 3, 4 and 5 more in 'folder in pictures'",
        ),
        ("predict a.png --model RUN --json text", "a new file, got 'text', which is there: use --overwrite"),
        ("quantize RUN RUN --overwrite", "another folder than the model's for OUT_FOLDER, got"),
        ("quantize RUN RUN/model --overwrite", "another folder than the model's for OUT_FOLDER, got"),
        ("quantize RUN/model RUN --overwrite", "a folder of its own for the model, got the run folder"),
        ("convert text RUN --overwrite", "a folder of its own for the model, got the run folder"),
        (f"quantize {'a' * 300} pictures --overwrite", "a model folder, ORG/NAME on the Hub or a name of"),
        (f"quantize {'a' * 300} new", "a model folder, ORG/NAME on the Hub or a name of"),
        (
            f"train digits --device cpu --out new --init test_ann_resnet.{'a' * 300}",
            "initial weights, got 'test_ann_resnet.aaa",
        ),
        ("push RUN --repo-id a/b --dry-run --out RUN --overwrite", "a folder of its own for what is published, got"),
        ("push nope --repo-id a/b --dry-run", "a model or run folder, got 'nope', which does not exist"),
        ("push nope --repo-id a/b --dry-run --out RUN", "a model or run folder, got 'nope', which does not exist"),
        ("push pictures --repo-id a/b --dry-run", "a model folder with config.json and model.safetensors, or a"),
        ("convert nope push/b", "a checkpoint file, got 'nope', which is none"),
        ("gain text --against text", "a file of `timm-gac eval --answers`, got 'text': it is no .npz file"),
        ("gate RUN --data digits --no-replace --calibration-images 5", "--replace for --calibration-images"),
        ("train digits --device cpu --out text", "a folder for --out, got 'text', a file or below one"),
        ("train digits --device cpu --out text/run", "a folder for --out, got 'text/run', a file or below one"),
        ("train digits --device cpu --out new --results run", "a file for a table, got the folder 'run'"),
        ("train digits --device cpu --out new/run --trackers nope", "trackers among aim, all,"),
        ("train digits --device cpu --out new/run --model nope", "a model of this package"),
        ("anytime RUN --data digits --confidences", "confidences above 0 and at most 1, got none"),
    ],
)
def test_refused(
    arguments: str,
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("{}")
    Path("push/b").mkdir(parents=True)  # where `push --repo-id a/b --dry-run` writes
    Path("push/b/README.md").write_text("of an earlier time")
    Path("pictures/test/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("pictures/test/cat/a.png")
    before = everything(tmp_path)
    assert cli.main(arguments.replace("RUN", str(folder)).split()) == 2
    assert f"timm-gac: expected {said}" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_predict_replaces_a_file_where_told(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    assert cli.main(["predict", "no.png", "--model", str(folder), "--json", str(file), "--overwrite"]) == 1
    assert len(json.loads(file.read_text())["skipped"]) == 1


def test_anytime_opens_the_second_network_before_it_measures_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["anytime", str(folder), "--data", "digits", "--images", "4", "--against", "nope"]) == 2
    captured = capsys.readouterr()
    assert "got 'nope', which is none" in captured.err and captured.out == ""


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"table.csv to be a table \(CSV\), got another file: choose another$"):
        check_csv(tmp_path / "table.csv", ["a"])


@pytest.mark.parametrize("command", ["train --help", "--help"])
def test_help_that_nobody_reads_ends_without_a_word(command: str) -> None:
    """As behind ``| head``, or a pager that was left."""
    child = subprocess.Popen(
        [sys.executable, "-m", "timm_gac.cli", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 1


def test_a_network_among_pictures_is_told_from_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "test_gac_msresnet.none", "none.png", "--model", str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "for the network of this name give --model test_gac_msresnet.none" in said and said.count("give --model") == 1
    )


@pytest.mark.parametrize("name", ["neurons.csv", "gate.png", "inspect.json", "index.html"])
def test_inspect_replaces_and_removes_no_file_unasked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="use --overwrite"):
        run_inspect("test_gac_msresnet", "examples/pictures/apple.png", InspectConfig(out=tmp_path))
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("inside", ["", "model"], ids=["run", "model"])
def test_the_folder_of_a_network_is_no_folder_of_pictures(inside: str, folder: Path, capsys) -> None:
    given = folder / inside
    Image.new("RGB", (8, 8)).save(given / "curve.png")
    assert cli.main(["predict", str(given)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"got '{given}', the folder of a network: name pictures, and the network as --model {given}" in error
    with pytest.raises(ValueError, match="the folder of a network: name a folder of pictures here"):
        open_images(str(given), timm.create_model("test_msresnet", num_classes=3), 1)
