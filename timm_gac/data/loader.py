"""Small images on the device: decoded once, kept there as uint8, shuffled, augmented and normalised in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .arrays import ImageArrays
from .augment import COLUMNS, Augmentation, draw_augmentation
from .transforms import BatchAugmenter, Normalizer

_Epoch = tuple[np.ndarray, np.ndarray]  # order of the images, and what happens at each place
_PURPOSES = ("order", "augmentation", "workers")


def generator(purpose: str, *keys: int) -> np.random.Generator:
    """Random numbers, a pure function of the purpose (``order``, ``augmentation``, ``workers``) and the keys."""
    return np.random.default_rng([_PURPOSES.index(purpose), *keys])


class DeviceLoader:
    """Batches of a set of small images that lies whole on the device.

    In training an epoch is one permutation of the set, cut into batches of ``batch_size * world_size``. Each process
    takes its part of a batch, and the last, incomplete batch is dropped. The augmentation is drawn by an image's place
    in the epoch. Everything is a pure function of seed and epoch: two processes with batches of 64 see what one with
    128 sees (with an even ``batch_size``, also the same pairs mixed), and epoch and step are enough to resume.
    In evaluation the processes take consecutive parts of the set, in order, each image once.

    No step waits for the device. The draws of a whole epoch, some 100 bytes an image, are made on the host by a thread
    during the epoch before. On a GPU a training batch is made on a stream of its own, during the step before it: its
    many small kernels leave most of the GPU idle.

    Args:
        arrays: The images.
        batch_size: Images per batch and process.
        device: Where images and targets are to be.
        mean: Per channel, of values in [0, 1].
        std: Likewise.
        augmentation: Of training images; None is none, as ``Augmentation()``.
        num_classes: Of the network.
        seed: Of order and augmentation.
        training: Shuffle, augment, and give targets as probabilities.
        rank: Of this process.
        world_size: Processes.
        dtype: Of the images that come out.

    Attributes:
        present_classes: As `open_test_set` sets it.

    Raises:
        ValueError: A label is no class of the network; the batches of all processes exceed the training set;
            ``mean`` has another length than the images have channels; an odd ``batch_size`` is to be mixed in pairs.
    """

    def __init__(
        self,
        arrays: ImageArrays,
        batch_size: int,
        *,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None,
        num_classes: int,
        seed: int,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_sharding(batch_size, rank, world_size, seed)
        augmentation = augmentation or Augmentation()
        _check_set(arrays, batch_size * world_size if training else 0, num_classes, len(mean))
        if training and augmentation.mixes and batch_size % 2:
            raise ValueError(f"expected an even batch_size to mix in pairs, got {batch_size}: add or drop one")
        self.batch_size, self.training, self.rank, self.world_size = batch_size, training, rank, world_size
        self.present_classes: list[int] | None = None
        self.num_images, self.seed, self.augmentation = len(arrays.labels), seed, augmentation
        self.device = torch.device(device)
        images, labels = arrays.images, arrays.labels
        if not training:
            part = slice(self.num_images * rank // world_size, self.num_images * (rank + 1) // world_size)
            images, labels = images[part], labels[part]
        self._images, self._labels = images.to(self.device), labels.to(self.device)
        self._size = (images.shape[2], images.shape[3])
        self._normalizer = Normalizer(mean, std, self.device, dtype)
        self._augmenter = BatchAugmenter(
            augmentation,
            shape=(images.shape[1], *self._size),
            num_classes=num_classes,
            normalizer=self._normalizer,
            device=self.device,
        )
        self._ahead: tuple[int, Future[_Epoch]] | None = None
        self._thread = ThreadPoolExecutor(1, "draws")
        self._stream = torch.cuda.Stream(self.device) if training and self.device.type == "cuda" else None

    def __len__(self) -> int:
        """Steps of an epoch on this process."""
        if self.training:
            return self.num_images // (self.batch_size * self.world_size)
        return -(-len(self._labels) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch.

        Args:
            epoch: Which; in evaluation all are the same.
            start: First step to give, as after an interruption: the tail of what ``start=0`` gives, bit for bit.

        Returns:
            Pairs of images (B, C, H, W), channels_last and normalised, and targets: in training probabilities
            (B, num_classes), in evaluation labels (B,), int64.

        Raises:
            ValueError: ``epoch`` is negative, or ``start`` lies outside of the epoch.
        """
        check_start(len(self), epoch, start)
        if not self.training:
            return self._evaluation_batches(start)
        batches = self._training_batches(epoch, start)
        return batches if self._stream is None else one_ahead(batches, self._stream)

    def _training_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._ahead is not None and self._ahead[0] == epoch:
            order, draws = self._ahead[1].result()
        else:
            order, draws = self._draw(epoch)
        self._ahead = epoch + 1, self._thread.submit(self._draw, epoch + 1)
        marked = draws[:, COLUMNS["equalize"].start].reshape(-1, self.batch_size).sum(1)
        equalized = int(marked.max(initial=0))
        own_order, own_draws = self._upload(order, start), self._upload(draws, start)
        for index, rows in zip(own_order.unbind(), own_draws.unbind(), strict=True):
            images, labels = self._images.index_select(0, index), self._labels.index_select(0, index)
            yield self._augmenter(images, labels, rows, equalized)

    def _draw(self, epoch: int) -> _Epoch:
        used = len(self) * self.batch_size * self.world_size
        order = generator("order", self.seed, epoch).permutation(self.num_images)[:used]
        draws = draw_augmentation(self.augmentation, used, self._size, generator("augmentation", self.seed, epoch))
        return order, draws

    def _upload(self, places: np.ndarray, start: int) -> Tensor:
        """This process' part (steps, B, ...) of what is given for each place of the epoch."""
        shape = (len(self), self.world_size, self.batch_size, *places.shape[1:])
        part = torch.from_numpy(np.ascontiguousarray(places.reshape(shape)[start:, self.rank]))
        if self.device.type == "cuda":
            part = part.pin_memory()  # so that the copy is queued and the host goes on
        return part.to(self.device, non_blocking=True)

    def _evaluation_batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start * self.batch_size, len(self._labels), self.batch_size):
            part = slice(first, first + self.batch_size)
            images = self._normalizer(self._images[part])
            yield self._normalizer.finish(images), self._labels[part]


