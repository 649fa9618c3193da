"""Random draws of the augmentation of training images, made on the host for many at once; `transforms` applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# The wide space of TrivialAugment (Mueller and Hutter, ICCV 2021), one of which each image gets.
OPERATIONS = (
    *("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y", "brightness", "contrast"),
    *("saturation", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
MAX_ROTATION = math.radians(135)
MAX_SHEAR = 0.99
MAX_TRANSLATION = 32  # pixels
MAX_ENHANCEMENT = 0.99
ERASED_AREA = (0.02, 1 / 3)  # of the image, Zhong et al., AAAI 2020
ERASED_ASPECT = (0.3, 1 / 0.3)
CROP_ASPECT = (3 / 4, 4 / 3)  # of a random resized crop, Szegedy et al., CVPR 2015
NOISE_FIELDS = 64

# One row of draws per image; the columns that `transforms.BatchAugmenter` reads, and how wide each is.
_WIDTHS = {
    "grid_x": 2,  # normalised source position (x, y) = grid_x * x + grid_y * y + grid_0
    "grid_y": 2,
    "grid_0": 2,
    "scale": 1,  # of the image, of its grey version, of its blurred version and of its mean grey, which are added
    "grey": 1,
    "blur": 1,
    "mean": 1,
    "autocontrast": 1,  # 1 where it applies
    "equalize": 1,
    "levels": 1,  # posterize to multiples of this grey value
    "solarize": 1,  # invert from this grey value on
    "erase": 4,  # box: centre y, centre x, half height, half width, in pixels
    "noise": 1,  # which field fills the erased box
    "cutmix": 4,  # box, as above
    "mixup": 1,  # the partner's weight outside of the box
    "partner": 1,  # the partner's weight in the target
}
_ENDS = np.cumsum(list(_WIDTHS.values())).tolist()
COLUMNS: dict[str, slice] = {
    name: slice(end - width, end) for (name, width), end in zip(_WIDTHS.items(), _ENDS, strict=True)
}


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied; the default varies nothing.

    Args:
        crop_padding: Pixels by which the image is padded on each side before a crop of its own size is taken.
        padding_mode: What lies outside of the image: ``zeros`` (black) or ``reflect``.
        crop_scale: Smallest share of the image's area that a random resized crop keeps; 1 takes none.
        flip: Mirror half of the images horizontally.
        trivial_augment: Apply one operation out of `OPERATIONS` to each image, of random strength, as TrivialAugment's
            wide space has them; translations reach 32 pixels, but at most half the image's side.
        trivial_augment_strength: Factor on the largest strength, in (0, 1].
        random_erasing: Probability that a box of 2 % to 33 % of the image is filled with noise.
        mixup: Alpha of mixup's beta distribution; 0 is none.
        cutmix: Alpha of CutMix' beta distribution; 0 is none. With both, each pair of images gets either.
        mix_probability: Share of the pairs of images which are mixed at all.
        label_smoothing: Share of the target's probability that is spread over all classes evenly.

    Raises:
        ValueError: A value is out of its range.
    """

    crop_padding: int = 0
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    crop_scale: float = 1.0
    flip: bool = False
    trivial_augment: bool = False
    trivial_augment_strength: float = 1.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        ends = dict.fromkeys(("crop_padding", "mixup", "cutmix"), math.inf)
        ends |= dict.fromkeys(("random_erasing", "mix_probability", "label_smoothing"), 1)
        for name, high in (ends | {"trivial_augment_strength": 1, "crop_scale": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= high or value == math.inf:
                raise ValueError(f"expected {name} between 0 and {high}, got {value!r}: choose one in between")
        if self.crop_padding != int(self.crop_padding):
            raise ValueError(f"expected crop_padding in whole pixels, got {self.crop_padding}: try 4")
        if self.crop_scale == 0:
            raise ValueError("expected crop_scale above 0, got 0: try 0.35, or 1 for no crop")
        if self.label_smoothing == 1 or self.trivial_augment_strength == 0:
            raise ValueError(
                "expected label_smoothing below 1 and trivial_augment_strength above 0, got "
                f"{self.label_smoothing} and {self.trivial_augment_strength}: the defaults are 0 and 1"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"expected {field.name} to be True or False, got {value!r}: give one of them")
        if self.padding_mode not in ("zeros", "reflect"):
            raise ValueError(f"expected padding_mode zeros or reflect, got {self.padding_mode!r}: choose one")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with a partner."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def moves(self) -> bool:
        """Whether pixels change places."""
        return self.crop_padding > 0 or self.crop_scale < 1 or self.flip or self.trivial_augment

    @property
    def interpolates(self) -> bool:
        """Whether pixels move by less than whole ones."""
        return self.crop_scale < 1 or self.trivial_augment


def draw_augmentation(
    augmentation: Augmentation, num_images: int, size: tuple[int, int], rng: np.random.Generator
) -> Floats:
    """Draw what happens to each image.

    Args:
        augmentation: Which variations there are, and how strong.
        num_images: Rows of the result. Rows 2j and 2j + 1 are partners in mixing, and agree on how.
        size: Height and width of the images, pixels.
        rng: Source of all randomness.

    Returns:
        (num_images, K), by `COLUMNS`.
    """
    table = np.zeros((num_images, _ENDS[-1]), np.float32)
    operation = np.zeros(num_images, np.int64)
    strength = np.zeros(num_images)
    if augmentation.trivial_augment:
        operation = rng.integers(len(OPERATIONS), size=num_images)
        strength = rng.uniform(-1, 1, num_images) * augmentation.trivial_augment_strength
    _draw_geometry(table, augmentation, operation, strength, size, rng)
    _set_colour(table, operation, strength)
    if augmentation.random_erasing > 0:
        _draw_erasing(table, augmentation.random_erasing, size, rng)
    if augmentation.mixes:
        _draw_mixing(table, augmentation, size, rng)
    return table


def _draw_geometry(
    table: Floats,
    augmentation: Augmentation,
    operation: npt.NDArray[np.int64],
    strength: npt.NDArray[np.float64],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    """One affine map from output to source position per image: crop o flip o operation, in pixels from the centre."""

    def of(name: str, largest: float) -> npt.NDArray[np.float64]:
        return np.where(operation == OPERATIONS.index(name), strength * largest, 0)

    height, width = size
    reach_y, reach_x = (min(MAX_TRANSLATION, side / 2) for side in size)
    angle, shear_x, shear_y = of("rotate", MAX_ROTATION), of("shear_x", MAX_SHEAR), of("shear_y", MAX_SHEAR)
    move_x, move_y = np.round(of("translate_x", reach_x)), np.round(of("translate_y", reach_y))
    padding = int(augmentation.crop_padding)
    shift = rng.integers(-padding, padding, size=(2, len(table)), endpoint=True)
    mirror = np.where(rng.random(len(table)) < 0.5, -1.0, 1.0) if augmentation.flip else np.ones(len(table))
    cosine, sine = np.cos(angle), np.sin(angle)
    # Positions are normalised to [-1, 1] over the image: a pixel is 2 / side.
    table[:, COLUMNS["grid_x"]] = np.stack([mirror * cosine, (sine + shear_y) * width / height], 1)
    table[:, COLUMNS["grid_y"]] = np.stack([mirror * (shear_x - sine) * height / width, cosine], 1)
    table[:, COLUMNS["grid_0"]] = np.stack(
        [(mirror * move_x + shift[0]) * 2 / width, (move_y + shift[1]) * 2 / height], 1
    )
    if augmentation.crop_scale < 1:
        _crop(table, augmentation.crop_scale, rng)


def _crop(table: Floats, scale: float, rng: np.random.Generator) -> None:
    """A box of the image fills the output: the map so far, scaled to the box and moved to its centre.

    A side that would be longer than the image's is cut to it.
    """
    area = rng.uniform(scale, 1, len(table))
    box = np.minimum(_sides(area, CROP_ASPECT, rng), 1)  # width, height, of the image's
    centre = (1 - box) * rng.uniform(-1, 1, (len(table), 2))
    for name in ("grid_x", "grid_y", "grid_0"):
        table[:, COLUMNS[name]] *= box
    table[:, COLUMNS["grid_0"]] += centre


def _set_colour(table: Floats, operation: npt.NDArray[np.int64], strength: npt.NDArray[np.float64]) -> None:
    """The enhancements are blends with a degenerate image, out = factor * image + (1 - factor) * degenerate."""

    def chosen(name: str) -> npt.NDArray[np.bool_]:
        return operation == OPERATIONS.index(name)

    def column(name: str) -> Floats:
        return table[:, COLUMNS[name].start]

    factor = 1 + strength * MAX_ENHANCEMENT
    enhanced = chosen("brightness") | chosen("contrast") | chosen("saturation") | chosen("sharpness")
    column("scale")[:] = np.where(enhanced, factor, 1)
    for name, degenerate in (("contrast", "mean"), ("saturation", "grey"), ("sharpness", "blur")):
        column(degenerate)[:] = np.where(chosen(name), 1 - factor, 0)
    for name in ("autocontrast", "equalize"):
        column(name)[:] = chosen(name)
    column("levels")[:] = np.where(chosen("posterize"), 2 ** np.round(6 * np.abs(strength)), 1)
    column("solarize")[:] = np.where(chosen("solarize"), np.round(255 * (1 - np.abs(strength))), 256)


def _draw_erasing(table: Floats, probability: float, size: tuple[int, int], rng: np.random.Generator) -> None:
    erased = rng.random(len(table)) < probability
    area = rng.uniform(*ERASED_AREA, len(table)) * size[0] * size[1]
    sides = np.clip(np.round(_sides(area, ERASED_ASPECT, rng)), 1, size) * erased[:, None]
    start = np.floor(rng.random((len(table), 2)) * (np.array(size) - sides + 1))
    table[:, COLUMNS["erase"]] = _box(start, start + sides)
    table[:, COLUMNS["noise"]] = rng.integers(NOISE_FIELDS, size=(len(table), 1))


def _sides(
    area: npt.NDArray[np.float64], aspects: tuple[float, float], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Both sides (N, 2) of boxes of these areas (N,), their ratio drawn evenly on a logarithmic scale."""
    low, high = map(math.log, aspects)
    aspect = np.exp(rng.uniform(low, high, len(area)))
    return np.sqrt(np.stack([area * aspect, area / aspect], 1))


def _draw_mixing(table: Floats, augmentation: Augmentation, size: tuple[int, int], rng: np.random.Generator) -> None:
    pairs = (len(table) + 1) // 2

    def weights(alpha: float) -> npt.NDArray[np.float64]:
        return rng.beta(alpha, alpha, pairs) if alpha > 0 else np.ones(pairs)

    mixed = rng.random(pairs) < augmentation.mix_probability
    cuts = rng.random(pairs) < (augmentation.cutmix > 0) * (0.5 if augmentation.mixup > 0 else 1.0)
    blended, kept = weights(augmentation.mixup), weights(augmentation.cutmix)
    sides = np.sqrt(1 - kept)[:, None] * np.array(size)
    centre = np.floor(rng.random((pairs, 2)) * size)
    start = np.clip(centre - np.floor(sides / 2), 0, size)
    end = np.clip(centre - np.floor(sides / 2) + np.floor(sides), 0, size)
    end = np.where((mixed & cuts)[:, None], end, start)
    weight = np.where(mixed & ~cuts, 1 - blended, 0)
    # The target follows the area that the clipped, whole pixels of the box really have.
    target = weight + np.prod(end - start, axis=1) / (size[0] * size[1])
    columns = np.concatenate([_box(start, end), weight[:, None], target[:, None]], 1)
    # The columns cutmix, mixup and partner are adjacent.
    table[:, COLUMNS["cutmix"].start : COLUMNS["partner"].stop] = np.repeat(columns, 2, axis=0)[: len(table)]


def _box(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centre and half side: pixel i is inside where abs(i - centre) < half, exact in float32."""
    return np.concatenate([(start + end - 1) / 2, (end - start) / 2], 1)
