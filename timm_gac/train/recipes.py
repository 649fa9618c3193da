"""Recipes: everything that decides what a training run computes, as frozen data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..data import Augmentation

__all__ = ["RECIPES", "Recipe"]

PRECISIONS = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adamw"),
    "loss": ("mean", "tet"),
    "report": ("ema", "model"),
    "precision": PRECISIONS,
    "stored_dtype": PRECISIONS,
}
_AT_LEAST: dict[str, float] = {
    "num_steps": 1, "epochs": 1, "batch_size": 1, "warmup_epochs": 0, "min_lr": 0, "weight_decay": 0, "momentum": 0,
    "clip_grad": 0, "grad_accumulation": 1, "mix_off_epochs": 0, "eval_every": 1, "freeze_stages": 0, "seed": 0,
    "tet_lambda": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One training recipe. Every field is an option of ``timm-gac train``.

    Args:
        model: Name of a registered model.
        num_steps: Time steps T.
        data: What to train on: an .npz file with images and labels, or any name that timm.data.create_dataset takes.
        data_dir: Folder of that data set.
        dataset: Its name in results and model cards.
        image_size: Side of the images in pixels; None keeps that of the set (small images) or 224 (streamed ones).
        stream: Decode images while training, for sets that do not fit on the device.
        num_workers: Processes that decode images.
        init: Start from these weights: a name.tag, ``hf-hub:...`` or ``local-dir:...``; a classifier of another size
            starts afresh, temporal weights are resampled to T.
        freeze_stages: Keep the stem, the encoder and this many stages less one as they are; 0 trains everything.
        layer_decay: Factor of the learning rate per layer, counted from the classifier; None is the same for all.
        epochs: Passes over the training set.
        batch_size: Images per step and process. A run can go on with another number of processes where processes times
            batch_size stays the same.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up.
        momentum: Of SGD.
        weight_decay: Of weights; never of norms, biases and the encoder's attention.
        clip_grad: Largest norm of the gradient; 0 for none.
        grad_accumulation: Steps whose gradients are added up before an update.
        ema_decay: Decay a step of the weights' exponential moving average; 0 for none.
        report: Whether the moving average (``ema``) or the ``model`` itself is evaluated, reported and stored.
        loss: ``mean``: cross entropy of the mean logits; ``tet``: mean over time steps of each step's cross entropy
            (Deng et al., ICLR 2022), with a share of `tet_lambda` pulling logits towards the threshold.
        tet_lambda: Share of that regulariser.
        label_smoothing: Of the targets.
        crop_padding: Random crops after padding by so many pixels.
        crop_scale: Random resized crops of at least this share of the image's area; 1 for none. Streamed images have
            such crops of their own already.
        flip: Mirror half of the images.
        trivial_augment: One random operation an image (Müller and Hutter, ICCV 2021).
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mix_probability: Probability that an image is mixed.
        mix_off_epochs: Last epochs without mixing, trivial augment and erasing.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        precision: ``bfloat16`` and ``float16`` are autocast.
        channels_last: Memory format of weights and images.
        compile: Use torch.compile.
        cuda_graph: Run the whole step as one CUDA graph, on any number of CUDA devices; not with float16, stream or
            grad_accumulation.
        pack_spikes: Keep spikes bit-packed for the backward pass: less memory, somewhat slower.
        sync_bn: Batch norm over all processes.
        seed: Of weights, order and augmentation.
        eval_every: Epochs between evaluations on the test set, of which only the last counts.
        stored_dtype: Of the weights in the final model folder.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    model: str = "gac_msresnet18_cifar"
    num_steps: int = 4
    data: str = "torch/cifar100"
    data_dir: str | None = None
    dataset: str = "cifar100"
    image_size: int | None = None
    stream: bool = False
    num_workers: int = 4
    init: str | None = None
    freeze_stages: int = 0
    layer_decay: float | None = None
    epochs: int = 200
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_grad: float = 0.0
    grad_accumulation: int = 1
    ema_decay: float = 0.0
    report: str = "model"
    loss: str = "mean"
    tet_lambda: float = 0.05
    label_smoothing: float = 0.0
    crop_padding: int = 4
    crop_scale: float = 1.0
    flip: bool = True
    trivial_augment: bool = False
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_off_epochs: int = 0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False
    pack_spikes: bool = False
    sync_bn: bool = False
    seed: int = 0
    eval_every: int = 10
    stored_dtype: str = "float16"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} out of {choices}, got {getattr(self, name)!r}: choose one of these")
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)!r}: give a larger one")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"expected ema_decay in [0, 1), got {self.ema_decay!r}: give one such as 0.999, or 0")
        if not self.lr > 0:
            raise ValueError(f"expected lr > 0, got {self.lr!r}: give one such as 0.1")
        if self.report == "ema" and self.ema_decay == 0:
            raise ValueError("expected ema_decay > 0 with report='ema', got 0: set ema_decay or report='model'")
        if self.mix_off_epochs > self.epochs:
            raise ValueError(f"expected mix_off_epochs <= epochs, got {self.mix_off_epochs} of {self.epochs}: lower it")
        self.augmentation(last=False)  # its own fields have checks of their own

    def augmentation(self, last: bool) -> Augmentation:
        """Augmentation of the epochs with mixing, or of the ``last`` ones without."""
        strong: dict[str, Any] = {}
        if not last:
            strong = dict(
                trivial_augment=self.trivial_augment, random_erasing=self.random_erasing, mixup=self.mixup,
                cutmix=self.cutmix, mix_probability=self.mix_probability,
            )  # fmt: skip
        return Augmentation(
            crop_padding=self.crop_padding, crop_scale=self.crop_scale, flip=self.flip,
            label_smoothing=self.label_smoothing, **strong,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


Name = Literal["cifar10", "cifar100", "cifar100_fast", "imagenet"]

_PAPER_CIFAR = Recipe(
    epochs=250, batch_size=64, weight_decay=5e-5, warmup_epochs=0, cutmix=1.0, mix_probability=0.5
)  # fmt: skip

# Photographs of 64 to 144 pixels, resized: a network that halves the image five times wants 128. Training has two
# phases, the first at few time steps on smaller images.
_PHOTOS = Recipe(
    model="gac_msresnet34",
    image_size=128,
    batch_size=256,
    weight_decay=3e-4,
    ema_decay=0.999,
    report="ema",
    loss="tet",
    tet_lambda=0.0,
    label_smoothing=0.1,
    crop_padding=0,
    crop_scale=0.4,
    trivial_augment=True,
    cutmix=1.0,
    mix_probability=0.5,
    precision="bfloat16",
    cuda_graph=True,
    eval_every=10,
)
_FIRST_PHASE = dataclasses.replace(_PHOTOS, num_steps=2, image_size=96, lr=0.2, min_lr=0.1, warmup_epochs=3.0)
_LAST_PHASE = dataclasses.replace(_PHOTOS, lr=0.1, warmup_epochs=1.0, mix_off_epochs=5)

# cifar10, cifar100 and imagenet follow the published hyper-parameters (Qiu et al., AAAI 2024), but report the last
# epoch where the paper reports the best one on the test set.
RECIPES: dict[str, Recipe] = {
    "cifar10": dataclasses.replace(_PAPER_CIFAR, data="torch/cifar10", dataset="cifar10"),
    "cifar100": _PAPER_CIFAR,
    "cifar100_fast": Recipe(
        epochs=165,
        lr=0.1,
        warmup_epochs=3.0,
        ema_decay=0.999,
        report="ema",
        loss="tet",
        tet_lambda=0.0,
        label_smoothing=0.1,
        trivial_augment=True,
        cutmix=1.0,
        mix_probability=0.5,
        mix_off_epochs=8,
        precision="bfloat16",
        cuda_graph=True,
    ),
    "tiny_imagenet_first": dataclasses.replace(_FIRST_PHASE, data="", dataset="tiny_imagenet", epochs=77),
    "tiny_imagenet": dataclasses.replace(_LAST_PHASE, data="", dataset="tiny_imagenet", epochs=54),
    "in293_first": dataclasses.replace(_FIRST_PHASE, data="", dataset="in293", epochs=47, weight_decay=2e-4),
    "in293": dataclasses.replace(_LAST_PHASE, data="", dataset="in293", epochs=32, weight_decay=2e-4),
    "imagenet": Recipe(
        model="gac_msresnet34",
        data="",
        dataset="imagenet",
        stream=True,
        num_workers=16,
        epochs=250,
        batch_size=256,  # of all processes: with eight of them give --batch-size 32
        weight_decay=1e-5,
        warmup_epochs=0,
        label_smoothing=0.1,
        cutmix=1.0,
        crop_padding=0,
        sync_bn=True,
        precision="bfloat16",
    ),
}
