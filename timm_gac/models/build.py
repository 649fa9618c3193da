"""What registered networks of both kinds share: preprocessing in their pretrained_cfg, and how timm builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, list_models

from .weights import HUB_ORGANISATION, WEIGHTS, check_available, describe_weights, explain_missing

# Modules of timm's registry that hold the networks of this package.
MODULES = ("spiking_resnet", "ann_resnet")


def registered_names(pattern: str = "*") -> list[str]:
    """Names of this package's networks, the spiking ones first.

    Args:
        pattern: Only names that match.
    """
    return [name for module in MODULES for name in list_models(pattern, module=module)]


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """Fields of a pretrained_cfg for photographs of 224x224 pixels, changed by ``kwargs``."""
    imagenet = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="conv1",
        classifier="fc",
        license="apache-2.0",
    )
    return imagenet | kwargs


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Fields of a pretrained_cfg for the images of CIFAR-100, changed by ``kwargs``."""
    cifar = dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
    )
    return imagenet_cfg(**cifar | kwargs)


def build_network(
    kind: type[Any],
    variant: str,
    pretrained: bool,
    cfgs: Mapping[str, Any],
    filter_fn: Callable[..., dict[str, Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """A registered network as timm builds it.

    Args:
        kind: Its class.
        variant: Its registered name.
        pretrained: Load weights.
        cfgs: ``default_cfgs`` of its module.
        filter_fn: Brings a checkpoint to the names of the network.
        **kwargs: What `timm.create_model` was given, and the architecture, with ``layers``.

    Raises:
        OSError: The weights are not on this machine and cannot be fetched.
    """
    stages = len(kwargs["layers"])
    # Of a Hub repository timm would else read a pickle where it finds no safetensors.
    overlay = {"hf_hub_filename": WEIGHTS} | (kwargs.pop("pretrained_cfg_overlay", None) or {})
    own, default = cfgs[variant].cfgs.get(""), cfgs[variant].default
    if not pretrained and kwargs.get("pretrained_cfg") is None and own and own.num_classes != default.num_classes:
        # Untrained it has the architecture's own classes and input, whatever its default weights were trained on.
        kwargs["pretrained_cfg"] = own
    fields = _pretrained_fields(cfgs[variant], kwargs.get("pretrained_cfg"))
    if pretrained:
        check_available(fields, overlay)
    with explain_missing(_repository(variant, fields)):
        network = build_model_with_cfg(
            kind,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            pretrained_cfg_overlay=overlay,
            feature_cfg=dict(out_indices=tuple(range(stages + 1)), feature_cls="getter"),
            **kwargs,
        )
    if pretrained:
        describe_weights(network)
    return network


def _pretrained_fields(known: Any, cfg: Any) -> dict[str, Any]:
    """Fields of what timm passes on as pretrained_cfg: a tag, fields, an object, or nothing for the default tag."""
    if isinstance(cfg, dict):
        return cfg
    if cfg and not isinstance(cfg, str):
        return vars(cfg)
    tag = cfg or next(iter(known.tags))
    fields = known.cfgs.get(tag)
    return {"tag": tag} | (vars(fields) | {"tag": tag} if fields else {})


def _repository(variant: str, fields: dict[str, Any]) -> str:
    """Where timm looks for weights on the Hub."""
    tag = fields.get("tag")
    return fields.get("hf_hub_id") or f"{HUB_ORGANISATION}/{variant}" + (f".{tag}" if tag else "")
