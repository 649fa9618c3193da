"""Pictures and labels: one way to decode, classes by name, caches that may fail, sets that say what is wrong."""

from __future__ import annotations

import json
import logging
import os
import sys
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IterableImageDataset

from fuzz_pictures import KINDS, fuzz
from timm_gac import cli
from timm_gac.cli.sources import open_pictures
from timm_gac.data import create_stream_loaders, load_arrays, open_test_set
from timm_gac.data.dataset import FolderReader, open_dataset
from timm_gac.data.labels import match_labels
from timm_gac.data.pictures import PictureError, find_pictures, plain, read_picture
from timm_gac.train.loop import RunOptions, train
from timm_gac.train.recipes import Recipe


@pytest.fixture
def cfg():
    return dict(timm.create_model("test_gac_msresnet").pretrained_cfg)


def save(file, value=0, size=(12, 12), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = value if isinstance(value, Image.Image) else Image.new("RGB", size, (value, value, value))
    picture.save(file, **options)
    return file


def labels_of(loader):
    return torch.cat([labels for _, labels in loader.batches(0)]).tolist()


# Decoding


def test_odd_and_damaged_pictures_are_read_alike_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counts, failures = fuzz(2 * len(KINDS), seed=1)
    assert failures == [] and counts.total() == 2 * len(KINDS)


def test_values_whose_range_is_unknown_are_refused(tmp_path):
    for values in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        Image.fromarray(values).save(tmp_path / "x.tif")
        with pytest.raises(PictureError, match=r"x\.tif.*8 or 16 bits"):
            read_picture(tmp_path / "x.tif")


def test_a_grey_network_reads_colours_as_predict_does(tmp_path, cfg):
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    for name in "ab":
        save(tmp_path / "val" / name / "x.png", Image.fromarray(pixels))
    grey = cfg | {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
    model = types.SimpleNamespace(pretrained_cfg=grey)
    want = open_pictures([tmp_path / "val" / "a" / "x.png"], model)
    for side in (16, 96):
        model.pretrained_cfg = grey | {"input_size": (1, side, side)}
        want = open_pictures([tmp_path / "val" / "a" / "x.png"], model)
        images, _ = next(
            iter(open_test_set("folder", model.pretrained_cfg, num_classes=2, data_dir=str(tmp_path)).batches(0))
        )
        torch.testing.assert_close(images[:1], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 24), (96, 128)], ids=["in memory", "streamed"])
def test_networks_that_are_not_square_get_their_own_size(tmp_path, cfg, size):
    pixels = np.random.default_rng(0).integers(256, size=(150, 130, 3), dtype=np.uint8)
    file = save(tmp_path / "val" / "a" / "x.png", Image.fromarray(pixels))
    save(tmp_path / "val" / "b" / "x.png", Image.fromarray(pixels))
    wide = cfg | {"input_size": (3, *size), "crop_pct": 0.9}
    images, _ = next(iter(open_test_set("folder", wide, num_classes=2, data_dir=str(tmp_path)).batches(0)))
    assert images.shape == (2, 3, *size)
    want = open_pictures([file], types.SimpleNamespace(pretrained_cfg=wide))
    torch.testing.assert_close(images[:1], want, rtol=0, atol=1e-4)
    np.savez(tmp_path / "a.npz", x_test=pixels[None].transpose(0, 3, 1, 2), y_test=np.zeros(1, np.int64))
    assert load_arrays(str(tmp_path / "a.npz"), "test", image_size=size).images.shape == (1, 3, *size)


def test_the_test_set_of_a_stream_is_cropped_as_the_network_says(tmp_path, cfg):
    pixels = np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)
    for split in ("train", "val"):
        file = save(tmp_path / split / "a" / "x.png", Image.fromarray(pixels))
    wanted = cfg | {"input_size": (3, 48, 48), "crop_pct": 0.8, "interpolation": "bicubic"}
    _, test = create_stream_loaders(
        "folder",
        data_dir=str(tmp_path),
        image_size=48,
        batch_size=1,
        device="cpu",
        mean=wanted["mean"],
        std=wanted["std"],
        augmentation=None,
        num_classes=1,
        seed=0,
        num_workers=0,
        preprocessing=wanted,
    )
    want = open_pictures([file], types.SimpleNamespace(pretrained_cfg=wanted))
    torch.testing.assert_close(next(iter(test.batches(0)))[0], want, rtol=0, atol=1e-4)


def test_a_damaged_picture_is_named_also_by_a_worker(tmp_path, cfg):
    for name in "ab":
        save(tmp_path / "val" / name / "x.png")
    (tmp_path / "val" / "b" / "x.png").write_bytes(b"no picture")
    options = {"num_classes": 2, "data_dir": str(tmp_path), "num_workers": 1}
    streamed = open_test_set("folder", cfg | {"input_size": (3, 96, 96)}, **options)
    with pytest.raises(ValueError, match=r"b/x\.png") as raised:
        list(streamed.batches(0))
    assert "Traceback" not in str(raised.value) and len(str(raised.value)) < 500
    with pytest.raises(ValueError, match=r"b/x\.png"):
        load_arrays("folder", "test", data_dir=str(tmp_path), num_workers=1)


