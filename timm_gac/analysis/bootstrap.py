"""Whether one set of runs is better than another: a paired bootstrap over seeds and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gain:
    """Accuracy of runs against that of other runs on the same images.

    Attributes:
        accuracies: Of each run.
        against: Of each other run.
        gain: Difference of the means.
        low: Lower end of the interval that holds 95 % of the resampled gains.
        high: Its upper end.
        not_above: Share of the resampled gains that are 0 or less.
        seeds: Number of pairs of runs; with one the interval is over images alone.
        images: Number of images.
    """

    accuracies: tuple[float, ...]
    against: tuple[float, ...]
    gain: float
    low: float
    high: float
    not_above: float
    seeds: int
    images: int


def paired_bootstrap(correct: np.ndarray, against: np.ndarray, draws: int = 10_000, seed: int = 0) -> Gain:
    """Resample seeds and images, each with replacement and the same for both sides.

    Args:
        correct: Whether each run is right, (seeds, images).
        against: The same of the other runs, of the same seeds and on the same images in the same order.
        draws: Number of resamples.
        seed: Of the draws.

    Raises:
        ValueError: The shapes differ, or there is no run, no image or no draw.
    """
    if correct.ndim != 2 or correct.shape != against.shape or not correct.size:
        raise ValueError(
            f"expected two arrays (seeds, images) of one shape, got {correct.shape} and {against.shape}: pair the runs"
        )
    if draws < 1:
        raise ValueError(f"expected at least 1 draw, got {draws}: give such as 10000")
    difference = correct.astype(np.int8) - against.astype(np.int8)
    seeds, images = difference.shape
    rng, gains = np.random.default_rng(seed), np.empty(draws)
    for draw in range(draws):
        counts = np.bincount(rng.integers(0, seeds, seeds), minlength=seeds)
        weighted = counts @ difference  # [images], the seeds drawn
        gains[draw] = weighted[rng.integers(0, images, images)].mean() / seeds
    low, high = np.quantile(gains, (0.025, 0.975))
    return Gain(
        accuracies=tuple(correct.mean(1).tolist()),
        against=tuple(against.mean(1).tolist()),
        gain=float(difference.mean()),
        low=float(low),
        high=float(high),
        not_above=float((gains <= 0).mean()),
        seeds=seeds,
        images=images,
    )
