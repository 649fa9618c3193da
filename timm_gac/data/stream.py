"""Images too large or too many to keep on the device: timm's data sets, transforms and loader, our augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor
from torch.utils.data import IterableDataset

from .augment import Augmentation, draw_augmentation
from .dataset import class_names, open_dataset
from .loader import check_sharding, check_start, generator
from .pictures import read_picture
from .transforms import BatchAugmenter, Normalizer


class _Order:
    """The sampler: indices of the coming epoch, set from outside."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class StreamLoader:
    """Batches of a timm data set, decoded by worker processes, augmented on the device.

    Order and parts are the same function of seed and epoch as `DeviceLoader`'s. The augmentation on the device is drawn
    by seed, epoch, step and rank, so two processes draw others than one. The workers' crops depend on the step at which
    the iteration began: an epoch resumed at ``start`` continues with the images that were left, but with other crops
    of them; with ``num_workers=0`` the crops follow the global random numbers. A data set that can only be read in
    sequence (``wds``, ``hfids``, ``tfds``) is shuffled and divided by timm; ``start`` reads what precedes it too.

    Args:
        loader: Of timm's `create_loader`, its normalisation left out (mean 0, std 1) and its sampler ours.
        augmenter: For training; None evaluates.
        normalizer: Maps grey values to the network's input.
        batch_size: Images per batch and process.
        seed: Of order and augmentation.
        rank: Of this process.
        world_size: Processes.
        images: In evaluation only so many, evenly spread over the set.

    Attributes:
        present_classes: As `open_test_set` sets it.

    Raises:
        ValueError: ``images`` is given for a set that can only be read in sequence.
    """

    def __init__(
        self,
        loader: Any,
        augmenter: BatchAugmenter | None,
        normalizer: Normalizer,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        images: int | None = None,
    ) -> None:
        self._loader, self._augmenter, self._normalizer = loader, augmenter, normalizer
        self._seed, self._rank, self.world_size = seed, rank, world_size
        self.batch_size, self.training = batch_size, augmenter is not None
        self.present_classes: list[int] | None = None
        self.label_names = class_names(loader.dataset)
        self._streams = isinstance(loader.dataset, IterableDataset)
        self._total = len(loader.dataset)
        self.num_images = self._total if images is None or self.training else min(images, self._total)
        if self._streams and self.num_images < self._total:
            raise ValueError("expected a data set that can be indexed to take some of its images, got a sequence")
        if not self._streams:
            self._sampler = _Order(self._own_part(0))
            loader.loader.batch_sampler.sampler = self._sampler
        # The seed that timm's workers get, new in each epoch.
        loader.loader.generator = self._worker_seeds = torch.Generator()

    def __len__(self) -> int:
        """Steps of an epoch on this process; of a data set read in sequence, timm's estimate."""
        if self._streams:
            return len(self._loader)
        if self.training:
            return self.num_images // (self.batch_size * self.world_size)
        return -(-len(self._own_part(0)) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from the step ``start``, as `DeviceLoader.batches` gives them.

        Raises:
            ValueError: ``epoch`` is negative, or ``start`` lies outside of the epoch.
        """
        check_start(len(self), epoch, start)
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        skip = start
        if self._streams:
            self._loader.dataset.set_epoch(epoch)
        else:
            self._sampler.indices, skip = self._own_part(epoch)[start * self.batch_size :], 0
            if not len(self._sampler):
                return
        seeds = generator("workers", self._seed, epoch, start, self._rank)
        self._worker_seeds.manual_seed(int(seeds.integers(2**63)))
        for step, (images, labels) in enumerate(self._loader, start - skip):
            if step < start:
                continue
            yield self._finished(images * 255, labels, epoch, step)

    def _finished(self, pixels: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        if self._augmenter is None:
            return self._normalizer.finish(self._normalizer(pixels)), labels
        rng = generator("augmentation", self._seed, epoch, step, self._rank)
        size = (pixels.shape[2], pixels.shape[3])
        draws = torch.from_numpy(draw_augmentation(self._augmenter.augmentation, len(pixels), size, rng))
        if pixels.device.type == "cuda":
            draws = draws.pin_memory()
        return self._augmenter(pixels.round(), labels, draws.to(pixels.device, non_blocking=True))

    def _own_part(self, epoch: int) -> list[int]:
        if not self.training:
            first, end = (self.num_images * rank // self.world_size for rank in (self._rank, self._rank + 1))
            return [index * self._total // self.num_images for index in range(first, end)]
        steps = len(self)
        order = generator("order", self._seed, epoch).permutation(self.num_images)
        order = order[: steps * self.world_size * self.batch_size]
        return order.reshape(steps, self.world_size, self.batch_size)[:, self._rank].flatten().tolist()


def create_stream_loaders(
    data: str,
    *,
    data_dir: str | None,
    image_size: int | tuple[int, int],
    batch_size: int,
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None,
    num_classes: int,
    seed: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    preprocessing: Mapping[str, Any] | None = None,
    **loader_options: Any,
) -> tuple[StreamLoader, StreamLoader]:
    """Loaders of the training and the test set.

    Args:
        data: Name as `timm.data.create_dataset` takes it.
        data_dir: Folder of the data set.
        image_size: Side of the crops, or height and width, pixels: a random resized crop in training, the centre in
            the test.
        batch_size: Images per batch and process.
        device: Where images and targets are to be.
        mean: Per channel, of values in [0, 1].
        std: Likewise.
        augmentation: After the crop, as `DeviceLoader` does it. None: none, also no mirroring.
        num_classes: Of the network.
        seed: Of order and augmentation.
        num_workers: Processes that decode, per set.
        rank: Of this process.
        world_size: Processes.
        dtype: Of the images that come out.
        preprocessing: A ``pretrained_cfg``, whose crop and interpolation the test images get, as in `open_test_set`.
        loader_options: For timm's `create_loader`, such as ``scale``, ``interpolation``, ``crop_pct``, ``color_jitter``
            and ``auto_augment``. Colour jitter is off unless given.

    Raises:
        ValueError: There is no such data set or it has more classes than the network; a number is out of its range.
    """
    check_sharding(batch_size, rank, world_size, seed)
    augmentation = augmentation or Augmentation()
    if augmentation.mixes and batch_size % 2:
        raise ValueError(f"expected an even batch_size to mix in pairs, got {batch_size}: add or drop one")
    if len(mean) != 3:
        raise ValueError(f"expected mean and std of 3 channels, got {len(mean)}: images are read as RGB")
    crop = resolve_data_config(pretrained_cfg=dict(preprocessing)) if preprocessing else {}
    test_options = {name: crop[name] for name in ("crop_pct", "crop_mode", "interpolation") if name in crop}
    device = torch.device(device)
    normalizer = Normalizer(mean, std, device, dtype)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (len(mean), height, width)
    augmenter = BatchAugmenter(
        augmentation,
        shape=size,
        num_classes=num_classes,
        normalizer=normalizer,
        device=device,
    )
    loaders: list[Any] = []
    names: tuple[str, ...] = ()
    for split, training in (("train", augmenter), ("test", None)):
        seeded = {"is_training": training is not None, "batch_size": batch_size, "seed": seed}
        dataset = open_dataset(data, split, data_dir, label_names=names, strict=True, **seeded)
        names = names or class_names(dataset)
        _check_dataset(dataset, split, batch_size * world_size if training else 1, num_classes)
        options: dict[str, Any] = {"is_training": training is not None, **loader_options}
        if training is None:
            options |= test_options
        loaders.append(
            create_plain_loader(
                dataset,
                input_size=size,
                batch_size=batch_size,
                device=device,
                num_workers=num_workers,
                **options,
            )
        )
    train, test = (
        StreamLoader(
            loader,
            augmenter=part,
            normalizer=normalizer,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for loader, part in zip(loaders, (augmenter, None), strict=True)
    )
    return train, test


def create_plain_loader(
    dataset: Any,
    input_size: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    num_workers: int,
    is_training: bool = False,
    **options: Any,
) -> Any:
    """Timm's loader of a data set, which leaves grey values as they are (in 0 to 1) for `StreamLoader`.

    Args:
        dataset: Of `timm.data.create_dataset`.
        input_size: C, H, W of the images.
        batch_size: Images a batch.
        device: Where they are to be.
        num_workers: Processes that decode.
        is_training: Random resized crops instead of the centre.
        options: For timm's `create_loader`.
    """
    from timm.data import create_loader

    common: dict[str, Any] = {"input_size": input_size, "batch_size": batch_size, "device": device}
    common |= {"num_workers": num_workers, "mean": (0.0,) * input_size[0], "std": (1.0,) * input_size[0]}
    common |= {"persistent_workers": False, "pin_memory": device.type == "cuda", "hflip": 0.0, "color_jitter": None}
    # Each process takes its part through the sampler: timm's own would need torch.distributed and repeat test images.
    loader = create_loader(dataset, is_training=is_training, distributed=False, **{**common, **options})
    if isinstance(dataset, IterableDataset):
        dataset.transform = _Decoded(dataset.transform, input_size[0])  # type: ignore[attr-defined]
    return loader


class _Decoded:
    """Pictures of a sequence, decoded as all others are, before timm's transform."""

    def __init__(self, transform: Callable[[Any], Any], channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, picture: Any) -> Any:
        return self.transform(read_picture(picture, self.channels, "a picture of the sequence"))


def _check_dataset(dataset: Any, split: str, needed: int, num_classes: int) -> None:
    if len(dataset) < needed:
        raise ValueError(
            f"expected at least {needed} images in the {split} set, got {len(dataset)}: lower batch_size, or check it"
        )
    if len(class_names(dataset)) > num_classes:
        count = len(class_names(dataset))
        raise ValueError(
            f"expected at most num_classes {num_classes} classes in the {split} set, got {count}: "
            f"create the network with num_classes={count}"
        )
