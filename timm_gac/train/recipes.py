"""Recipes: all settings that decide the result of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..data import Augmentation

PRECISIONS = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str, ...]] = {
    "gate": ("full", "spatial", "temporal", "half", "open"),  # `layers.encoder.GATES`, which imports PyTorch
    "neuron": ("lif", "plif", "plif_channel", "ternary", "integer", "adaptive"),  # and those registered, likewise
    "optimizer": ("sgd", "adamw"),
    "loss": ("mean", "tet"),
    "report": ("ema", "model"),
    "precision": PRECISIONS,
    "stored_dtype": PRECISIONS,
}
_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("num_steps", "epochs", "batch_size", "grad_accumulation", "eval_every"), 1),
    **dict.fromkeys(("warmup_epochs", "min_lr", "weight_decay", "momentum", "clip_grad", "mix_off_epochs"), 0),
    **dict.fromkeys(
        ("freeze_stages", "seed", "tet_lambda", "holdout", "current_noise", "gate_decay", "num_workers"), 0
    ),
}
# Temperatures of distillation. The square of a high one multiplies the rounding of a divergence: with logits of
# standard deviation 3 the loss in float32 was 3e-5 of it off at 100, 3e-3 at 1,000 and 0.16 at 10,000.
_COLDEST, _HOTTEST = 0.01, 100.0
# Fields of the augmentation, and those that the last epochs do without.
_WEAK = ("crop_padding", "crop_scale", "flip", "label_smoothing")
_STRONG = ("trivial_augment", "random_erasing", "mixup", "cutmix", "mix_probability")


def _is_registered(neuron: str) -> bool:
    """Whether somebody registered a neuron of this name, whose module has imported PyTorch then."""
    from gac_kernels.registry import neuron_names

    return neuron in neuron_names()


@dataclass(frozen=True)
class Recipe:
    """A training recipe. Every field is an option of ``timm-gac train``.

    Args:
        model: Name of a registered model; an ANN, such as ``ann_resnet18_cifar``, too.
        num_steps: Time steps T; an ANN has one, whatever the recipe says, and takes no other.
        gate: Which attention the gate of gated attention coding has: ``full``, ``spatial`` or ``temporal`` alone,
            ``half`` (always 0.5) or ``open`` (always 1: plain spikes).
        data: Training data: an .npz file with images and labels, or a name that timm.data.create_dataset takes.
        data_dir: Folder of that data set.
        dataset: Name of the data set in results and model cards.
        image_size: Height and width of the images; None keeps the data set's, or is 224 for streamed images.
        stream: Decode images while training, for data sets that do not fit into the device's memory.
        num_workers: Processes that decode images.
        holdout: Share of each class's training images that is set aside as a validation split, to choose settings on:
            0.1 is 50 of 500. The split does not depend on ``seed``. All figures of the run are then those of this
            split, and the test set is not read; evaluate the finished model on it with ``timm-gac eval``.
        init: Initial weights: a name.tag, a model or run folder, or ORG/NAME on the Hub, also with ``local-dir:`` or
            ``hf-hub:`` before. A classifier of another size is initialised randomly, temporal weights are resampled to
            T. They bring the model and, where these are left out here, its gate and neuron.
        freeze_stages: Freeze the stem and the encoder (1), also the first stage (2), and so on; 0 trains everything.
        layer_decay: Factor of the learning rate per layer, counted from the classifier; None for equal rates.
        epochs: Passes over the training set.
        batch_size: Images per step and process. A run can be resumed with another number of processes if processes
            times batch_size stays the same.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up, at most half of the run.
        gate_lr: Learning rate of the encoder's attention as a factor of the others'. gate.csv and gate.png in the run's
            folder show what the gate does at each evaluation.
        neuron_lr: Learning rate of learned decays and thresholds as a factor of the others'.
        momentum: Momentum of SGD.
        weight_decay: Weight decay, which leaves out norms, biases and the encoder's attention.
        gate_decay: Weight decay of the encoder's attention as a factor of the others'.
        clip_grad: Largest norm of the gradient; 0 for no clipping.
        grad_accumulation: Steps over which gradients are accumulated before an update. The run's last step updates
            with what has accumulated by then.
        ema_decay: Decay per step of the exponential moving average of the weights; 0 for none.
        report: Whether the moving average (``ema``) or the ``model`` itself is evaluated and stored.
        loss: ``mean``: cross entropy of the mean logits; ``tet``: mean over time steps of each step's cross entropy
            (Deng et al., ICLR 2022), with a regulariser that pulls logits towards the threshold; for an ANN ``mean``,
            which is plain cross entropy there.
        tet_lambda: Weight of that regulariser.
        label_smoothing: Label smoothing of the targets.
        crop_padding: Random crops after padding by so many pixels.
        crop_scale: Random resized crops of at least this share of the image's area; 1 for none. Streamed images have
            such crops of their own already.
        flip: Mirror half of the images.
        trivial_augment: One random operation per image (Müller and Hutter, ICCV 2021).
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mix_probability: Probability that an image is mixed.
        mix_off_epochs: Number of last epochs without mixing, trivial augment and erasing.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        current_noise: Standard deviation of Gaussian noise on the input current of all neurons, in training only, as a
            share of the threshold; 0 for none.
        precision: ``bfloat16`` and ``float16`` are autocast.
        int8_convs: Train the 3x3 convolutions of spikes in 8 bits: int8 weights forward, float8 gradients backward.
            The stored folder holds the integers. Its kernels want a GPU with float8 (Ada, Hopper or later); elsewhere
            float32 convolutions of the same integers do, slower than without.
        channels_last: Store weights and images channels-last.
        compile: Use torch.compile.
        cuda_graph: Run the whole step as one CUDA graph, on any number of CUDA devices; not with float16, stream or
            grad_accumulation.
        pack_spikes: Save spikes as bits for the backward pass: less memory, somewhat slower.
        sync_bn: Batch norm over all processes.
        seed: Seed of weights, order and augmentation.
        eval_every: Epochs between evaluations on the test set, or the split set aside; the last one is reported.
        stored_dtype: Dtype of the weights in the final model folder.
        teacher: Trained network to distil from: a model or run folder, ORG/NAME on the Hub, or a registered name.tag;
            None for none. It answers each batch as the student sees it, augmented and mixed, at its own number of time
            steps, and must have the same classes and input channels.
        distill_weight: Share, from 0 to 1, of the distillation loss in the whole (Hinton et al., arXiv 1503.02531): the
            divergence of the student's probabilities, with ``tet`` of those of each step, from the teacher's. The rest
            is the loss of the labels. It wants a teacher.
        distill_temperature: Temperature, from 0.01 to 100, that divides the logits of both in that loss, whose square
            multiplies it. It wants a teacher.
        neuron: ``lif``: decay and threshold as published; ``plif``: they are learned, one of each a layer, or
            ``plif_channel``, one of each a channel; ``ternary``, ``integer`` or ``adaptive``: see `LIFSpec`; or one
            of your own that is registered.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    model: str = "gac_msresnet18_cifar"
    num_steps: int = 4
    gate: str = "full"
    data: str = "torch/cifar100"
    data_dir: str | None = None
    dataset: str = "cifar100"
    image_size: int | None = None
    stream: bool = False
    num_workers: int = 4
    holdout: float = 0.0
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
    int8_convs: bool = False
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False
    pack_spikes: bool = False
    sync_bn: bool = False
    seed: int = 0
    eval_every: int = 10
    stored_dtype: str = "float16"
    neuron: str = "lif"
    gate_lr: float = 1.0
    neuron_lr: float = 1.0
    current_noise: float = 0.0
    gate_decay: float = 0.0
    teacher: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 4.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices and not (name == "neuron" and _is_registered(self.neuron)):
                remedy = ", or import the module that registers it (--plugin my_neuron.py)" * (name == "neuron")
                raise ValueError(
                    f"expected {name} out of {choices}, got {getattr(self, name)!r}: choose one of these{remedy}"
                )
        for name in ("init", "teacher"):
            if (given := getattr(self, name)) in ("", "local-dir:", "hf-hub:"):
                raise ValueError(
                    f"expected {name} as the name of a network, got {given!r}: name one, or leave --{name} out"
                )
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)!r}: give a larger one")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"expected ema_decay in [0, 1), got {self.ema_decay!r}: give one such as 0.999, or 0")
        if not self.lr > 0:
            raise ValueError(f"expected lr > 0, got {self.lr!r}: give one such as 0.1")
        if self.min_lr > self.lr:
            raise ValueError(f"expected min_lr of at most lr={self.lr!r}, got {self.min_lr!r}: lower it, or raise lr")
        if self.momentum >= 1:
            raise ValueError(f"expected momentum in [0, 1), got {self.momentum!r}: give one such as 0.9")
        if self.layer_decay is not None and not self.layer_decay > 0:
            raise ValueError(f"expected layer_decay > 0, got {self.layer_decay!r}: give one such as 0.75, or none")
        for name in ("gate_lr", "neuron_lr"):
            if not (factor := getattr(self, name)) >= 0:
                raise ValueError(f"expected {name} >= 0, got {factor!r}: give one such as 0.1, or 0 to freeze it")
        if not 0.0 <= self.distill_weight <= 1.0:
            raise ValueError(f"expected distill_weight from 0 to 1, got {self.distill_weight!r}: give one such as 0.5")
        if not _COLDEST <= self.distill_temperature <= _HOTTEST:
            raise ValueError(
                f"expected distill_temperature from {_COLDEST} to {_HOTTEST:g}, got {self.distill_temperature!r}: give "
                "one such as 4, or 1"
            )
        if not self.holdout <= 0.5:
            raise ValueError(f"expected holdout from 0 to 0.5, got {self.holdout!r}: give one such as 0.1")
        if self.holdout and self.stream:
            raise ValueError(
                "expected images in memory for holdout, got stream: leave one out, or make a train and a val folder"
            )
        if self.report == "ema" and self.ema_decay == 0:
            raise ValueError("expected ema_decay > 0 with report='ema', got 0: set ema_decay or report='model'")
        if self.mix_off_epochs > self.epochs:
            raise ValueError(f"expected mix_off_epochs <= epochs, got {self.mix_off_epochs} of {self.epochs}: lower it")
        for name, number in vars(self).items():
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"expected a finite {name}, got {number!r}: give another, or leave it out")
        self.augmentation(last=False)  # checks its own fields

    def augmentation(self, last: bool) -> Augmentation:
        """Augmentation of most epochs, or of the ``last`` ones without mixing."""
        names = _WEAK if last else (*_WEAK, *_STRONG)
        return Augmentation(**{name: getattr(self, name) for name in names})

    @property
    def eval_split(self) -> str:
        """What a run is evaluated on: ``test``, or ``validation`` where a part of the training set is set aside."""
        return "validation" if self.holdout else "test"

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


RecipeName = Literal[
    "cifar10",
    "cifar100",
    "cifar100_fast",
    "digits",
    "tiny_imagenet_first",
    "tiny_imagenet",
    "in293_first",
    "in293",
    "imagenet",
]

_PAPER_CIFAR = Recipe(
    epochs=250,
    batch_size=64,
    weight_decay=5e-5,
    warmup_epochs=0,
    cutmix=1.0,
    mix_probability=0.5,
)

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

# cifar10, cifar100 and imagenet have the published hyper-parameters (Qiu et al., AAAI 2024), but report the last epoch,
# not the best one on the test set.
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
    # For a first run, on a CPU too: handwritten digits of 8 x 8 pixels in a minute.
    "digits": Recipe(
        model="test_gac_msresnet",
        data="digits",
        dataset="digits",
        epochs=12,
        batch_size=32,
        lr=0.05,
        warmup_epochs=1.0,
        label_smoothing=0.1,
        crop_padding=1,
        flip=False,
        eval_every=3,
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
