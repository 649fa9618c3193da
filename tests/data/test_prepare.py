"""Folders of images made into the trainer's .npz: classes, labels, duplicates, and what a user gets wrong."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_gac.cli import main
from timm_gac.data import load_arrays
from timm_gac.data.arrays import ImageArrays
from timm_gac.data.prepare import find_matches, list_images, prepare_images
from warm import WarmPython

CLASSES = ("n01", "n02")


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """Colours that change smoothly, so that it survives another size and JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=95)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """As Tiny-ImageNet-200 is distributed, with a stray class and files that are no images."""
    folder, lines = tmp_path / "tiny", []
    for number, label in enumerate((*CLASSES, "n02480855")):
        for index in range(3):
            save(picture(10 * number + index), folder / "train" / label / "images" / f"{label}_{index}.JPEG")
        (folder / "train" / label / f"{label}_boxes.txt").write_text("0 0 1 1\n")
        save(picture(10 * number + 5), folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{label}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "train" / ".DS_Store").write_text("")
    (folder / "words.txt").write_text("n01\ttench, Tinca tinca\nn03\tbrambling\n")
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A set in folders that shares a class with `tiny` and has its first validation image to train on."""
    folder = tmp_path / "other"
    for number, label in enumerate(("n02", "n03")):
        for index in range(2):
            save(picture(100 + 10 * number + index, (80, 60)), folder / "train" / label / f"{index}.jpg")
        save(picture(105 + 10 * number, (60, 80)), folder / "val" / label / "0.png")
    save(picture(5).resize((90, 90), Image.Resampling.BICUBIC), folder / "train" / "n02" / "twin.jpg")
    return folder


def test_tiny_imagenet_is_listed_without_stray_classes(tiny: Path) -> None:
    images = list_images(tiny)
    assert [(image.split, image.label) for image in images] == [
        *[("train", "n01")] * 3, *[("train", "n02")] * 3, ("test", "n01"), ("test", "n02"),
    ]  # fmt: skip
    assert {image.source for image in images} == {"tiny"}
    assert all(image.file.is_file() for image in images)


def test_matches_are_found_across_sizes_and_sets(tiny: Path, other: Path) -> None:
    images = [*list_images(tiny), *list_images(other)]
    matches = find_matches(images, num_workers=1)
    assert [(images[match.train].file.name, images[match.test].file.name) for match in matches] == [
        ("twin.jpg", "val_0.JPEG")
    ]
    assert matches[0].similarity > 0.995
    assert len(find_matches(images, similarity=-1)) == 11 * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_union_is_written_as_the_trainer_reads_it(tiny: Path, other: Path, tmp_path: Path, num_workers: int) -> None:
    out = tmp_path / "union.npz"
    report = prepare_images([tiny, other], out, size=24, num_workers=num_workers)
    train, test = load_arrays(str(out), "train"), load_arrays(str(out), "test")
    assert train.label_names == ("n01 tench, Tinca tinca", "n02", "n03 brambling")
    assert train.images.shape == (10, 3, 24, 24) and test.images.shape == (4, 3, 24, 24)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert test.labels.tolist() == [0, 1, 1, 2]
    expected = np.asarray(Image.open(tiny / "train" / "n01" / "images" / "n01_1.JPEG").resize((24, 24), 3))
    assert np.array_equal(train.images[1].numpy().transpose(1, 2, 0), expected)
    wide = Image.open(other / "train" / "n02" / "0.jpg").resize((32, 24), 3).crop((4, 0, 28, 24))
    assert np.array_equal(train.images[6].numpy().transpose(1, 2, 0), np.asarray(wide))
    for name, part in (("tiny", test.images[:2]), ("other", test.images[2:])):
        of_source = load_arrays(str(tmp_path / f"union.{name}.npz"), "test")
        assert torch.equal(of_source.images, part) and of_source.label_names == train.label_names
    assert report == json.loads((tmp_path / "union.json").read_text())
    assert report["found"] == {"other test": 2, "other train": 5, "tiny test": 2, "tiny train": 6}
    assert report["kept"] == report["found"] | {"other train": 4}
    assert [(entry["train"], entry["test"]) for entry in report["left_out"]] == [
        ("other/n02/twin.jpg", "tiny/n01/val_0.JPEG")
    ]


def test_the_command_says_what_was_left_out(
    tiny: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out" / "union.npz"
    arguments = ["data", "in293", str(tiny), str(other), str(out), "--size", "16", "--num-workers", "0"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "other train: 5 images, 1 left out" in said and "tiny train: 6 images\n" in said
    assert "3 classes at 16x16" in said and "the test images of each folder: " in said
    assert main(arguments) == 2
    assert "use --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--similarity", "1"]) == 0
    assert len(load_arrays(str(out), "train").labels) == 11
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_cifar_is_taken_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(2 * 3 * 32 * 32).remainder(256).byte().view(2, 3, 32, 32)

    def known(data: str, split: str, *, data_dir: str) -> ImageArrays:
        assert (data, data_dir) == ("torch/cifar10", str(tmp_path))
        return ImageArrays(images if split == "train" else images.flip(0), torch.tensor([3, 9]))

    monkeypatch.setattr("timm_gac.data.arrays.load_arrays", known)
    assert main(["data", "cifar10", str(tmp_path), str(tmp_path / "c.npz")]) == 0
    test = load_arrays(str(tmp_path / "c.npz"), "test")
    assert torch.equal(test.images, images.flip(0)) and test.labels.tolist() == [3, 9]
    assert test.label_names[3] == "cat" and len(test.label_names) == 10


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["tiny"], "the file to write"),
        (["tiny", "set.npy"], "ending in .npz"),
        (["nowhere", "set.npz"], "no such folders"),
        (["tiny", "link/../below/tiny", "set.npz"], "different names"),
        (["tiny", "tiny", "set.npz"], "got one twice"),
        (["broken", "set.npz"], "cannot be read as one"),
        (["empty", "set.npz"], "images to test on"),
        (["tiny", "link", "set.npz"], "got one twice"),
        (["tiny", "spelled", "set.npz"], "one spelling of each class, got N01, n01"),
        (["loose", "set.npz"], "got 1 beside them (0.png)"),
        (["tiny", "set.npz", "--similarity", "1e-9"], "expected training images that match no test image"),
        (["tiny", "set.npz", "--similarity=nan"], "similarity above 0"),
        (["tiny", "set.npz", "--size", "0"], "size of at least 1"),
        (["tiny", "set.npz", "--size", "1000000"], "up to 4096"),
        (["tiny", "set.npz", "--similarity", "2"], "similarity above 0"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    tiny: Path, tmp_path: Path, paths: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    for name in ("broken", "empty"):
        save(picture(1), tmp_path / name / "train" / "n01" / "0.jpg")
        (tmp_path / name / "val" / "n01").mkdir(parents=True)
    (tmp_path / "broken" / "val" / "n01" / "0.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "link").symlink_to("tiny")
    for split in ("train", "val"):
        save(picture(4), tmp_path / "below" / "tiny" / split / "n01" / "0.jpg")
    for name, label in (("spelled", "N01"), ("loose", "n01")):
        save(picture(1), tmp_path / name / "train" / label / "0.jpg")
        save(picture(2), tmp_path / name / "val" / label / "0.jpg")
    save(picture(3), tmp_path / "loose" / "train" / "0.png")
    places = [str(tmp_path / path) if not path.startswith("-") and not path[0].isdigit() else path for path in paths]
    assert main(["data", "any", *places, "--num-workers", "0"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set.npz").exists()


def test_files_beside_the_set_are_replaced_only_when_asked(
    tiny: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("set.json", "set.other.npz"):
        kept, out = tmp_path / name, tmp_path / "set.npz"
        kept.write_text("mine")
        arguments = ["data", "any", str(tiny), str(other), str(out), "--size", "16", "--num-workers", "0"]
        assert main(arguments) == 2 and kept.read_text() == "mine" and not out.exists()
        assert f"{name}', which is there: use --overwrite" in capsys.readouterr().err
        kept.unlink()


def test_pictures_are_found_as_the_trainer_finds_them(tmp_path: Path) -> None:
    """In folders below a class's and by its suffixes; hidden files, links to nothing and links in a circle are none."""
    train = tmp_path / "set" / "train" / "n01"
    for name in ("0.jpg", "below/1.png", "2.TIF", ".3.jpg"):
        save(picture(1), train / name)
    save(picture(2), tmp_path / "set" / "val" / "n01" / "0.jpg")
    (train / "gone.jpg").symlink_to("nowhere")
    (train / "circle").symlink_to("..")
    (train / "folder.jpg").mkdir()
    (tmp_path / "set" / "train" / "again").symlink_to("..")
    found = [str(image.file.relative_to(train)) for image in list_images(tmp_path / "set") if image.split == "train"]
    assert found == ["0.jpg", "2.TIF", "below/1.png"]


