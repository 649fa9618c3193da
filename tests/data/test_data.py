"""The data: sources and their refusals, order of the images, parts for the processes and resuming."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils._python_dispatch import TorchDispatchMode

from timm_gac.data import Augmentation, DeviceLoader, ImageArrays, create_stream_loaders, load_arrays
from timm_gac.data.arrays import save_arrays
from timm_gac.data.loader import one_ahead

CPU = torch.device("cpu")
FULL = Augmentation(
    crop_padding=2,
    flip=True,
    trivial_augment=True,
    random_erasing=0.5,
    mixup=0.4,
    cutmix=1.0,
    mix_probability=0.9,
    label_smoothing=0.1,
)
CLASSES = 5


def image_set(count=26, channels=3, size=(8, 10), seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, channels, *size), dtype=np.uint8)
    return ImageArrays(torch.from_numpy(images), torch.arange(count) % CLASSES)


def loader(arrays, batch_size=4, augmentation=FULL, training=True, **options):
    options = {"device": CPU, "mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": CLASSES, "seed": 3} | options
    return DeviceLoader(arrays, batch_size, augmentation=augmentation, training=training, **options)


def raw(arrays, batch_size=4, augmentation=None, training=True, **options):
    """Grey values come out as they are."""
    scaled = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    return loader(arrays, batch_size, augmentation, training, **scaled, **options)


def joined(batches):
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


# Order, parts, resuming


def test_epochs_are_a_function_of_seed_and_epoch():
    first, again = loader(image_set()), loader(image_set())
    torch.manual_seed(99)
    np.random.seed(99)
    images, targets = joined(first.batches(2))
    torch.testing.assert_close((images, targets), joined(again.batches(2)), rtol=0, atol=0)
    for other in (first.batches(3), loader(image_set(), seed=4).batches(2)):
        assert not torch.equal(joined(other)[0], images)


@pytest.mark.parametrize("training", [True, False])
def test_start_gives_the_tail_of_the_epoch(training):
    source = loader(image_set(), training=training)
    whole = list(source.batches(1))
    assert len(whole) == len(source) == (6 if training else 7)
    for start in (0, 2, len(source)):
        tail = list(source.batches(1, start))
        assert len(tail) == len(source) - start
        for expected, got in zip(whole[start:], tail, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("augmentation", [None, FULL], ids=["plain", "augmented"])
def test_two_processes_see_what_one_sees(augmentation):
    arrays = image_set()
    alone = list(loader(arrays, 8, augmentation).batches(1))
    parts = [loader(arrays, 4, augmentation, rank=rank, world_size=2).batches(1) for rank in (0, 1)]
    for (images, targets), *both in zip(alone, *parts, strict=True):
        torch.testing.assert_close(joined(both), (images, targets), rtol=0, atol=0)


def test_an_epoch_has_each_image_at_most_once():
    arrays = image_set()
    images, targets = joined(raw(arrays).batches(0))
    chosen = (images[:, None] == arrays.images).flatten(2).all(2)
    assert chosen.sum(1).tolist() == [1] * 24
    assert chosen.sum(0).max() == 1
    torch.testing.assert_close(targets.argmax(1), arrays.labels[chosen.int().argmax(1)])
    assert chosen.int().argmax(1).tolist() != sorted(chosen.int().argmax(1).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_image_once_in_order(world_size):
    arrays = image_set()
    parts = [
        joined(raw(arrays, training=False, rank=rank, world_size=world_size).batches(0)) for rank in range(world_size)
    ]
    images, labels = joined(parts)
    torch.testing.assert_close(images, arrays.images.float(), rtol=0, atol=1e-4)
    assert torch.equal(labels, arrays.labels)


def test_images_are_normalised_in_channels_last():
    arrays = image_set()
    images, _ = next(loader(arrays, training=False, dtype=torch.bfloat16).batches(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = (arrays.images[:4].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(images, expected.bfloat16(), rtol=2**-7, atol=2**-7)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "index.Tensor")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        assert not any(name in str(func) for name in self.REFUSED), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_batches_do_not_wait_for_the_device(training):
    source = loader(image_set(), training=training)
    with NoSynchronisation() as mode:
        assert sum(1 for _ in source.batches(0)) == len(source)
    assert mode.calls
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        torch.ones(1).item()


def test_one_batch_is_made_ahead_behind_all_steps_but_the_last(monkeypatch):
    log = []

    class Stream:
        device = CPU

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    def make():
        for index in range(2):
            log.append(f"make {index} on {current[-1].name}")
            yield index, index

    @contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    current = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    for index, _ in one_ahead(make(), Stream("side")):
        assert current[-1].name == "main"
        log.append(f"step {index}")
    begun, ready = "side waits for main", "main waits for side"
    assert log == [
        *(begun, "make 0 on side", ready),
        *(begun, "make 1 on side", "step 0", ready),
        *(begun, "step 1"),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_ahead_are_those_made_in_time():
    """While long steps keep the GPU busy, and memory of batches that were dropped is written anew."""
    arrays = image_set(600, size=(32, 32))
    ahead, in_time = (loader(arrays, device="cuda") for _ in range(2))
    in_time._stream = None
    wanted = [(images.clone(), targets.clone()) for images, targets in in_time.batches(1)]
    large, found = torch.randn(4096, 4096, device="cuda"), []
    for images, targets in ahead.batches(1):
        large = (large @ large).clamp(-1, 1)
        found.append((images.clone(), targets.clone()))
        del images, targets
    assert len(found) == len(wanted) == 150
    for pair, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, pair, other))


@pytest.mark.parametrize("augmentation", [FULL, Augmentation(label_smoothing=0.2), Augmentation()])
def test_targets_are_probabilities(augmentation):
    _, targets = joined(loader(image_set(), augmentation=augmentation).batches(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    assert (targets >= 0).all()
    smoothing = augmentation.label_smoothing
    if not augmentation.mixes:
        torch.testing.assert_close(targets.amax(1), torch.full((24,), 1 - smoothing + smoothing / CLASSES))
        torch.testing.assert_close(targets.amin(1), torch.full((24,), smoothing / CLASSES))


# Sources


def write_npz(path, **changes):
    images = image_set(10).images.numpy()
    arrays = {"x_train": images, "y_train": np.arange(10) % CLASSES, "x_test": images[:4], "y_test": np.arange(4)}
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return str(path)


def test_npz_files_are_read(tmp_path):
    file = write_npz(tmp_path / "set.npz", label_names=np.array(list("abcde")))
    train, test = (load_arrays(file, split) for split in ("train", "test"))
    assert torch.equal(train.images, image_set(10).images)
    assert torch.equal(train.labels, torch.arange(10) % CLASSES)
    assert (len(test.images), test.label_names, test.num_classes) == (4, tuple("abcde"), 5)
    assert load_arrays(file, "test", image_size=16).images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "add x_train"),
        ({"x_train": np.zeros((10, 3, 8, 8), np.float32)}, "uint8 images.*float32"),
        ({"x_train": np.zeros((10, 8, 8, 3), np.uint8)}, "transpose"),
        ({"x_train": np.zeros((0, 3, 8, 8), np.uint8), "y_train": np.zeros(0, np.int64)}, "at least one image"),
        ({"y_train": np.zeros(10)}, "integer labels"),
        ({"y_train": np.zeros(9, np.int64)}, r"shape \(10,\)"),
        ({"y_train": np.arange(10) - 1}, "labels from 0"),
        ({"label_names": np.array(["a"])}, "labels from 0 to 0"),
    ],
)
def test_wrong_npz_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_arrays(write_npz(tmp_path / "set.npz", **changes), "train")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_arrays(str(tmp_path / "none.npz"), "train")
    whole = Path(write_npz(tmp_path / "set.npz")).read_bytes()
    for damaged in (b"", b"no zip", whole[: len(whole) // 2], whole.replace(b"\x93NUMPY", b"\x93NUMPX")):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="make it anew"):
            load_arrays(str(tmp_path / "bad.npz"), "train")
    with pytest.raises(ValueError, match="data_dir"):
        load_arrays("folder", "train", data_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="one of the folders train"):
        load_arrays("folder", "train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"timm can open.*no_such"):
        load_arrays("torch/no_such", "train", data_dir=str(tmp_path))


def test_digits_are_split():
    pytest.importorskip("sklearn")
    train, test = load_arrays("digits", "train"), load_arrays("digits", "test")
    assert (len(train.images), len(test.images), train.num_classes) == (1437, 360, 10)
    assert int(train.images.max()) == 255


@pytest.fixture
def folder(tmp_path):
    """Train and val with 3 classes of 4 images, which are their class in grey."""
    for split in ("train", "val"):
        for label in range(3):
            (tmp_path / "set" / split / f"class{label}").mkdir(parents=True)
            for index in range(4):
                image = Image.new("RGB", (12, 12), (label * 80, index, 9))
                image.save(tmp_path / "set" / split / f"class{label}" / f"{index}.png")
    return tmp_path / "set"


def test_folders_are_decoded_and_cached(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"data_dir": str(folder), "cache": True}
    arrays = load_arrays("folder", "test", **options)
    assert arrays.label_names == ("class0", "class1", "class2")
    assert torch.equal(arrays.images[:, 0, 0, 0], arrays.labels * 80)
    assert arrays.images[:4, 1, 5, 5].tolist() == [0, 1, 2, 3]
    monkeypatch.setattr("timm_gac.data.arrays.decode_dataset", None)  # the second time it is not decoded
    again = load_arrays("folder", "test", **options)
    assert torch.equal(again.images, arrays.images)
    assert again.label_names == arrays.label_names
    (folder / "val" / "class1" / "0.png").write_bytes((folder / "val" / "class0" / "0.png").read_bytes())
    with pytest.raises(TypeError, match="NoneType"):  # changed files are decoded anew
        load_arrays("folder", "test", **options)


def test_folders_that_cannot_be_decoded_are_refused(folder):
    load = lambda **options: load_arrays("folder", "train", data_dir=str(folder), **options)  # noqa: E731
    Image.new("RGB", (20, 14)).save(folder / "train" / "class2" / "9.png")
    with pytest.raises(ValueError, match="give image_size"):
        load()
    assert load(image_size=12).images.shape == (13, 3, 12, 12)
    (folder / "train" / "class2" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="repair or remove"):
        load()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.npz"
    save_arrays(file, {"x": np.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*free space"):
        save_arrays(file, {"x": np.zeros(3)})
    assert np.load(file)["x"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "at least 27 images"),
        ({"batch_size": 14, "world_size": 2}, "at least 28 images"),
        ({"batch_size": 3}, "even batch_size"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"num_classes": 4}, "num_classes=5"),
        ({"mean": (0.5,), "std": (0.5,)}, "1 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "positive std"),
        ({"rank": 2, "world_size": 2}, "rank in 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_loaders_refuse_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        loader(image_set(), **options)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, 7), (0, -1)])
def test_steps_outside_of_the_epoch_are_refused(epoch, start):
    with pytest.raises(ValueError, match="start in 0 to 6"):
        loader(image_set()).batches(epoch, start)


# Streaming


def stream(folder, **options):
    options = {"image_size": 12, "batch_size": 2, "device": "cpu", "num_classes": 3, "seed": 1} | options
    options = {"augmentation": None, "num_workers": 0, "mean": (0.0,) * 3, "std": (1 / 255,) * 3} | options
    return create_stream_loaders("folder", data_dir=str(folder), scale=(1.0, 1.0), ratio=(1.0, 1.0), **options)


def test_streams_have_the_order_and_parts_of_the_device_loader(folder):
    train, test = stream(folder)
    arrays = load_arrays("folder", "train", data_dir=str(folder))
    plain = raw(arrays, 2, num_classes=3, seed=1)
    expected = joined(plain.batches(1))
    torch.testing.assert_close(joined(train.batches(1)), expected)
    torch.testing.assert_close(joined(train.batches(1, 2)), joined(plain.batches(1, 2)))
    assert list(train.batches(1, len(train))) == []
    parts = [stream(folder, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    whole = list(stream(folder, batch_size=4)[0].batches(0))
    for batch, *both in zip(whole, *(part[0].batches(0) for part in parts), strict=True):
        torch.testing.assert_close(joined(both), batch)
    images, labels = joined([joined(part[1].batches(0)) for part in parts])
    torch.testing.assert_close(images, load_arrays("folder", "test", data_dir=str(folder)).images.float())
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(test) == 6


def test_streams_mix_and_are_repeatable_with_workers(folder):
    options = {"augmentation": FULL, "num_workers": 1, "batch_size": 4}
    first, again = (joined(stream(folder, **options)[0].batches(1)) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first[1].sum(1), torch.ones(12))
    assert (first[1].amax(1) < 0.93).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 13}, "at least 13"), ({"num_classes": 2}, "num_classes=3"), ({"mean": (0.5,)}, "3 channels")],
)
def test_streams_refuse_what_cannot_work(folder, options, message):
    with pytest.raises(ValueError, match=message):
        stream(folder, **options)


def test_data_sets_read_in_sequence_skip_to_the_step(monkeypatch):
    class Reader:
        epoch = 0

        def __iter__(self):
            yield from ((Image.new("RGB", (12, 12), (self.epoch, index, 0)), index % 3) for index in range(9))

        def __len__(self):
            return 9

        def set_epoch(self, epoch):
            self.epoch = epoch

    monkeypatch.setattr("timm_gac.data.stream.open_dataset", lambda *_, **__: IterableImageDataset("", Reader()))
    train, test = stream("")
    assert (len(train), len(test)) == (4, 5)
    images, targets = joined(train.batches(7, 1))
    assert images[:, :2, 0, 0].tolist() == [[7, index] for index in range(2, 8)]
    assert targets.argmax(1).tolist() == [2, 0, 1, 2, 0, 1]
    assert joined(test.batches(0))[0][:, 1, 0, 0].tolist() == list(range(9))
