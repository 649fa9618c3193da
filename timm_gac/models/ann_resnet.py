"""Ordinary ResNets (ANNs) of the shapes of the spiking ones, to be trained beside them: timm's ResNet and its blocks.

``ann_resnet18_cifar`` has the convolutions of ``msresnet18_cifar``, and so on. ReLU stands where neurons are, and there
are no time steps: where a network of this package gives logits of each step, it gives those of one.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), as timm has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import create_model, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm offers it to model files under this name only
from timm.models.resnet import BasicBlock, ResNet, downsample_conv
from torch import Tensor, nn

from .arguments import SPIKING_ARGS, check_model_args
from .blocks import STAGES
from .build import build_network, cifar_cfg, imagenet_cfg
from .checkpoint import checkpoint_filter_fn
from .network import SpikingResNet

__all__ = ["ANNResNet"]

_SIZES = ("layers", "channels", "strides", "stem_width", "stem_kernel")
_REST = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate")
_TIMM_STEM = 64  # channels of the stem of timm's ResNet


class ANNResNet(ResNet):
    """timm's ResNet of basic blocks, with the stem of a spiking ResNet of this package and the methods it is used by.

    Shape:
        - input: images ``(B, C, H, W)``
        - `forward`: logits ``(B, num_classes)``; `forward_steps`: the same as one step, ``(B, 1, num_classes)``

    Args:
        layers: Number of blocks of each stage, 3 or 4 stages; 0 for last ones that are left out.
        channels: Channels of each stage.
        strides: Stride of each stage: that of the first, 1 or 2, is a max-pooling of stride 2 in front of it, as timm
            has it, the others' is 2.
        stem_width: Channels of the stem.
        stem_kernel: Kernel size of the stem, 7 (stride 2) or 3 (stride 1).
        num_classes: Number of classes; 0 for pooled features instead of logits.
        in_chans: Channels of the input.
        global_pool: Pooling before the classifier, as in timm; '' for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument is out of range.
    """

    num_steps = 1

    def __init__(
        self,
        layers: tuple[int, ...] = (2, 2, 2, 2),
        channels: tuple[int, ...] = (64, 128, 256, 512),
        strides: tuple[int, ...] = (2, 2, 2, 2),
        stem_width: int = 64,
        stem_kernel: int = 7,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = dict(
            layers=layers, channels=channels, strides=strides, stem_width=stem_width, stem_kernel=stem_kernel
        )
        rest: dict[str, Any] = dict(
            num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
        )
        check_ann_args(sizes | rest | {"global_pool": global_pool or ""})
        last = next((index for index, count in enumerate(layers) if not count), len(layers))
        if not len(layers) == len(channels) == len(strides) or any(layers[last:]):
            raise ValueError(
                f"expected layers, channels and strides of one length, 3 or 4, and no stage without blocks before one "
                f"with some, got {layers}, {channels}, {strides}: give one entry a stage"
            )
        # Plain numbers, as config.json holds them, of NumPy's.
        layers, channels, strides = (tuple(map(int, values)) for values in (layers, channels, strides))
        stem_width, stem_kernel, num_classes, in_chans = map(int, (stem_width, stem_kernel, num_classes, in_chans))
        drop_rate, drop_path_rate = float(drop_rate), float(drop_path_rate)
        sizes = dict(layers=layers, channels=channels, strides=strides, stem_width=stem_width, stem_kernel=stem_kernel)
        rest = dict(num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        super().__init__(
            BasicBlock,
            tuple(count or 1 for count in layers),
            channels=tuple(channels),
            global_pool=global_pool or "",
            **rest,
            **dd,
        )
        self._args = sizes | {name: list(value) for name, value in sizes.items() if isinstance(value, (tuple, list))}
        self._args["drop_path_rate"] = drop_path_rate
        for missing in STAGES[len(layers) :]:
            self.add_module(missing, nn.Sequential())  # empty, as timm's own pruning leaves it
        if strides[0] == 1:
            self.maxpool = nn.Identity()
        self._replace_stem(stem_width, stem_kernel, dd)
        reduction = 2 if stem_kernel > 3 else 1
        for info, stride in zip(self.feature_info, (1, *strides), strict=True):
            reduction *= stride
            info["reduction"] = reduction
        self.feature_info[0]["num_chs"] = stem_width
        if last < len(layers):  # as `prune_intermediate_layers` leaves them
            self._cut(last)
            del self.feature_info[last + 1 :]
            self.reset_classifier(num_classes, global_pool or "")
            self.fc.to(**dd)

    def _cut(self, last: int) -> None:
        """Remove all stages behind the first ``last``."""
        for name in STAGES[last:]:
            self.add_module(name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]

    def _replace_stem(self, width: int, kernel: int, dd: dict[str, Any]) -> None:
        """Put a stem of another size in the place of timm's, and a first block that takes its channels."""
        if (width, kernel) == (_TIMM_STEM, 7):
            return
        stride, padding = 2 if kernel > 3 else 1, kernel // 2
        self.conv1 = nn.Conv2d(self.in_chans, width, kernel, stride=stride, padding=padding, bias=False, **dd)
        if width != _TIMM_STEM:
            self.bn1 = nn.BatchNorm2d(width, **dd)
            out = self.feature_info[1]["num_chs"]
            shortcut = None if width == out else downsample_conv(width, out, kernel_size=1, **dd)
            self.layer1[0] = BasicBlock(width, out, downsample=shortcut, **dd)
        self.init_weights()

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits of the only step, ``(B, 1, num_classes)``."""
        logits: Tensor = self.forward(x)
        return logits.unsqueeze(1)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, **options: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stem (index 0) and after each stage, see timm's ResNet."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        result: list[Tensor] | tuple[Tensor, list[Tensor]]
        result = super().forward_intermediates(x, take_indices, **options)
        return result

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices`` and, where asked for or no longer fitting, the classifier."""
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        if prune_head or last + 1 < len(self.feature_info):
            self._cut(last)
            self.reset_classifier(0, "")
        return list(take_indices)

    def model_args(self) -> dict[str, Any]:
        """All arguments that rebuild this network as it is now, as JSON holds them: ``ANNResNet(**arguments)``.

        Device and dtype are not among them.
        """
        return self._args | dict(
            layers=[len(getattr(self, name)) for name in STAGES[: len(self._args["layers"])]],
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            global_pool=self.global_pool.pool_type,
            drop_rate=self.drop_rate,
        )

    def changed_args(self) -> dict[str, Any]:
        """Those of `model_args` in which this network differs from its registered architecture."""
        own = create_model(self.pretrained_cfg["architecture"], device="meta").model_args()
        return {name: value for name, value in self.model_args().items() if value != own[name]}


