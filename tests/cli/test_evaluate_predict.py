"""timm-gac eval and timm-gac predict: against sums by hand, options, files, and what they refuse."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_gac
from timm_gac import cli
from timm_gac.cli.sources import fold_network, open_pictures
from timm_gac.data import load_arrays, open_test_set
from timm_gac.data.arrays import save_arrays
from timm_gac.hub import calibrate, save_model_folder
from timm_gac.hub.config import CONFIG, write_config
from timm_gac.inference.early_exit import early_exit
from timm_gac.inference.predict import answers, predict
from timm_gac.runtime.progress import progress_of

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder for 8x8 digits: random weights, firing neurons, names of the classes."""
    torch.manual_seed(0)
    cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    model = timm.create_model("test_gac_msresnet", num_classes=10, in_chans=1, num_steps=3, pretrained_cfg_overlay=cfg)
    images = load_arrays("digits", "train").images[:64].float() / 127.5 - 1
    calibrate(model, [images])
    out = save_model_folder(model, tmp_path_factory.mktemp("digits") / "model")
    write_config(out / CONFIG, json.loads((out / CONFIG).read_text()) | {"label_names": NAMES})
    return out


@pytest.fixture
def pictures(tmp_path):
    digits = load_arrays("digits", "test").images
    (tmp_path / "inside" / "deeper").mkdir(parents=True)
    files = [tmp_path / "a.png", tmp_path / "inside" / "b.png", tmp_path / "inside" / "deeper" / "c.png"]
    for digit, file in zip(digits, files, strict=False):
        Image.fromarray(digit[0].numpy()).save(file)
    return files