def one_ahead(batches: Iterator[tuple[Tensor, Tensor]], stream: torch.cuda.Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, each made on a stream while the step before it runs on the current one.

    The stream waits for all work but that step's: so one batch is made ahead, not many, and memory of a batch that is
    no longer held is written anew only after the step that read it.

    Args:
        batches: Makes a batch on the current stream when asked for the next.
        stream: Another stream, of the same device.
    """

    def begin() -> tuple[Tensor, Tensor] | None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            return next(batches, None)

    ahead = begin()
    while ahead is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)  # before the next batch is begun there
        batch, ahead = ahead, begin()
        yield batch


def check_start(steps: int, epoch: int, start: int) -> None:
    """Refuse to begin outside of an epoch of so many steps.

    Raises:
        ValueError: ``epoch`` is negative, or ``start`` lies outside of the epoch.
    """
    if epoch < 0 or not 0 <= start <= steps:
        raise ValueError(
            f"expected epoch >= 0 and start in 0 to {steps}, got {epoch} and {start}: "
            "resume with the same set and batch size as before"
        )


def check_sharding(batch_size: int, rank: int, world_size: int, seed: int) -> None:
    """Refuse numbers that no loader can work with.

    Raises:
        ValueError: One is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}: raise it")
    if not 0 <= rank < world_size:
        raise ValueError(f"expected rank in 0 to world_size - 1, got {rank} of {world_size}: see accelerate's state")
    if seed < 0:
        raise ValueError(f"expected a seed of at least 0, got {seed}: choose another")


def _check_set(arrays: ImageArrays, needed: int, num_classes: int, channels: int) -> None:
    if arrays.images.shape[1] != channels:
        raise ValueError(
            f"expected images of {channels} channels as mean and std have values, got {arrays.images.shape[1]}: "
            "match them, and the network's in_chans"
        )
    if arrays.num_classes > num_classes:
        raise ValueError(
            f"expected labels below num_classes {num_classes}, got {arrays.num_classes} classes in the data: "
            f"create the network with num_classes={arrays.num_classes}"
        )
    if len(arrays.labels) < needed:
        raise ValueError(
            f"expected at least {needed} images for a batch on all processes, got {len(arrays.labels)}: "
            "lower batch_size"
        )