def test_pictures_of_a_sequence_are_put_upright(monkeypatch):
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels)
    picture.info["exif"] = exif.tobytes()

    class Reader:
        def __iter__(self):
            yield from ((picture, 0) for _ in range(2))

        def __len__(self):
            return 2

    monkeypatch.setattr("timm_gac.data.testset.open_dataset", lambda *_, **__: IterableImageDataset("", Reader()))
    cfg = {"input_size": (3, 12, 12), "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "crop_pct": 1.0}
    images, _ = next(iter(open_test_set("wds/x", cfg, num_classes=1, batch_size=2).batches(0)))
    assert images[0, 0, 3].tolist() == [0] * 6 + [255] * 6


# Folders


def test_folders_are_searched_without_hidden_files_loops_and_pipes(tmp_path):
    save(tmp_path / "a" / "deep" / "x.PNG")
    save(tmp_path / "a" / ".hidden" / "x.png")
    save(tmp_path / "a" / "._x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert find_pictures(tmp_path) == [str(tmp_path / "a" / "deep" / "x.PNG")]
    with pytest.raises(PictureError, match="no regular file"):
        read_picture(tmp_path / "a" / "pipe.png")


def test_classes_are_the_folders_directly_below(tmp_path):
    for path in ("n2/images/0.jpg", "n2/0.jpg", "n10/images/0.webp", "n1/images/0.tif"):
        save(tmp_path / path)
    save(tmp_path / ".git" / "0.png")
    reader = FolderReader(tmp_path)
    assert reader.class_to_idx == {"n1": 0, "n2": 1, "n10": 2}
    assert [label for _, label in reader.samples] == [0, 1, 1, 2]
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png"):
        FolderReader(tmp_path)


def test_names_on_a_terminal_have_no_control_characters():
    assert plain("a\x1b[31mb\n[old]é") == "a?[31mb?[old]é"


# Labels


@pytest.mark.parametrize(
    ("found", "wanted", "labels"),
    [
        ((), ("a",), None),
        (("a",), (), None),
        (("a", "b"), ("a", "b"), None),
        (("b", "c"), ("a", "b", "c"), [1, 2]),
        (("Aquarium_Fish", "bed"), ("bed", "aquarium-fish"), [1, 0]),
        (("n01443537",), ("n01440764 tench", "n01443537 goldfish, Carassius"), [1]),
        (("0", "1"), ("zero", "one"), None),
        (("n02124075", "n01443537"), ("n01443537 goldfish", "n02124075 Egyptian cat", "n02808440 bathtub"), [1, 0]),
    ],
)
def test_labels_follow_names(found, wanted, labels):
    assert match_labels(found, wanted, "x") == labels


@pytest.mark.parametrize(
    ("found", "wanted", "options", "message"),
    [
        (("a", "d"), ("a", "b"), {}, "got d too"),
        (("c", "d"), ("a", "b"), {"strict": True}, "got c, d too"),
        (("x",), ("a", "b"), {}, "got x too"),
        (("crane", "b"), ("crane", "b", "Crane"), {}, "several called crane"),
        (("a b", "a_b"), ("a b", "c"), {}, "different names"),
        ([f"x{i}" for i in range(999)], ("a", "b"), {}, "and 994 more"),
    ],
)
def test_classes_that_do_not_match_are_refused_by_name(found, wanted, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        match_labels(found, wanted, "x", **options)
    assert len(str(raised.value)) < 500


def test_classes_in_order_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert match_labels(("0", "1"), ("zero", "one"), "digits") is None
    assert "taken in order" in caplog.text and "digits" in caplog.text


@pytest.mark.parametrize("side", [16, 96], ids=["in memory", "streamed"])
def test_a_test_set_gives_the_labels_of_the_network(tmp_path, cfg, side):
    for name in ("banana", "cherry"):
        save(tmp_path / "val" / name / "x.png")
    cfg["input_size"] = (3, side, side)
    names = ("apple", "banana", "cherry")
    options = {"data_dir": str(tmp_path)}
    assert labels_of(open_test_set("folder", cfg, num_classes=3, label_names=names, **options)) == [1, 2]
    assert labels_of(open_test_set("folder", cfg, num_classes=None, label_names=("x",), **options)) == [0, 1]
    with pytest.raises(ValueError, match="label_names"):  # nobody can say which of the three these are
        open_test_set("folder", cfg, num_classes=3, **options)
    with pytest.raises(ValueError, match="got cherry too"):
        open_test_set("folder", cfg, num_classes=3, label_names=("apple", "banana", "plum"), **options)


def test_a_streamed_run_has_the_classes_of_its_folder(tmp_path):
    for split, names in (("train", ("n2", "n10", "n1")), ("val", ("n10",))):
        for name in names:
            for index in range(2):
                save(tmp_path / split / name / f"{index}.png", 80 * index, (40, 40))
    (tmp_path / "train" / "empty").mkdir()
    recipe = Recipe(
        model="test_gac_msresnet",
        data="folder",
        data_dir=str(tmp_path),
        stream=True,
        image_size=32,
        epochs=1,
        batch_size=2,
        num_steps=1,
        num_workers=0,
    )
    out = tmp_path / "run"
    assert train(recipe, RunOptions(out=out, cpu=True)) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["label_names"] == ["n1", "n2", "n10"] and config["num_classes"] == 3
    file = tmp_path / "eval.json"
    assert cli.main(["eval", str(out), "--data", "folder", "--data-dir", str(tmp_path), "--json", str(file)]) == 0
    evaluated, trained = (json.loads(path.read_text()) for path in (file, out / "eval.json"))
    assert evaluated["images"] == trained["images"] == 2 and evaluated["top1"] == trained["top1"]


def test_an_npz_is_matched_by_name_too(tmp_path, cfg):
    images = np.zeros((2, 3, 16, 16), np.uint8)
    np.savez(tmp_path / "a.npz", x_test=images, y_test=np.array([1, 0]), label_names=np.array(["cherry", "apple"]))
    cfg["input_size"] = (3, 16, 16)
    loader = open_test_set(str(tmp_path / "a.npz"), cfg, num_classes=3, label_names=("apple", "banana", "cherry"))
    assert labels_of(loader) == [0, 2]


# Sources and caches


def test_a_cache_that_fails_is_done_without(tmp_path, monkeypatch, caplog):
    for name in "ab":
        save(tmp_path / "val" / name / "x.png", 7)
    options = {"data_dir": str(tmp_path), "cache": True}
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with caplog.at_level(logging.WARNING):
        assert load_arrays("folder", "test", **options).images.unique().tolist() == [7]
    assert "not kept" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_arrays("folder", "test", **options)
    (file,) = (tmp_path / "cache").rglob("*.npz")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 99):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_arrays("folder", "test", **options).images.unique().tolist() == [7]
        assert "decoding anew" in caplog.text and file.read_bytes() == whole  # and mended
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert load_arrays("folder", "test", **options).images.unique().tolist() == [7]


def test_damaged_arrays_are_one_sentence(tmp_path):
    file = tmp_path / "a.npz"
    x, y = np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64)
    np.savez(file, x_train=x, y_train=y, label_names=np.array("zero"))
    with pytest.raises(ValueError, match="one row of texts"):
        load_arrays(str(file), "train")
    np.savez_compressed(file, x_train=np.random.default_rng(0).integers(256, size=x.shape, dtype=np.uint8), y_train=y)
    rng, whole = np.random.default_rng(0), file.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=4):
            damaged[place] = int(rng.integers(256))
        file.write_bytes(damaged)
        try:
            load_arrays(str(file), "train")
        except ValueError as error:
            assert str(error).startswith("expected") and len(str(error)) < 500, error
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x_train.npy", whole)
            archive.writestr("y_train.npy", whole)
        content = bytearray(file.read_bytes())
        content[60:90] = bytes(30)
        file.write_bytes(content)
        with pytest.raises(ValueError, match="make it anew"):
            load_arrays(str(file), "train")