def check_ann_args(args: Mapping[str, Any]) -> None:
    """Check arguments of `ANNResNet`, whatever their source; what is not named has its default.

    Raises:
        ValueError: A name is unknown, or a value has another type or is out of range.
    """
    foreign = next((name for name in args if name not in (*_SIZES, *_REST)), None)
    if foreign is not None:
        raise ValueError(
            f"expected arguments of an ANN among {', '.join((*_SIZES, *_REST))}, got {str(foreign)[:80]!r}: remove it"
        )
    check_model_args(args)
    strides = args.get("strides", (2, 2, 2))
    if any(stride > 2 for stride in strides[:1]) or any(stride != 2 for stride in strides[1:]):
        raise ValueError(f"expected strides 1 or 2 of the first stage and 2 of the others, got {strides}: give these")


def ann_like(model: SpikingResNet) -> ANNResNet:
    """An ANN of the shape of a spiking network, with random weights.

    Its 3x3 convolutions have the same sizes. Where the first stage of the spiking network has a stride, and so a
    shortcut of 1x1, timm's ResNet pools.

    Args:
        model: The spiking network.

    Raises:
        ValueError: timm's ResNet has no such shape.
    """
    args = model.model_args()
    return ANNResNet(**{name: args[name] for name in (*_SIZES, *_REST)})


def refuse_ann(model: Any, what: str) -> None:
    """Refuse an ANN where spikes are wanted.

    Args:
        model: Any network.
        what: For what, in words.

    Raises:
        ValueError: It is an ANN of this package.
    """
    if isinstance(model, ANNResNet):
        name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        raise ValueError(
            f"expected a spiking network for {what}, got {name}, an ANN without spikes and time steps: name a spiking "
            "one of `timm-gac models`"
        )


def _create_ann_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    foreign = next((name for name in kwargs if name in SPIKING_ARGS), None)
    if foreign is not None:
        raise ValueError(
            f"expected no {foreign} for {variant}, an ANN without time steps and neurons, got "
            f"{foreign}={str(kwargs[foreign])[:80]}: leave it out, or name a spiking network of `timm-gac models`"
        )
    network: ANNResNet = build_network(
        ANNResNet, variant, pretrained, default_cfgs, filter_fn=checkpoint_filter_fn, **kwargs
    )
    return network


_PAPER = dict(paper_ids="arXiv:1512.03385")

default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(**_PAPER) for name in ("ann_resnet18", "ann_resnet34")}
    | {name: cifar_cfg(**_PAPER) for name in ("ann_resnet18_cifar", "ann_resnet19", "test_ann_resnet")}
)

_CIFAR: dict[str, Any] = dict(layers=(3, 3, 2), channels=(128, 256, 512), strides=(1, 2, 2), stem_kernel=3)


@register_model
def ann_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    """ResNet (ANN) of the shape of ``msresnet18_cifar``, for 32x32 images."""
    return _create_ann_resnet("ann_resnet18_cifar", pretrained, **_CIFAR | kwargs)


@register_model
def ann_resnet19(pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    """ResNet (ANN) of the shape of ``spiking_resnet19``, for 32x32 images."""
    return _create_ann_resnet("ann_resnet19", pretrained, **_CIFAR | dict(stem_width=128) | kwargs)


@register_model
def ann_resnet18(pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    """ResNet-18 (ANN), timm's ``resnet18``, of the shape of ``msresnet18``."""
    return _create_ann_resnet("ann_resnet18", pretrained, **dict(layers=(2, 2, 2, 2)) | kwargs)


@register_model
def ann_resnet34(pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    """ResNet-34 (ANN), timm's ``resnet34``, of the shape of ``msresnet34``."""
    return _create_ann_resnet("ann_resnet34", pretrained, **dict(layers=(3, 4, 6, 3)) | kwargs)


@register_model
def test_ann_resnet(pretrained: bool = False, **kwargs: Any) -> ANNResNet:
    """Tiny ResNet (ANN) of the shape of ``test_gac_msresnet``, for tests."""
    tiny = _CIFAR | dict(layers=(1, 1, 1), channels=(24, 32, 48), stem_width=16)
    return _create_ann_resnet("test_ann_resnet", pretrained, **tiny | kwargs)