def test_classes_without_training_images_are_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for file in (tiny / "train" / "n02" / "images").iterdir():
        file.unlink()
    out = tmp_path / "set.npz"
    assert main(["data", "any", str(tiny), str(out), "--size", "16", "--num-workers", "0"]) == 0
    assert "without training images: n02\n" in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())["without_training_images"] == ["n02"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="Windows has no limit of a file's size")
def test_a_full_disk_is_an_error_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    import resource

    out, limits = tmp_path / "full" / "set.npz", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare_images([tiny], out, size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.parent.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals and locks are POSIX's")
def test_what_a_kill_leaves_beside_the_set_goes_with_the_next_try(
    tiny: Path, warm_python: WarmPython, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "set.npz"
    code = f"""
import os, signal
from pathlib import Path
from timm_gac.data import prepare
prepare.save_arrays = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare_images([Path({str(tiny)!r})], Path({str(out)!r}), size=16, num_workers=0)
"""
    assert warm_python(["-c", code]).returncode == -9
    (leftover,) = out.parent.iterdir()
    assert {file.name for file in leftover.iterdir()} == {"train.npy", "test.npy"}
    prepare_images([tiny], out, size=16)
    assert sorted(file.name for file in out.parent.iterdir()) == ["set.json", "set.npz"]


def test_more_workers_than_work_are_not_started(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm_gac.data.prepare as module

    started = list[int]()

    class Pool(module.ProcessPoolExecutor):
        def __init__(self, workers: int) -> None:
            started.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    find_matches(list_images(tiny), num_workers=3000)
    assert started == [1]


@pytest.mark.parametrize("name", ["words.txt", "val/val_annotations.txt"])
def test_a_text_in_another_encoding_is_named(tiny: Path, tmp_path: Path, name: str) -> None:
    (tiny / name).write_bytes("n01\tcafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"UTF-8 in .*{Path(name).name}"):
        prepare_images([tiny], tmp_path / "set.npz", size=16)
