"""Data sets by timm's names, opened for one split, whose pictures are all decoded by `read_picture`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from .labels import match_labels
from .pictures import SUFFIXES, PictureError, find_pictures, holds_picture, join_names, read_picture

_FOLDERS = ("folder", "image_folder", "torch/folder", "torch/image_folder")
_KINDS = ("torch", "hfds", "hfids", "tfds", "wds")
# The split as the file systems' and the Hub's data sets call it; timm maps "validation" to val and valid in folders.
_TEST_SPLITS = ("validation", "test", "val", "valid")


class FolderReader:
    """The pictures of a split's folder, ``CLASS/.../PICTURE``, in the order of timm's reader of folders.

    Attributes:
        samples: Path and label of each.
        class_to_idx: Label of each class: the folders directly below, in timm's natural order.

    Raises:
        ValueError: There is no picture, or one lies beside the folders of the classes and so has no label.
    """

    def __init__(self, folder: Path) -> None:
        from timm.utils.misc import natural_key

        start = len(os.path.join(folder, ""))  # noqa: PTH118
        try:
            pictures = [(path, path[start:].split(os.sep)) for path in find_pictures(folder)]  # noqa: PTH206
        except OSError as error:
            raise ValueError(f"expected a folder that can be read, got {error}: check its permissions") from error
        loose = [parts[0] for _, parts in pictures if len(parts) == 1]
        if loose or not pictures:
            got = f"{len(loose)} beside them ({join_names(loose, 2)})" if loose else f"none of {', '.join(SUFFIXES)}"
            raise ValueError(f"expected pictures in a folder a class, {folder}/CLASS/PICTURE, got {got}: sort them so")
        names = _in_order({parts[0] for _, parts in pictures})
        self.class_to_idx = {name: label for label, name in enumerate(names)}
        samples = [(path, self.class_to_idx[parts[0]]) for path, parts in pictures]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]


class PictureDataset(Dataset[tuple[Any, int]]):
    """Pictures that can be indexed, and their labels.

    Unlike timm's own class it does not put the next picture where one is damaged: it stops and names the file.

    Args:
        source: Gives a picture (or a file or stream) and a label for an index: a `FolderReader`, one of timm's readers,
            or a data set of torchvision.
        channels: 3 for RGB, 1 for grey.
        labels: The label to give for each of the source's; None keeps them.
        label_names: Of the labels given.

    Attributes:
        transform: What is done to a decoded picture; `timm.data.create_loader` sets it.
    """

    def __init__(
        self, source: Any, channels: int = 3, labels: list[int] | None = None, label_names: Sequence[str] = ()
    ) -> None:
        self.source, self.channels, self.labels = source, channels, labels
        self.label_names = tuple(label_names)
        self.transform: Callable[[Image.Image], Any] | None = None
        if hasattr(source, "loader") and hasattr(source, "samples"):
            source.loader = str  # torchvision's folders: the path, to be decoded here

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The picture after `transform`, and its label.

        Raises:
            PictureError: It cannot be read, or has no label.
        """
        name = self.name(index)
        try:
            picture, label = self.source[index][:2]
        except (OSError, SyntaxError, RuntimeError) as error:
            raise PictureError(f"expected a picture, got {name!r}: {error}; repair or remove it") from error
        if label is None or int(label) < 0:
            raise PictureError(f"expected a class for each picture, got none for {name!r}: choose a labelled split")
        decoded = read_picture(picture, self.channels, name)
        if hasattr(picture, "close") and not isinstance(picture, Image.Image):
            picture.close()
        label = int(label) if self.labels is None else self.labels[int(label)]
        return decoded if self.transform is None else self.transform(decoded), label

    def name(self, index: int) -> str:
        """What a picture is called in an error: its file where it has one."""
        samples = getattr(self.source, "samples", None)
        if samples is not None and isinstance(samples[index], (tuple, list)):
            return str(samples[index][0])
        return f"sample {index}"


def open_dataset(
    data: str,
    split: str,
    data_dir: str | None,
    *,
    label_names: Sequence[str] = (),
    strict: bool = False,
    channels: int = 3,
    **options: Any,
) -> Any:
    """A data set of `timm.data.create_dataset` for ``train`` or ``test``.

    For ``test`` the folder (or the Hub's split) of that name is taken where there is one, else the validation set.

    Args:
        data: Name as timm takes it.
        split: ``train`` or ``test``.
        data_dir: Folder of the data set.
        label_names: The classes whose labels are to be given, see `match_labels`; the data set's own where empty.
        strict: Also for `match_labels`.
        channels: 3 for RGB, 1 for grey.
        options: Further arguments for timm.

    Returns:
        A `PictureDataset`, or timm's `IterableImageDataset` where it can only be read in sequence.

    Raises:
        ValueError: There is no such folder, split, class or data set, or a package for it is missing.
    """
    if data in _FOLDERS:
        source: Any = FolderReader(_split_folder(_folder(data, data_dir), split))
    else:
        source = _create(data, split, data_dir, **options)
        source = source if isinstance(source, IterableDataset) else getattr(source, "reader", source)
    found = class_names(source)
    labels = match_labels(
        found, label_names, repr(data if data_dir is None else f"{data} in {data_dir}"), strict=strict
    )
    names = tuple(label_names) if labels is not None else found
    if not isinstance(source, IterableDataset):
        return PictureDataset(source, channels, labels, names)
    source.label_names = names  # type: ignore[attr-defined]
    if labels is not None:
        source.target_transform = labels.__getitem__  # type: ignore[attr-defined]
    return source


