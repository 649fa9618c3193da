"""The registered spiking ResNets, as data.

Every ``gac_x`` has a twin ``x`` with direct coding. The number of time steps, 4 unless said otherwise, is an argument:
``timm.create_model('gac_msresnet34', num_steps=6)``.

Source: Qiu et al., "Gated Attention Coding for Training High-performance and Efficient Spiking Neural Networks", AAAI
2024 (arXiv 2308.06582); the tdBN ResNet-19 is Zheng et al.'s (arXiv 2011.05280).
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from gac_kernels import CIFAR, IMAGENET

from .arguments import check_model_args
from .blocks import MSBlock, SpikingBlock
from .build import build_network, cifar_cfg, imagenet_cfg
from .checkpoint import checkpoint_filter_fn
from .network import SpikingResNet
from .weights import weights_cfg

__all__ = ["SpikingResNet"]


def _create_spiking_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    check_model_args({"layers": kwargs["layers"]})
    if kwargs.get("features_only"):
        _check_feature_class(kwargs.get("feature_cls", "getter"))
    network: SpikingResNet = build_network(
        SpikingResNet, variant, pretrained, default_cfgs, filter_fn=checkpoint_filter_fn, **kwargs
    )
    return network


def _check_feature_class(kind: Any) -> None:
    """Refuse what would take the outputs of modules for features: inside a network time is folded into the batch."""
    fits = issubclass(kind, FeatureGetterNet) if isinstance(kind, type) else str(kind).lower() == "getter"
    if not fits:
        raise ValueError(
            f"expected feature_cls='getter' for firing rates (B, C, H, W), got {kind!r}, which would give spikes with "
            "time folded into the batch: leave it out"
        )


_PAPER = "arXiv:2308.06582"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(**dict(paper_ids=_PAPER) | kwargs)


def _cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    return cifar_cfg(**dict(paper_ids=_PAPER) | kwargs)


_IMAGENET_NAMES = ("msresnet18", "msresnet34", "spiking_resnet18", "spiking_resnet34")
_CIFAR_NAMES = ("msresnet18_cifar", "spiking_resnet19")


def _photos_cfg(**kwargs: Any) -> dict[str, Any]:
    """Weights trained on photographs of 128 pixels; their accuracy is 2 points higher at 160."""
    photos = dict(
        input_size=(3, 128, 128),
        test_input_size=(3, 160, 160),
        pool_size=(4, 4),
        crop_pct=1.0,
        license="other",
    )
    return _cfg(**photos | kwargs)


_PUBLISHED_PHOTOS = {
    ("gac_msresnet34", "in293"): 293,
    ("gac_msresnet34", "tiny_imagenet"): 200,
    ("gac_msresnet18", "in293"): 293,
}
_PUBLISHED_CIFAR100 = ("gac_msresnet18_cifar", "msresnet18_cifar")

default_cfgs = generate_default_cfgs(
    {prefix + name: _cfg() for prefix in ("gac_", "") for name in _IMAGENET_NAMES}
    | {prefix + name: _cifar_cfg() for prefix in ("gac_", "") for name in _CIFAR_NAMES}
    | {name: _cifar_cfg() for name in ("test_gac_msresnet", "test_msresnet")}
    | {f"{name}.cifar100": _cifar_cfg(**weights_cfg(name, "cifar100")) for name in _PUBLISHED_CIFAR100}
    | {
        f"{name}.{tag}": _photos_cfg(num_classes=classes, **weights_cfg(name, tag))
        for (name, tag), classes in _PUBLISHED_PHOTOS.items()
    }
)

# The architecture of every variant. The number of time steps is a default, so it may be given to create_model.
_CIFAR: dict[str, Any] = dict(
    layers=(3, 3, 2), channels=(128, 256, 512), strides=(1, 2, 2), stem_kernel=3, spec=CIFAR, scaled_init=False
)
_DEPTH18: dict[str, Any] = dict(layers=(2, 2, 2, 2), spec=IMAGENET)
_DEPTH34: dict[str, Any] = dict(layers=(3, 4, 6, 3), spec=IMAGENET)
_TINY = dict(_CIFAR, layers=(1, 1, 1), channels=(24, 32, 48), stem_width=16)
_DEPTH19 = dict(_CIFAR, stem_width=128)
_MS, _PLAIN = dict(block=MSBlock), dict(block=SpikingBlock)
_GAC, _DIRECT = dict(encoder="gac"), dict(encoder="direct")


@register_model
def gac_msresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-18 for 32x32 images, CIFAR dialect, gated attention coding."""
    return _create_spiking_resnet("gac_msresnet18_cifar", pretrained, **_CIFAR | _MS | _GAC | kwargs)