def test_eval_agrees_with_sums_by_hand(folder, tmp_path, capsys):
    file = tmp_path / "out" / "eval.json"
    assert cli.main(["eval", str(folder), "--data", "digits", "--batch-size", "100", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    result = json.loads(file.read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    arrays = load_arrays("digits", "test")
    with torch.no_grad():
        steps = model.forward_steps(arrays.images.float() / 127.5 - 1).double()
    means = torch.stack([steps[:, : t + 1].mean(1) for t in range(3)])
    right = (means.argmax(-1) == arrays.labels).double().mean(1)
    assert result["images"] == 360
    assert result["top1_per_step"] == pytest.approx(right.tolist(), abs=0.006)  # one logit may tie
    assert result["top1"] == result["top1_per_step"][-1]
    top5 = (means[-1].topk(5).indices == arrays.labels[:, None]).any(1).double().mean().item()
    assert result["top5"] == pytest.approx(top5, abs=0.006)
    assert "present_classes" not in result
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(means[-1], arrays.labels).item(), abs=1e-3)
    assert 0 < result["ece"] < 1 and result["num_steps"] == 3 and result["split"] == "test"
    assert f"{result['top1']:.2%}" in text and "top-1 after 2 of 3 steps" in text
    for layer, rate in result["firing_rates"].items():
        assert f"{layer} " in text and f"{rate:.2%}" in text
    assert cli.main(["eval", str(folder), "--data", "digits", "--json", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_set_of_some_classes_is_also_counted_among_these(folder, tmp_path, capsys):
    arrays, file, present = load_arrays("digits", "test"), tmp_path / "eval.json", torch.tensor([1, 4, 6, 9])
    some = torch.isin(arrays.labels, present)
    images, labels = arrays.images[some], arrays.labels[some]
    save_arrays(tmp_path / "four.npz", {"x_test": images, "y_test": labels, "label_names": np.array(NAMES)})
    assert cli.main(["eval", str(folder), "--data", str(tmp_path / "four.npz"), "--json", str(file)]) == 0
    with torch.no_grad():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        logits = model(images.float() / 127.5 - 1)
    right = (present[logits[:, present].argmax(1)] == labels).double().mean().item()
    result = json.loads(file.read_text())
    assert result["top1_among_present_classes"] == pytest.approx(right, abs=0.01) and result["present_classes"] == 4
    text = capsys.readouterr().out
    assert result["top1"] < right
    assert "among the set's 4 classes " in text and f"{result['top1_among_present_classes']:.2%}" in text


def test_eval_takes_some_images_and_other_precisions(folder, tmp_path):
    file = tmp_path / "eval.json"
    common = ["eval", str(folder), "--data", "digits", "--images", "7", "--json", str(file), "--overwrite"]
    results = {}
    for precision in ("float32", "bfloat16"):
        assert cli.main([*common, "--precision", precision, "--no-firing-rates"]) == 0
        results[precision] = json.loads(file.read_text())
    assert [row["images"] for row in results.values()] == [7, 7]
    assert results["float32"]["firing_rates"] == {}
    assert results["float32"]["loss"] != results["bfloat16"]["loss"]
    assert results["float32"]["loss"] == pytest.approx(results["bfloat16"]["loss"], rel=0.2)


def test_a_folder_of_large_pictures_is_streamed_as_predict_prepares_them(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "val" / label).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(256, size=(90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / label / f"{number}.png")
    model = timm.create_model("test_gac_msresnet", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 80, 80)})
    options = {"num_classes": 2, "data_dir": str(tmp_path), "batch_size": 4}
    batches = list(open_test_set("folder", model.pretrained_cfg, **options).batches(0))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    files = sorted((tmp_path / "val").rglob("*.png"))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(images, open_pictures(files, model), rtol=0, atol=1e-3)
    some = open_test_set("folder", model.pretrained_cfg, images=2, **options)
    assert some.num_images == 2
    ((images_of_some, labels_of_some),) = some.batches(0)
    torch.testing.assert_close(images_of_some, images[[0, 3]], rtol=0, atol=0)
    assert labels_of_some.tolist() == [0, 1]
    assert some.present_classes is None
    names = ["bird", "dog", "cat"]
    of_more = open_test_set("folder", model.pretrained_cfg, **options | {"num_classes": 3, "label_names": names})
    assert of_more.present_classes == [1, 2]
    with pytest.raises(ValueError, match="at most the network's 1 classes"):
        open_test_set("folder", model.pretrained_cfg, **options | {"num_classes": 1})


@pytest.mark.parametrize(("given", "size"), [([], 32), (["--batch-size", "5"], 5)])
def test_batches_of_eval_on_a_cpu_are_small(given, size, folder, monkeypatch):
    """The first sign of progress comes with the first batch: 256 images of 32x32 took a network 48 s on two cores."""
    sizes = []
    opened = timm_gac.data.open_test_set

    def spy(*arguments, batch_size, **options):
        sizes.append(batch_size)
        return opened(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(timm_gac.data, "open_test_set", spy, raising=False)
    assert cli.main(["eval", str(folder), "--data", "digits", "--images", "7", "--device", "cpu", *given]) == 0
    assert sizes == [size]


def test_predict_agrees_with_the_network(folder, pictures, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    file = tmp_path / "out.json"
    given = [str(pictures[0]), str(bad), str(tmp_path / "inside"), str(tmp_path / "gone.png")]
    status = cli.main(["predict", *given, "--model", str(folder), "--top", "3", "--per-step", "--json", str(file)])
    assert status == 1  # two of the files could not be used
    text = capsys.readouterr().out
    assert text.count("skipped: expected a picture") == 2 and "after 2 of 3 steps" in text
    assert text.splitlines()[0] == f"{folder}, T=3, {len(NAMES)} classes"
    content = json.loads(file.read_text())
    assert list(content["pictures"]) == list(map(str, pictures)) and len(content["skipped"]) == 2
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = load_arrays("digits", "test").images[:3].float() / 127.5 - 1
    with torch.no_grad():
        steps = model.forward_steps(images).double()
    for index, row in enumerate(content["pictures"].values()):
        confidence, classes = steps[index].mean(0).softmax(-1).topk(3)
        assert row["classes"] == classes.tolist() and row["steps"] == 3
        assert row["names"] == [NAMES[number] for number in row["classes"]]
        assert row["confidences"] == pytest.approx(confidence.tolist(), abs=1e-4)
        first = steps[index, 0].softmax(-1)
        assert row["per_step"][0]["class"] == int(first.argmax())
        assert row["per_step"][0]["confidence"] == pytest.approx(first.max().item(), abs=1e-4)
        assert all(f"{value:.2%}" in text for value in row["confidences"])
    assert cli.main(["predict", str(pictures[0]), "--model", str(folder)]) == 0


def test_predict_exits_when_it_is_sure(folder, pictures, tmp_path, capsys):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        steps = model.forward_steps(load_arrays("digits", "test").images[:3].float() / 127.5 - 1)
    first = early_exit(steps[:, :1], 1.0).confidence.sort().values
    threshold = ((first[1] + first[2]) / 2).item()  # one picture is as sure after one step
    expected = early_exit(steps, threshold)
    assert expected.steps.min() == 1 < expected.steps.max()
    file = tmp_path / "out.json"
    given = ["predict", *map(str, pictures), "--model", str(folder), "--exit", str(threshold), "--per-step"]
    assert cli.main([*given, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["exit"] == threshold
    for index, row in enumerate(content["pictures"].values()):
        assert row["steps"] == expected.steps[index] == len(row["per_step"]) and row["num_steps"] == 3
        assert row["classes"][0] == expected.logits[index].argmax()
        assert row["confidences"][0] == pytest.approx(expected.confidence[index].item(), abs=1e-4)
        assert f"exit after {row['steps']} of 3 steps: {row['names'][0]}" in text
    assert text.count("after 1 of 3 steps") == 3 + 1  # per step for all three, and one exit
    (row,) = predict(model, torch.zeros(1, 1, 8, 8), exit_at=1e-9)
    assert (row.steps, row.num_steps) == (1, 3)


def test_folding_changes_no_answer(folder, pictures, tmp_path, monkeypatch, caplog):
    folded = []
    fuse = timm_gac.fuse_for_inference
    monkeypatch.setattr("timm_gac.inference.fold.fuse_for_inference", lambda network: folded.append(1) or fuse(network))
    results = {}
    for command in (["eval", str(folder), "--data", "digits"], ["predict", str(pictures[0]), "--model", str(folder)]):
        for options in ([], ["--no-fold"], ["--precision", "bfloat16"]):
            file = tmp_path / f"{command[0]}{''.join(options)}.json"
            folded.clear()
            caplog.clear()
            with caplog.at_level("INFO"):
                assert cli.main([*command, *options, "--json", str(file)]) == 0
            assert ("batch norms are folded" in caplog.text) == (not options)
            assert len(folded) == (not options)  # the published bfloat16 figures are of networks that are not folded
            results[(command[0], *options)] = json.loads(file.read_text())
    one, other = results[("eval",)], results[("eval", "--no-fold")]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
    assert one["top1"] == pytest.approx(other["top1"], abs=0.006)
    assert one["firing_rates"] == pytest.approx(other["firing_rates"], abs=1e-3)
    (one,), (other,) = (results[key]["pictures"].values() for key in (("predict",), ("predict", "--no-fold")))
    assert one["classes"] == other["classes"]
    assert one["confidences"] == pytest.approx(other["confidences"], abs=1e-4)


def test_a_quantised_network_is_not_tried_to_fold(folder, tmp_path, pictures, caplog):
    quantised = tmp_path / "quantised"
    assert cli.main(["quantize", str(folder), str(quantised)]) == 0
    with caplog.at_level("INFO"):
        assert cli.main(["predict", str(pictures[0]), "--model", str(quantised)]) == 0
    assert "runs as it is" not in caplog.text


def test_a_network_that_cannot_be_folded_runs_as_it_is(caplog):
    network = timm.create_model("test_gac_msresnet", num_classes=3).eval()
    network.layer1[0].conv1 = torch.nn.Sequential(network.layer1[0].conv1)
    with caplog.at_level("INFO"):
        assert fold_network(network, "float32") is network
    assert "runs as it is" in caplog.text


def test_predict_wants_a_picture(folder, capsys):
    assert cli.main(["predict", "--model", str(folder)]) == 2
    assert "expected at least one picture" in capsys.readouterr().err


def test_names_in_brackets_are_shown_as_they_are(folder, pictures, tmp_path, capsys):
    """As Rich's markup one would vanish, one be an error, and one be a style."""
    name = "a[old][/x][bold]b"
    model = tmp_path / name
    shutil.copytree(folder, model)
    out = tmp_path / f"{name} out"
    picture = tmp_path / f"{name}.png"
    shutil.copy(pictures[0], picture)
    commands = {
        "eval": ["eval", str(model), "--data", "digits", "--images", "4", "--json", str(out / "e.json")],
        "predict": ["predict", str(picture), "--model", str(model)],
        "inspect": ["inspect", str(model), str(picture), "--out", str(out / "inspect")],
        "energy": ["energy", str(model), "--data", str(picture), "--out", str(out / "energy")],
        "anytime": ["anytime", str(model), "--data", "digits", "--images", "4", "--out", str(out / "anytime")],
        "quantize": ["quantize", str(model), str(out / "quantised")],
        "verify": ["verify", str(out / "quantised")],
    }
    for command, arguments in commands.items():
        assert cli.main(arguments) in (0, 2), command  # nothing but a refusal or an answer
        captured = capsys.readouterr()
        assert name in captured.out + captured.err and "Traceback" not in captured.err, command


def test_pictures_that_cannot_be_used_are_left_out_of_a_folder(folder, pictures, tmp_path, caplog):
    (tmp_path / "inside" / "bad.png").write_bytes(b"no picture")
    with caplog.at_level("WARNING"):
        assert cli.main(["energy", str(folder), "--data", str(tmp_path / "inside")]) == 0
    assert "skipped" in caplog.text and "bad.png" in caplog.text
    for picture in pictures[1:]:
        picture.unlink()
    assert cli.main(["energy", str(folder), "--data", str(tmp_path / "inside")]) == 2


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys):
    with progress_of("evaluating", 10, seconds=0) as advance:
        advance(4)
        advance(6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["evaluating: 4 of 10", "evaluating: 10 of 10"]
    with progress_of("evaluating", 10) as advance:  # done before the first line is due
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_answers_by_hand_and_classes_without_a_name():
    logits = torch.tensor([[[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]]])
    (row,) = answers(logits, 5, ("a",))
    mean = torch.tensor([1.5, 0.5, 0.0]).softmax(0)
    assert row.classes == (0, 1, 2) and row.names == ("a", "1", "2")
    assert row.confidences == pytest.approx(mean.tolist(), abs=1e-6)
    assert [number for number, _ in row.per_step] == [1, 0]
    with pytest.raises(ValueError, match="top"):
        predict(timm.create_model("test_gac_msresnet").eval(), torch.zeros(1, 3, 8, 8), top=0)
    with pytest.raises(ValueError, match="forward_steps"):
        predict(torch.nn.Identity(), torch.zeros(1))


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "test_gac_msresnet", "--data", "digits"],
        ["eval", "no_such_model", "--data", "digits"],
        ["eval", "FOLDER", "--data", "no_such.npz"],
        ["eval", "FOLDER", "--data", "digits", "--batch-size", "0"],
        ["eval", "FOLDER", "--data", "digits", "--device", "cuda:99"],
        ["eval", "FOLDER", "--data", "digits", "--num-steps", "9"],
        ["predict", "a.png", "--model", "test_gac_msresnet"],
        ["predict", "a.png", "--model", "FOLDER", "--top", "0"],
        ["predict", "a.png", "--model", "FOLDER", "--exit", "0"],
        ["predict", "a.png", "--model", "FOLDER", "--exit", "1.5"],
    ],
)
def test_refusals_are_one_sentence(arguments, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(folder) if part == "FOLDER" else part for part in arguments]
    try:
        status = cli.main(given)
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    captured = capsys.readouterr()
    assert "expected" in captured.err and "Traceback" not in captured.err and not list(tmp_path.iterdir())
