"""Augmentation of a whole batch on its device: each image has draws of its own; some sixty kernels in all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import COLUMNS, NOISE_FIELDS, Augmentation

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow makes grey
# Pillow's SMOOTH kernel is ones with a 5 in the middle, over 13: a mean of 3 x 3 pixels and the pixel itself.
SMOOTH_MEAN = 9 / 13
NOISE_SEED = 0x6AC


class Normalizer:
    """Grey values 0 to 255 to the network's input, (value / 255 - mean) / std, in channels_last.

    Args:
        mean: Per channel, of values in [0, 1].
        std: Likewise.
        device: Where the images are.
        dtype: Of the result.

    Raises:
        ValueError: ``mean`` and ``std`` differ in length, or a ``std`` is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        if len(mean) != len(std) or not len(mean):
            raise ValueError(f"expected one mean and one std per channel, got {len(mean)} and {len(std)}: match them")
        if not all(value > 0 for value in std):
            raise ValueError(f"expected a positive std per channel, got {tuple(std)}: give that of values in 0 to 1")
        self.dtype = dtype
        std_row = torch.tensor(std, dtype=torch.float32)
        scale, offset = 1 / (255 * std_row), -torch.tensor(mean, dtype=torch.float32) / std_row
        self.scale, self.offset = (row.view(1, -1, 1, 1).to(device) for row in (scale, offset))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of grey values, any dtype, to float32; `finish` makes the dtype and format."""
        return torch.addcmul(self.offset, images.float(), self.scale)

    def finish(self, images: Tensor) -> Tensor:
        """The wanted dtype in channels_last."""
        return images.to(self.dtype, memory_format=torch.channels_last)


class BatchAugmenter:
    """Carries out a table of draws on a batch.

    The host never waits for the device and never branches on a tensor's value: every batch launches the same kernels.

    Args:
        augmentation: What the table was drawn for.
        shape: C, H, W of the images.
        num_classes: Length of a target.
        normalizer: Maps grey values to the network's input.
        device: Where the images are.

    Raises:
        ValueError: The normaliser is for another number of channels.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        shape: tuple[int, int, int],
        num_classes: int,
        normalizer: Normalizer,
        device: torch.device,
    ) -> None:
        channels, height, width = shape
        self.augmentation, self.num_classes, self.normalizer = augmentation, num_classes, normalizer
        luma = LUMA if channels == 3 else (1 / channels,) * channels
        self._luma = torch.tensor(luma, device=device).view(1, -1, 1, 1)
        self._x = _centres(width).view(1, 1, width, 1).to(device)
        self._y = _centres(height).view(1, height, 1, 1).to(device)
        self._index = torch.arange(max(height, width), dtype=torch.float32, device=device)
        if augmentation.random_erasing > 0:
            # The same on every device and process: standard normal values of the network's input.
            noise = np.random.default_rng(NOISE_SEED).standard_normal((NOISE_FIELDS, *shape), np.float32)
            self._noise = torch.from_numpy(noise).to(device)

    def __call__(
        self, images: Tensor, labels: Tensor, draws: Tensor, equalized: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment and mix.

        Args:
            images: (B, C, H, W) grey values 0 to 255, uint8 or float.
            labels: (B,) int64.
            draws: (B, K) rows of `draw_augmentation`.
            equalized: At most so many rows are to be equalised, by far the dearest operation; None is any number.

        Returns:
            The network's input (B, C, H, W), channels_last, and targets (B, num_classes), float32 with sum 1.
        """
        pixels = images.float()
        if self.augmentation.moves:
            pixels = self._move(pixels, draws)
        if self.augmentation.trivial_augment:
            pixels = self._colour(pixels, draws, len(images) if equalized is None else equalized)
        inputs = self.normalizer(pixels)
        if self.augmentation.random_erasing > 0:
            noise = self._noise.index_select(0, draws[:, COLUMNS["noise"].start].long())
            inputs = torch.where(self._inside(draws[:, COLUMNS["erase"]], inputs.shape), noise, inputs)
        targets = self._targets(labels)
        if self.augmentation.mixes:
            inputs, targets = self._mix(inputs, targets, draws)
        return self.normalizer.finish(inputs), targets

    def _move(self, pixels: Tensor, draws: Tensor) -> Tensor:
        along_x, along_y, origin = (draws[:, None, None, COLUMNS[name]] for name in ("grid_x", "grid_y", "grid_0"))
        # No matrix product: where TF32 is on, it would move pixels by hundredths.
        grid = torch.addcmul(origin, self._x, along_x) + self._y * along_y
        # A crop and a mirror hit pixels, which `nearest` takes as they are.
        mode = "bilinear" if self.augmentation.interpolates else "nearest"
        padding = "reflection" if self.augmentation.padding_mode == "reflect" else "zeros"
        return F.grid_sample(pixels, grid, mode=mode, padding_mode=padding, align_corners=False)

    def _colour(self, pixels: Tensor, draws: Tensor, equalized: int) -> Tensor:
        """At most one of the operations differs from the identity in a row of draws, so that their order is free."""
        grey = (pixels * self._luma).sum(1, keepdim=True)
        low, high = _extremes(pixels)
        span = high - low
        stretched = _column(draws, "autocontrast").bool() & (span >= 1)
        stretch = 255 / span.clamp(min=1)
        scale = torch.where(stretched, stretch, _column(draws, "scale"))
        mean = grey.mean((2, 3), keepdim=True) * _column(draws, "mean")
        offset = torch.where(stretched, -low * stretch, mean)
        smooth = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        blur = _column(draws, "blur")
        changed = torch.addcmul(offset, pixels, scale + (1 - SMOOTH_MEAN) * blur)
        changed = changed.addcmul_(smooth, blur, value=SMOOTH_MEAN).addcmul_(grey, _column(draws, "grey"))
        changed = changed.clamp_(0, 255)
        if equalized:
            # Those to be equalised come first; which of the others fill up does not matter, they stay.
            rows = draws[:, COLUMNS["equalize"].start].topk(equalized).indices
            some, marks = changed.index_select(0, rows), draws.index_select(0, rows)
            some = torch.where(_column(marks, "equalize").bool(), _equalized(some), some)
            changed = changed.index_copy_(0, rows, some)
        # Whole grey values from here on, as Pillow has them after each operation.
        levels = _column(draws, "levels")
        changed = torch.div(changed + 0.5, levels, rounding_mode="floor") * levels
        return torch.where(changed >= _column(draws, "solarize"), 255 - changed, changed)

    def _inside(self, boxes: Tensor, shape: torch.Size) -> Tensor:
        """(B, 1, H, W), true within the boxes (B, 4)."""
        within = (self._index - boxes[:, :2, None]).abs() < boxes[:, 2:, None]  # (B, 2, max(H, W))
        rows, columns = within[:, 0, : shape[2]], within[:, 1, : shape[3]]
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def _targets(self, labels: Tensor) -> Tensor:
        smoothing = self.augmentation.label_smoothing
        rest = smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), rest, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - smoothing + rest)

    def _mix(self, inputs: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self._inside(draws[:, COLUMNS["cutmix"]], inputs.shape)
        weight = torch.maximum(boxes.float(), _column(draws, "mixup"))  # 1 in the box, mixup's weight elsewhere
        targets = torch.lerp(targets, _partners(targets), draws[:, COLUMNS["partner"]])
        return torch.lerp(inputs, _partners(inputs), weight), targets


def _centres(side: int) -> Tensor:
    """Positions of pixel centres where the image spans [-1, 1]."""
    return (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1


def _column(draws: Tensor, name: str) -> Tensor:
    return draws[:, COLUMNS[name], None, None]  # (B, 1, 1, 1)


def _partners(batch: Tensor) -> Tensor:
    """Rows 2j and 2j + 1 change places."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _extremes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    low, high = pixels.flatten(2).aminmax(dim=2)
    return low[..., None, None], high[..., None, None]  # (B, C, 1, 1)


def _equalized(pixels: Tensor) -> Tensor:
    """Histogram equalisation of each channel, out = 255 (cdf(v) - cdf(min)) / (H W - cdf(min)), a flat one unchanged.

    Pillow divides in whole numbers, which at 32 x 32 leaves a handful of grey values.
    """
    batch, channels, height, width = pixels.shape
    levels = (pixels + 0.5).long().flatten(2).flatten(0, 1)  # (B C, H W)
    rows = torch.arange(batch * channels, device=pixels.device)[:, None] * 256
    # One dimension: there scatter_add_ is deterministic wherever that is asked for, and integers always are.
    counts = torch.zeros(batch * channels * 256, dtype=torch.int32, device=pixels.device)
    flat = (levels + rows).flatten()
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    below = counts.view(-1, 256).cumsum(1, dtype=torch.float32)
    reached = below.gather(1, levels)
    lowest = reached.amin(1, keepdim=True)
    rest = height * width - lowest
    # A flat channel has rest = 0: its own values stand in.
    spread = torch.where(rest > 0, (reached - lowest) * (255 / rest.clamp(min=1)), levels.float())
    return spread.view(pixels.shape)