@register_model
def msresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-18 for 32x32 images, CIFAR dialect, direct coding."""
    return _create_spiking_resnet("msresnet18_cifar", pretrained, **_CIFAR | _MS | _DIRECT | kwargs)


@register_model
def gac_msresnet18(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-18, gated attention coding."""
    return _create_spiking_resnet("gac_msresnet18", pretrained, **_DEPTH18 | _MS | _GAC | kwargs)


@register_model
def msresnet18(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-18, direct coding."""
    return _create_spiking_resnet("msresnet18", pretrained, **_DEPTH18 | _MS | _DIRECT | kwargs)


@register_model
def gac_msresnet34(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-34, gated attention coding."""
    return _create_spiking_resnet("gac_msresnet34", pretrained, **_DEPTH34 | _MS | _GAC | kwargs)


@register_model
def msresnet34(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """MS-ResNet-34, direct coding."""
    return _create_spiking_resnet("msresnet34", pretrained, **_DEPTH34 | _MS | _DIRECT | kwargs)


@register_model
def gac_spiking_resnet18(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-18 with plain blocks, gated attention coding."""
    return _create_spiking_resnet("gac_spiking_resnet18", pretrained, **_DEPTH18 | _PLAIN | _GAC | kwargs)


@register_model
def spiking_resnet18(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-18 with plain blocks, direct coding."""
    return _create_spiking_resnet("spiking_resnet18", pretrained, **_DEPTH18 | _PLAIN | _DIRECT | kwargs)


@register_model
def gac_spiking_resnet34(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-34 with plain blocks, gated attention coding."""
    return _create_spiking_resnet("gac_spiking_resnet34", pretrained, **_DEPTH34 | _PLAIN | _GAC | kwargs)


@register_model
def spiking_resnet34(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-34 with plain blocks, direct coding."""
    return _create_spiking_resnet("spiking_resnet34", pretrained, **_DEPTH34 | _PLAIN | _DIRECT | kwargs)


@register_model
def gac_spiking_resnet19(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-19 with plain blocks for 32x32 images, CIFAR dialect, gated attention coding."""
    return _create_spiking_resnet("gac_spiking_resnet19", pretrained, **_DEPTH19 | _PLAIN | _GAC | kwargs)


@register_model
def spiking_resnet19(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Spiking ResNet-19 with plain blocks for 32x32 images, CIFAR dialect, direct coding."""
    return _create_spiking_resnet("spiking_resnet19", pretrained, **_DEPTH19 | _PLAIN | _DIRECT | kwargs)


@register_model
def test_gac_msresnet(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Tiny MS-ResNet with gated attention coding, for tests and demonstrations."""
    return _create_spiking_resnet("test_gac_msresnet", pretrained, **_TINY | _MS | _GAC | kwargs)


@register_model
def test_msresnet(pretrained: bool = False, **kwargs: Any) -> SpikingResNet:
    """Tiny MS-ResNet with direct coding, the twin of ``test_gac_msresnet``."""
    return _create_spiking_resnet("test_msresnet", pretrained, **_TINY | _MS | _DIRECT | kwargs)
