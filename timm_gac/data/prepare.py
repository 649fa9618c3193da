"""Data sets as people keep them, many files in folders, made into the .npz that the trainer reads.

Several folders make one set of all their classes: classes of the same name are one class. Training images that show
what a validation image shows are left out, wherever the two come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..runtime.files import scratch_folder, write_json
from ..runtime.progress import progress_of
from .arrays import Split, save_arrays
from .labels import label_key
from .pictures import find_pictures, join_names, read_picture

__all__ = ["ImageFile", "Match", "beside", "find_matches", "list_images", "prepare_images", "source_name"]

ANNOTATIONS = Path("val", "val_annotations.txt")  # by which Tiny-ImageNet-200 is known
WORDS = "words.txt"  # of Tiny-ImageNet-200: every synset of WordNet and its words
# Not of Tiny-ImageNet-200, but in a copy of it that is on GitHub, with images of their own.
STRAY_CLASSES = ("n02480855", "n10148035")
THUMBNAIL = 16  # pixels
SIMILARITY = 0.985
CHUNK = 256
MAX_SIZE = 4096  # pixels; one image has 50 MB there


@dataclass(frozen=True)
class ImageFile:
    """An image of a set.

    Attributes:
        file: Where it is.
        source: Name of the set it comes from.
        split: ``train`` or ``test``.
        label: Name of its class.
    """

    file: Path
    source: str
    split: Split
    label: str


@dataclass(frozen=True)
class Match:
    """A training image that shows the same as a test image.

    Attributes:
        train: Index of the training image.
        test: Index of the test image.
        similarity: Cosine of their thumbnails, each less its mean.
    """

    train: int
    test: int
    similarity: float


def list_images(folder: Path, source: str | None = None) -> list[ImageFile]:
    """The images of a folder, in the order of their names, as `timm_gac.data.pictures.find_pictures` finds them.

    Args:
        folder: ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE`` (or ``test``, ``valid``, ``validation``), or
            Tiny-ImageNet-200 as it is distributed; of that, classes that are not its own are left out.
        source: Name of the set; the folder's where left out.

    Raises:
        ValueError: It is neither, a split is empty, or images lie beside the folders of the classes.
    """
    source = source or source_name(folder)
    if (folder / ANNOTATIONS).is_file():
        found = _list_tiny(folder, source)
    else:
        names = [name for name in ("val", "test", "valid", "validation") if (folder / name).is_dir()]
        if not (folder / "train").is_dir() or not names:
            raise ValueError(
                f"expected train/CLASS/IMAGE and val/CLASS/IMAGE in {str(folder)!r}, got no such folders: "
                "check the path"
            )
        found = _list_classes(folder / "train", source, "train") + _list_classes(folder / names[0], source, "test")
    for split in ("train", "test"):
        if not any(image.split == split for image in found):
            raise ValueError(f"expected images to {split} on in {str(folder)!r}, got none: check its folders")
    return found


def source_name(folder: Path) -> str:
    """What a folder's set is called: a link's own name, as it was given; that of "." and ".." has to be looked up."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def beside(out: Path, sources: Sequence[str]) -> list[Path]:
    """The files that `prepare_images` writes beside ``out``: the figures, and the test images of each of several sets.

    Args:
        out: The .npz file.
        sources: Names of the sets.
    """
    parts = [out.with_name(f"{out.stem}.{name}.npz") for name in sources] if len(sources) > 1 else []
    return [out.with_suffix(".json"), *parts]


def _list_classes(folder: Path, source: str, split: Split, without: Sequence[str] = ()) -> list[ImageFile]:
    found = [(file, file.relative_to(folder).parts) for file in sorted(map(Path, find_pictures(folder)))]
    if loose := [parts[0] for _, parts in found if len(parts) == 1]:
        raise ValueError(
            f"expected images in a folder a class, {folder}/CLASS/IMAGE, got {len(loose)} beside them "
            f"({join_names(loose, 2)}): sort them so"
        )
    return [ImageFile(file, source, split, parts[0]) for file, parts in found if parts[0] not in without]


def _list_tiny(folder: Path, source: str) -> list[ImageFile]:
    found = _list_classes(folder / "train", source, "train", STRAY_CLASSES)
    for line in _lines(folder / ANNOTATIONS):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label and label not in STRAY_CLASSES:
            found.append(ImageFile(folder / "val" / "images" / name, source, "test", label))
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {file}, got {error}: save it as UTF-8 or remove it") from error