def test_data_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"from torchvision.datasets import CIFAR10 as Set; Set\('.*', download=True\)"
    ):
        load_arrays("torch/cifar10", "train", data_dir=str(tmp_path))
    for name in ("cifar10", str(tmp_path), "torch/"):
        with pytest.raises(ValueError, match="--data folder"):
            load_arrays(name, "train", data_dir=str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets, with columns called as cifar100's are."""

    class Feature:
        def __init__(self, **options):
            vars(self).update(options)

    kinds = {name: type(name, (Feature,), {}) for name in ("Image", "ClassLabel")}
    features = {
        "img": kinds["Image"](),
        "fine_label": kinds["ClassLabel"](names=["apple", "bed"]),
        "coarse_label": kinds["ClassLabel"](names=["x"]),
    }
    info = types.SimpleNamespace(features=features, splits={})

    class Loaded(list):
        def cast_column(self, *_):
            return self

    Loaded.info = info

    def content(value):
        import io

        stream = io.BytesIO()
        Image.new("RGB", (12, 12), (value, 0, 0)).save(stream, "PNG")
        return {"img": {"bytes": stream.getvalue()}, "fine_label": value % 2, "coarse_label": 0}

    module = types.ModuleType("datasets")
    module.Image = kinds["Image"]
    module.get_dataset_split_names = lambda name: ["train", "test"]
    module.load_dataset_builder = lambda name: types.SimpleNamespace(info=info)
    module.load_dataset = lambda name, split, **_: Loaded(map(content, (1, 2, 3) if split == "train" else (4, 5)))
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    yield module
    sys.modules.pop("timm.data.readers.reader_hfds", None)


def test_the_hubs_splits_and_columns_are_found(hub):
    train, test = (load_arrays("hfds/cifar100", split) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0, 1]
    assert test.label_names == ("apple", "bed")
    assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    hub.get_dataset_split_names = lambda name: ["unsplit"]
    with pytest.raises(ValueError, match="got unsplit"):
        open_dataset("hfds/x", "train", None)
