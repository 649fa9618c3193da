"""The data set that feeds every loop, resident on the device, and the clock, which its sampler reads.

A loop of another library is timed from within: it asks for one batch a step, so the time between two requests is that
of a step, whatever the loop does in it. Loops that fetch a batch ahead shift all requests by the same step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..harness import Row, Timing
from ..steps import synchronize

BLOCKS = 3  # timed at least
NOMINAL_STEPS = 100_000  # what len() of the loader says: schedules take it, and the clock ends the loop long before


class Clock:
    """Times a loop in blocks of steps, with a synchronisation at the end of each.

    Args:
        device: Where the loop computes.
        seconds: The loop ends with the first block after so many seconds, but not before `BLOCKS` of them.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        on_cuda = device.type == "cuda"
        self.device, self.seconds = device, seconds
        # Graphs are captured and algorithms chosen in the first steps.
        self.warmup, self.block = (12, 20) if on_cuda else (2, 1)
        self.steps, self.over = 0, False
        self.began = time.perf_counter()
        self.marks: list[float] = []

    def tick(self) -> bool:
        """Call before each step; False where the loop is to end."""
        step, self.steps = self.steps, self.steps + 1
        if self.over or step < self.warmup or (step - self.warmup) % self.block:
            return not self.over
        synchronize(self.device)
        self.marks.append(time.perf_counter())
        self.over = len(self.marks) > BLOCKS and self.marks[-1] - self.marks[0] >= self.seconds
        return not self.over

    def row(self, batch: int) -> Row:
        """Speed and spread of the timed blocks, and peak memory since `reset_memory`.

        Raises:
            ValueError: The loop ended before the clock did.
        """
        if not self.over:
            raise ValueError(f"expected the loop to go on until the clock ends it, got {self.steps} steps")
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        timing = Timing.of([1e3 * (end - begin) / self.block for begin, end in pairs])
        row: Row = {"images_per_s": 1e3 * batch / timing.median_ms, **asdict(timing)}
        row |= {"steps_per_block": self.block, "setup_s": self.marks[0] - self.began}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return row


def reset_memory(device: torch.device) -> None:
    """Count peak memory anew. Before a loop begins: tensors within a CUDA graph count while it is captured only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Ticks(Sampler[list[int]]):
    """Numbers of batches, in turn, until the clock is over: a batch sampler, which accelerate keeps as it is."""

    def __init__(self, clock: Clock, batches: int) -> None:
        self.clock, self.batches = clock, batches

    def __iter__(self) -> Iterator[list[int]]:
        while self.clock.tick():
            yield [self.clock.steps % self.batches]

    def __len__(self) -> int:
        return NOMINAL_STEPS


class ResidentBatches(Dataset[Any]):
    """A tensor data set on the device, given in whole batches: nothing is copied.

    Args:
        images: ``(N * B, C, H, W)``.
        labels: ``(N * B,)``.
        batch: B, images a batch.
        names: Keys of a batch as a dictionary; a pair where empty.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch: int, names: tuple[str, ...] = ()) -> None:
        self.images, self.labels, self.batch, self.names = images, labels, batch, names

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def __getitem__(self, index: int) -> Any:
        part = slice(index * self.batch, (index + 1) * self.batch)
        pair = self.images[part], self.labels[part]
        return dict(zip(self.names, pair, strict=True)) if self.names else pair

    def loader(self, clock: Clock) -> DataLoader[Any]:
        """PyTorch's loader of the batches, in turn until the clock is over."""
        return DataLoader(self, batch_sampler=Ticks(clock, len(self)), collate_fn=_whole_batch)


def _whole_batch(batches: list[Any]) -> Any:
    return batches[0]
