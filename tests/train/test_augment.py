"""Augmentation: what each operation does to pixels, against Pillow, and to targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from timm_gac.data import Augmentation
from timm_gac.data.augment import COLUMNS, OPERATIONS, draw_augmentation
from timm_gac.data.transforms import BatchAugmenter, Normalizer

CPU = torch.device("cpu")
CLASSES = 5


def augment(pixels, augmentation, **columns):
    """One batch through the augmenter with some columns of the draws as given, and grey values as input."""
    shape = tuple(pixels.shape[1:])
    rng = np.random.default_rng(0)
    draws = torch.from_numpy(draw_augmentation(augmentation, len(pixels), shape[1:], rng))
    for name, value in columns.items():
        draws[:, COLUMNS[name]] = torch.as_tensor(value, dtype=torch.float32)
    normalizer = Normalizer((0.0,) * shape[0], (1 / 255,) * shape[0], CPU, torch.float32)
    labels = torch.arange(len(pixels)) % CLASSES
    return BatchAugmenter(augmentation, shape, CLASSES, normalizer, CPU)(pixels, labels, draws)


def test_crop_and_flip_move_pixels_exactly():
    images, padding = torch.randint(256, (64, 3, 8, 10), dtype=torch.uint8), 2
    for mode in ("zeros", "reflect"):
        augmentation = Augmentation(crop_padding=padding, flip=True, padding_mode=mode)
        moved, _ = augment(images, augmentation)
        np_mode = {"mode": "constant"} if mode == "zeros" else {"mode": "symmetric"}
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)), **np_mode)
        seen = set()
        for got, source in zip(moved.round(), padded, strict=True):
            crops = {
                (top, left, step): source[:, top : top + 8, left : left + 10][:, :, ::step]
                for top in range(5)
                for left in range(5)
                for step in (1, -1)
            }
            match = [place for place, crop in crops.items() if np.array_equal(crop, got.numpy())]
            assert len(match) == 1
            seen.add(match[0])
        assert len(seen) > 25  # of 50 places
        assert {place[2] for place in seen} == {1, -1}


def operation(name, strength, pixels, size):
    """The operation at a given strength in -1 to 1, as uint8."""

    class Fixed:
        def integers(self, low, high=None, size=None, endpoint=False):
            return np.full(size, OPERATIONS.index(name)) if low == len(OPERATIONS) else np.zeros(size, np.int64)

        def uniform(self, low, high, size):
            return np.full(size, strength)

    augmentation = Augmentation(trivial_augment=True)
    draws = torch.from_numpy(draw_augmentation(augmentation, len(pixels), size, Fixed()))
    normalizer = Normalizer((0.0,) * 3, (1 / 255,) * 3, CPU, torch.float32)
    augmenter = BatchAugmenter(augmentation, (3, *size), CLASSES, normalizer, CPU)
    images, _ = augmenter(pixels, torch.zeros(len(pixels), dtype=torch.int64), draws)
    return images.round().to(torch.uint8)


def pillow(name, strength, image):
    factor = 1 + 0.99 * strength
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(factor)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(6 * abs(strength)))
    if name == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - abs(strength))))
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    width, height = image.size
    if name.startswith("translate"):
        shift = round(strength * (width if name == "translate_x" else height) / 2)
        matrix = (1, 0, shift, 0, 1, 0) if name == "translate_x" else (1, 0, 0, 0, 1, shift)
    elif name == "rotate":
        return image.rotate(strength * 135, Image.Resampling.BILINEAR)
    elif name.startswith("shear"):
        slope = 0.99 * strength
        # Pillow's transform starts at the corner, ours at the centre.
        matrix = (
            (1, slope, -slope * height / 2, 0, 1, 0) if name == "shear_x" else (1, 0, 0, slope, 1, -slope * width / 2)
        )
    else:
        matrix = (1, 0, 0, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("strength", [-0.6, 0.35, 1.0])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "equalize"])
def test_operations_agree_with_pillow(name, strength):
    rng = np.random.default_rng(1)
    smooth = rng.integers(20, 200, size=(2, 5, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(array).resize((36, 32), Image.Resampling.BICUBIC) for array in smooth]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images]).transpose(0, 3, 1, 2).copy())
    got = operation(name, strength, pixels, (32, 36)).int()
    expected = np.stack([np.array(pillow(name, strength, image)) for image in images]).transpose(0, 3, 1, 2)
    off = (got - torch.from_numpy(expected.copy()).int()).abs()
    if name == "sharpness":  # Pillow leaves the border as it is
        off = off[..., 1:-1, 1:-1]
    if name in ("rotate", "shear_x", "shear_y"):
        # Outside of the image Pillow takes a pixel as in or out; ours fades over one pixel. White shows where.
        white = operation(name, strength, torch.full_like(pixels, 255), (32, 36))[0, 0].int()
        outline = torch.from_numpy(np.array(pillow(name, strength, Image.new("L", (36, 32), 255))).astype(np.int32))
        assert (white - outline).abs().max() < 255
        assert ((white == 255) & (outline == 255)).sum() > 300
        off = off * ((white == 255) & (outline == 255))
    assert off.max() <= 2
    if name != "identity" and not (name == "posterize" and strength == 0.35):
        assert (got != pixels.int()).float().mean() > 0.1


def test_equalize_makes_grey_values_uniform():
    pixels = (torch.rand(2, 3, 32, 32) ** 3 * 100 + 30).byte()
    pixels[1, 0] = 77  # a flat channel stays
    got = operation("equalize", 0.5, pixels, (32, 32))
    for before, after in zip(pixels.flatten(0, 1), got.flatten(0, 1), strict=True):
        if before.min() == before.max():
            assert torch.equal(before, after)
            continue
        values = before.flatten().int()
        below = (values[None] <= values[:, None]).sum(1)
        expected = (below - below.min()) / (values.numel() - below.min()) * 255
        torch.testing.assert_close(after.flatten().float(), expected, rtol=0, atol=0.501)


def test_trivial_augment_draws_every_operation():
    rng = np.random.default_rng(0)
    draws = draw_augmentation(Augmentation(trivial_augment=True), 14_000, (32, 32), rng)
    for name, rest in {"equalize": 0, "autocontrast": 0, "solarize": 256, "grey": 0, "blur": 0, "mean": 0}.items():
        share = float((draws[:, COLUMNS[name]] != rest).mean())
        assert abs(share * 14 - 1) < 0.15, name
    moved = (draws[:, : COLUMNS["grid_0"].stop] != np.array([1, 0, 0, 1, 0, 0])).any(1).mean()
    assert abs(moved * 14 - 5) < 0.4


def test_erasing_fills_boxes_of_the_right_size_with_noise():
    pixels = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    images, _ = augment(pixels, Augmentation(random_erasing=0.5))
    erased = (images != 0).all(1)
    share = erased.float().mean((1, 2))
    assert 0.42 < (share > 0).float().mean() < 0.58
    assert share[share > 0].min() > 0.01
    assert share.max() < 0.36
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.sum((1, 2)), rows * columns)  # boxes
    assert abs(images[erased[:, None].expand_as(images)].std() - 1) < 0.02


def test_the_area_of_cutmix_is_its_weight_in_the_target():
    count = 200
    # An image's grey value is its class, so pixels tell whose they are.
    pixels = (torch.arange(count) % CLASSES).byte()[:, None, None, None].expand(-1, 3, 9, 14)
    images, targets = augment(pixels, Augmentation(cutmix=1.0, mix_probability=0.8))
    shares = torch.stack([(images[:, 0].round() == label).float().mean((1, 2)) for label in range(CLASSES)], 1)
    torch.testing.assert_close(targets, shares)
    untouched = (targets.amax(1) == 1).float().mean()
    assert 0.15 < untouched < 0.4
    assert targets.amax(1).unique().numel() > 20


def test_mixup_blends_pairs_as_their_targets():
    pixels = (torch.arange(200) % CLASSES * 50).byte()[:, None, None, None].expand(-1, 3, 6, 6)
    images, targets = augment(pixels, Augmentation(mixup=1.0))
    expected = targets @ (torch.arange(CLASSES) * 50.0)
    torch.testing.assert_close(images, expected[:, None, None, None].expand_as(images), rtol=1e-4, atol=1e-3)
    assert 0.4 < (targets.amax(1) < 0.75).float().mean() < 0.6  # a uniform weight


def test_mixing_is_done_in_the_wanted_share_of_pairs():
    augmentation = Augmentation(mixup=0.4, cutmix=1.0, mix_probability=0.9)
    draws = draw_augmentation(augmentation, 20_000, (32, 32), np.random.default_rng(0))
    cut, blended = draws[:, COLUMNS["cutmix"].start + 2] > 0, draws[:, COLUMNS["mixup"].start] > 0
    assert not (cut & blended).any()
    assert abs(blended.mean() - 0.45) < 0.02
    assert 0.40 < cut.mean() < 0.47  # a few boxes are empty
    pairs = draws[:, COLUMNS["cutmix"].start : COLUMNS["partner"].stop].reshape(10_000, 2, -1)
    assert np.array_equal(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_padding": -1},
        {"crop_padding": 1.5},
        {"random_erasing": 1.1},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
        {"mix_probability": 2},
        {"label_smoothing": 1},
        {"trivial_augment_strength": 0},
        {"padding_mode": "edge"},
        {"flip": 0.5},
        {"crop_scale": 0},
        {"crop_scale": 1.2},
    ],
)
def test_augmentations_refuse_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


@pytest.mark.parametrize("flip", [False, True])
def test_random_resized_crops_lie_in_the_image_and_keep_their_share(flip):
    height, width, count = 24, 32, 500
    # Where a pixel comes from is its value: x in the first channel, y in the second.
    x, y = (
        torch.arange(width).float().expand(height, width),
        torch.arange(height).float()[:, None].expand(height, width),
    )
    pixels = torch.stack([x, y, x * 0]).expand(count, -1, -1, -1)
    got, _ = augment(pixels, Augmentation(crop_scale=0.3, flip=flip))
    inner = got[:, :, 6:-6, 8:-8]  # the outermost pixels may reach half a pixel beyond the border, where it is black
    step_x, step_y = inner[:, 0, 0].diff(dim=1), inner[:, 1, :, 0].diff(dim=1)
    for step in (step_x, step_y):  # an affine map
        torch.testing.assert_close(step, step[:, :1].expand_as(step), rtol=0, atol=1e-3)
    share_x, share_y = step_x[:, 0].abs(), step_y[:, 0]
    area, aspect = share_x * share_y, share_x / share_y
    assert 0.3 - 1e-3 < area.min() < 0.33 and 0.85 < area.max() < 1 + 1e-3
    assert 0.75 - 1e-3 < aspect.min() < 0.8 and 1.25 < aspect.max() < 4 / 3 + 1e-3
    for channel, share, side in ((0, share_x, width), (1, share_y, height)):
        centre = inner[:, channel].mean((1, 2)) + 0.5
        assert (centre - share * side / 2).min() > -1e-2 and (centre + share * side / 2).max() < side + 1e-2
        assert (centre - share * side / 2).max() > side / 5  # and they lie everywhere
    mirrored = (step_x[:, 0] < 0).float().mean()
    assert 0.4 < mirrored < 0.6 if flip else mirrored == 0


def test_equalising_the_marked_rows_alone_is_the_same():
    augmentation = Augmentation(trivial_augment=True, crop_scale=0.4)
    pixels, labels = torch.randint(256, (64, 3, 12, 12), dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    draws = torch.from_numpy(draw_augmentation(augmentation, 64, (12, 12), np.random.default_rng(0)))
    marked = int(draws[:, COLUMNS["equalize"]].sum())
    assert 0 < marked < 16
    normalizer = Normalizer((0.5,) * 3, (0.25,) * 3, CPU, torch.float32)
    augmenter = BatchAugmenter(augmentation, (3, 12, 12), CLASSES, normalizer, CPU)
    of_all, _ = augmenter(pixels, labels, draws)
    for count in (marked, marked + 5):
        torch.testing.assert_close(augmenter(pixels, labels, draws, count)[0], of_all, rtol=0, atol=0)