def read_class_names(data: str, split: str, data_dir: str | None, **options: Any) -> tuple[str, ...]:
    """`class_names` of a data set, for a folder without listing its pictures.

    Raises:
        ValueError: As for `open_dataset`.
    """
    if data not in _FOLDERS:
        return class_names(open_dataset(data, split, data_dir, **options))
    folder = _split_folder(_folder(data, data_dir), split)
    return tuple(_in_order(path.name for path in folder.iterdir() if path.is_dir() and holds_picture(path)))


def _in_order(names: Iterable[str]) -> list[str]:
    """Names of classes as timm sorts them: numbers in them by their value."""
    from timm.utils.misc import natural_key

    return sorted(names, key=natural_key)


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names of the classes in the order of their labels, or () where the data set has none."""
    if names := getattr(dataset, "label_names", None):
        return tuple(names)
    reader = getattr(dataset, "reader", dataset)
    mapping = getattr(reader, "class_to_idx", None)
    if mapping:
        return tuple(str(name) for name in sorted(mapping, key=mapping.get))
    return tuple(map(str, getattr(reader, "classes", ())))


def _create(data: str, split: str, data_dir: str | None, **options: Any) -> Any:
    from timm.data import create_dataset

    kind, _, name = data.partition("/")
    kind = kind.lower()
    if kind not in _KINDS or not name:
        raise ValueError(
            f"expected data as an .npz file, digits, folder, or a name such as torch/cifar100 or hfds/ORG/NAME, got "
            f"{data!r}: for pictures in class folders give --data folder --data-dir FOLDER"
        )
    if kind not in ("hfds", "hfids", "tfds"):
        _folder(data, data_dir)
    try:
        if kind == "hfds":
            split, options = _hub_split(name, split), options | _hub_columns(name)
        elif split == "test":
            split = "validation"
        if kind in ("wds", "hfids"):
            options["input_img_mode"] = ""  # the picture as it is, which `read_picture` converts
        return create_dataset(data, root=data_dir, split=split, **options)
    except ImportError as error:
        raise ValueError(
            f"expected the package {error.name} for {data!r}, got none: pip install {error.name}"
        ) from error
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError) as error:
        if kind == "torch" and "download" in str(error):
            raise ValueError(_download_hint(data, data_dir)) from error
        raise ValueError(f"expected a data set that timm can open, got {data!r} with: {str(error)[:300]}") from error


def _download_hint(data: str, data_dir: str | None) -> str:
    from torchvision import datasets

    name = data.partition("/")[2].replace("_", "").lower()
    known = {item.lower(): item for item in vars(datasets) if item[:1].isupper()}
    code = f"from torchvision.datasets import {known.get(name, name)} as Set; Set({data_dir!r}, download=True)"
    return f'expected the files of {data!r} in {data_dir!r}, got none: fetch them once with python -c "{code}"'


def _folder(data: str, data_dir: str | None) -> Path:
    if data_dir is None or not Path(data_dir).is_dir():
        raise ValueError(
            f"expected data_dir to be the folder of the data {data!r}, got {data_dir!r}: give that folder, "
            "or the path of an .npz file as data"
        )
    return Path(data_dir)


def _split_folder(root: Path, split: str) -> Path:
    names = ("train", "training") if split == "train" else ("test", "val", "valid", "validation", "eval", "evaluation")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"expected one of the folders {', '.join(names)} in {root}, got none: sort the images as "
        f"{root / names[0]}/CLASS/IMAGE"
    )


def _hub_split(name: str, split: str) -> str:
    """The Hub's name of a split."""
    splits = list(importlib.import_module("datasets").get_dataset_split_names(name))
    candidates = ("train",) if split == "train" else _TEST_SPLITS
    for candidate in candidates:
        if candidate in splits:
            return candidate
    raise ValueError(f"expected one of the splits {', '.join(candidates)}, got {join_names(splits)}: choose another")


def _hub_columns(name: str) -> dict[str, str]:
    """The columns of pictures and labels where these are not image and label: cifar100 has img and fine_label."""
    builder = importlib.import_module("datasets").load_dataset_builder(name)
    kinds = {column: type(feature).__name__ for column, feature in (builder.info.features or {}).items()}
    columns = dict[str, str]()
    for option, usual, kind in (("input_key", "image", "Image"), ("target_key", "label", "ClassLabel")):
        fitting = [column for column in kinds if kinds[column] == kind]
        if fitting and usual not in kinds:
            columns[option] = next((column for column in fitting if column.startswith("fine")), fitting[0])
    return columns