def _fit(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side resized to ``side``, and of that the centre square."""
    if image.size == (side, side):
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _thumbnails(file: Path) -> np.ndarray:
    """Grey thumbnails (2, 256) of the centre square and of the whole: sets differ in which of them they keep."""
    grey, size = read_picture(file, channels=1), (THUMBNAIL, THUMBNAIL)
    side = min(grey.size)
    left, top = ((length - side) // 2 for length in grey.size)
    square = grey.resize(size, Image.Resampling.BOX, box=(left, top, left + side, top + side))
    return np.stack([np.asarray(square).ravel(), np.asarray(grey.resize(size, Image.Resampling.BOX)).ravel()])


def find_matches(
    images: Sequence[ImageFile],
    similarity: float = SIMILARITY,
    num_workers: int = 0,
    block: int = 512,
    progress: bool = False,
) -> list[Match]:
    """Pairs of a training and a test image whose thumbnails are alike, the most alike first.

    Args:
        images: Of both splits.
        similarity: Smallest cosine of two thumbnails of 16 x 16 grey values, each less its mean.
        num_workers: Processes that decode.
        block: Test images compared at once.
        progress: Show how far it is.
    """
    files = [image.file for image in images]
    thumbnails = list(_map(_thumbnails, files, num_workers, "looking at images" if progress else ""))
    raw = np.stack(thumbnails).astype(np.float32)
    raw -= raw.mean(2, keepdims=True)
    flat = torch.from_numpy(raw / np.maximum(np.linalg.norm(raw, axis=2, keepdims=True), 1e-6))
    train, test = (
        torch.tensor([index for index, image in enumerate(images) if image.split == split], dtype=torch.int64)
        for split in ("train", "test")
    )
    best: dict[tuple[int, int], float] = {}
    with progress_of("comparing images", len(test), visible=progress) as advance:
        for rows in test.split(block):
            for kind in (0, 1):
                for other in (0, 1):
                    cosine = flat[rows, kind] @ flat[train, other].T
                    for row, column in (cosine > similarity).nonzero().tolist():
                        pair = int(train[column]), int(rows[row])
                        best[pair] = max(best.get(pair, 0.0), float(cosine[row, column]))
            advance(len(rows))
    return [Match(*pair, value) for pair, value in sorted(best.items(), key=lambda item: (-item[1], item[0]))]


def prepare_images(
    folders: Iterable[Path],
    out: Path,
    *,
    size: int,
    similarity: float = SIMILARITY,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Write a set made of one or more folders.

    Beside ``out`` there will be ``STEM.SOURCE.npz`` with the test images of each folder, where there are several, and
    ``STEM.json``: the figures, and every training image that was left out with the test image that it matches.

    Args:
        folders: What `list_images` takes; classes of the same name are one.
        out: The .npz file.
        size: Side of the images in pixels: the shorter one is resized to it, and the centre square kept.
        similarity: From which cosine of thumbnails on two images are the same; 1 keeps all.
        num_workers: Processes that decode.
        progress: Show how far it is.

    Returns:
        What ``STEM.json`` says.

    Raises:
        ValueError: A folder holds no set or is given twice, two classes differ in spelling only, no training image
            is left, or an image cannot be read.
        OSError: The files cannot be written.
    """
    folders = [Path(folder) for folder in folders]
    if out.suffix != ".npz":
        raise ValueError(f"expected a file ending in .npz to write, got {out.name!r}: such as tiny_imagenet.npz")
    if not folders or not 1 <= size <= MAX_SIZE:
        raise ValueError(f"expected one folder or more and a size of 1 to {MAX_SIZE}, got {len(folders)} and {size}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"expected different folders, got one twice among {join_names(folders)}: give each once")
    listed = [list_images(folder) for folder in folders]
    names = [images[0].source for images in listed]
    if len(set(names)) < len(names):
        raise ValueError(f"expected folders of different names, got {', '.join(names)}: rename one")
    images = [image for part in listed for image in part]
    matches = find_matches(images, similarity, num_workers, progress=progress) if similarity < 1 else []
    dropped = {match.train for match in matches}
    kept = [image for index, image in enumerate(images) if index not in dropped]
    classes = sorted({image.label for image in images})
    _check_classes(classes)
    if not any(image.split == "train" for image in kept):
        raise ValueError(
            f"expected training images that match no test image, got none above a similarity of {similarity}: raise it"
        )
    words = _words(folders)
    label_names = np.array([f"{name} {words[name]}" if name in words else name for name in classes], str)
    report = _report(images=images, kept=kept, classes=classes, matches=matches, size=size, similarity=similarity)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out) as scratch:
        arrays: dict[str, np.ndarray] = {"label_names": label_names}
        for split in ("train", "test"):
            chosen = [image for image in kept if image.split == split]
            arrays[f"y_{split}"] = np.array([classes.index(image.label) for image in chosen])
            arrays[f"x_{split}"] = _decode(chosen, size, num_workers, scratch / f"{split}.npy", progress)
        save_arrays(out, arrays)
        sources = np.array([image.source for image in kept if image.split == "test"])
        for name, file in zip(names, beside(out, names)[1:], strict=False):  # none of one set
            part = {"x_test": arrays["x_test"][sources == name], "y_test": arrays["y_test"][sources == name]}
            save_arrays(file, part | {"label_names": label_names})
        del arrays
    write_json(out.with_suffix(".json"), report)
    return report


def _check_classes(names: Sequence[str]) -> None:
    """Refuse classes whose names `match_labels` takes for one, as it would refuse the set when it is read."""
    spelled: dict[str, str] = {}
    for name in names:
        if (first := spelled.setdefault(label_key(name), name)) != name:
            raise ValueError(
                f"expected one spelling of each class, got {join_names([first, name])}: rename one of the folders"
            )


def _report(
    images: Sequence[ImageFile],
    kept: Sequence[ImageFile],
    classes: Sequence[str],
    matches: Sequence[Match],
    size: int,
    similarity: float,
) -> dict[str, Any]:
    def counts(of: Iterable[ImageFile]) -> dict[str, int]:
        return dict(sorted(Counter(f"{image.source} {image.split}" for image in of).items()))

    def name(index: int) -> str:
        image = images[index]
        return f"{image.source}/{image.label}/{image.file.name}"

    return {
        "size": size,
        "classes": len(classes),
        "without_training_images": sorted(set(classes) - {image.label for image in kept if image.split == "train"}),
        "found": counts(images),
        "kept": counts(kept),
        "similarity": similarity,
        "left_out": [
            {"train": name(match.train), "test": name(match.test), "cosine": round(match.similarity, 4)}
            for match in matches
        ],
    }


def _words(folders: Iterable[Path]) -> dict[str, str]:
    """The words of WordNet's synsets, from the folder that has them."""
    for folder in folders:
        if (folder / WORDS).is_file():
            lines = (line.partition("\t") for line in _lines(folder / WORDS))
            return {synset: words for synset, _, words in lines if words}
    return {}


def _pixels(job: tuple[Path, int]) -> np.ndarray:
    file, size = job
    return np.asarray(_fit(read_picture(file), size)).transpose(2, 0, 1)


def _decode(images: Sequence[ImageFile], size: int, num_workers: int, scratch: Path, progress: bool) -> np.ndarray:
    """The images as uint8 (N, 3, H, W), kept in a file, as they may be larger than the memory."""
    # Written, not mapped: on a full disk writing to a mapped file kills the process instead of raising an OSError.
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, size, size)}
    jobs = [(image.file, size) for image in images]
    with scratch.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for one in _map(_pixels, jobs, num_workers, "decoding images" if progress else ""):
            stream.write(one.tobytes())
    pixels: np.ndarray = np.load(scratch, mmap_mode="r")
    return pixels


def _map(function: Any, jobs: Sequence[Any], num_workers: int, task: str) -> Iterator[Any]:
    """The results in order; how far it is is shown where the task has a name."""
    num_workers = min(num_workers, -(-len(jobs) // CHUNK))  # all are started, also those without work
    with (
        progress_of(task, len(jobs), visible=bool(task)) as advance,
        ProcessPoolExecutor(num_workers) if num_workers else nullcontext() as pool,
    ):
        for one in map(function, jobs) if pool is None else pool.map(function, jobs, chunksize=CHUNK):
            yield one
            advance(1)
