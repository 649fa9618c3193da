"""Data of a recipe: its sets in memory or as streams, and their batches."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from accelerate import Accelerator

from ..data import DeviceLoader, ImageArrays, StreamLoader, create_stream_loaders, load_arrays
from ..data.arrays import split_arrays
from ..data.dataset import read_class_names
from ..models.arguments import MAX_CLASSES
from .recipes import Recipe

EVAL_BATCH = 512


class Loaders(NamedTuple):
    """Batches of a run.

    Attributes:
        train: Training batches with the recipe's augmentation.
        last: Training batches of the last epochs, without mixing; None if there are no such epochs.
        test: Batches of the test set, or of the split set aside.
        label_names: Names of the classes, () if unknown.
    """

    train: DeviceLoader | StreamLoader
    last: DeviceLoader | StreamLoader | None
    test: DeviceLoader | StreamLoader
    label_names: tuple[str, ...]


def read_sets(recipe: Recipe, progress: bool) -> tuple[ImageArrays, ImageArrays] | None:
    """Training and test set in memory, or with ``holdout`` the two parts of the training set; None if streamed."""
    if recipe.stream:
        return None

    def read(split: Literal["train", "test"], names: tuple[str, ...] = ()) -> ImageArrays:
        return load_arrays(
            recipe.data,
            split,
            data_dir=recipe.data_dir,
            image_size=recipe.image_size,
            label_names=names,
            strict=True,
            cache=True,
            num_workers=recipe.num_workers,
            progress=progress,
        )

    train = read("train")
    if train.num_classes > MAX_CLASSES:
        raise ValueError(
            f"expected labels below {MAX_CLASSES:,} in {recipe.data!r}, got {train.num_classes - 1:,}: number the "
            "classes from 0"
        )
    _check_classes(len(train.labels.unique()), recipe)
    if recipe.holdout:
        return split_arrays(train, recipe.holdout)
    test = read("test", train.label_names)
    _check_alike(train, test, recipe.data)
    return train, test


def _check_classes(count: int, recipe: Recipe) -> None:
    """Refuse a training set of one class: whatever the network answers is right, and it learns nothing.

    A test set may have one.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if count < 2:
        where = f"{recipe.data!r}" + (f" in {recipe.data_dir!r}" if recipe.data_dir else "")
        raise ValueError(
            f"expected training images of two classes or more in {where}, got {count}, of which a network learns "
            "nothing: add images of another class (such as one for everything else), each class with a label or "
            "folder of its own"
        )


def _check_alike(train: ImageArrays, test: ImageArrays, data: str) -> None:
    """Refuse a test set that a network of the training set's classes and image size is not for.

    Raises:
        ValueError: It has other classes, or images of another shape.
    """
    if test.num_classes > train.num_classes:
        raise ValueError(
            f"expected test labels below {train.num_classes}, the number of classes of the training set of {data!r}, "
            f"got {test.num_classes - 1}: number the classes alike, or leave these test images out"
        )
    expected, got = tuple(train.images.shape[1:]), tuple(test.images.shape[1:])
    if got != expected:
        remedy = "give --image-size" if got[0] == expected[0] else "store both with the same channels"
        raise ValueError(
            f"expected test images of the training images' shape {expected} in {data!r}, got {got}: {remedy}"
        )


def count_stream_classes(recipe: Recipe) -> int:
    """Classes of a recipe's streamed training set; ImageNet's 1000 where it does not name them.

    Raises:
        ValueError: It names one only.
    """
    options = {"is_training": False, "batch_size": recipe.batch_size, "seed": recipe.seed}
    count = len(read_class_names(recipe.data, "train", recipe.data_dir, **options)) or 1000
    _check_classes(count, recipe)
    return count


def create_loaders(
    recipe: Recipe,
    sets: tuple[ImageArrays, ImageArrays] | None,
    num_classes: int,
    cfg: dict[str, Any],
    accelerator: Accelerator,
) -> Loaders:
    """The recipe's loaders on this process.

    Args:
        recipe: Recipe of the run.
        sets: Result of `read_sets`.
        num_classes: Number of classes of the network.
        cfg: The model's pretrained_cfg, whose mean and std normalise the images.
        accelerator: Accelerator of the run.
    """
    shared: dict[str, Any] = dict(
        device=accelerator.device,
        mean=cfg["mean"],
        std=cfg["std"],
        num_classes=num_classes,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return _stream_loaders(recipe, cfg, shared) if sets is None else _device_loaders(recipe, sets, shared)


def _stream_loaders(recipe: Recipe, cfg: dict[str, Any], shared: dict[str, Any]) -> Loaders:
    def stream(last: bool) -> Any:
        return create_stream_loaders(
            recipe.data,
            data_dir=recipe.data_dir,
            image_size=cfg["input_size"][1:],
            batch_size=recipe.batch_size,
            augmentation=recipe.augmentation(last),
            preprocessing=cfg,
            num_workers=recipe.num_workers,
            **shared,
        )

    train, test = stream(last=False)
    return Loaders(train, stream(last=True)[0] if recipe.mix_off_epochs else None, test, train.label_names)


def _device_loaders(recipe: Recipe, sets: tuple[ImageArrays, ImageArrays], shared: dict[str, Any]) -> Loaders:
    train_set, test_set = sets

    def training(last: bool) -> DeviceLoader:
        augmentation = recipe.augmentation(last)
        return DeviceLoader(train_set, recipe.batch_size, augmentation=augmentation, training=True, **shared)

    test = DeviceLoader(test_set, EVAL_BATCH, augmentation=None, training=False, **shared)
    last = training(last=True) if recipe.mix_off_epochs else None
    return Loaders(training(last=False), last, test, train_set.label_names)
