"""``timm-gac models``: which networks there are."""

from __future__ import annotations

from typing import Annotated

import tyro


def models(pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*") -> int:
    """List the models, and which have published weights.

    A model with published weights is named with their tag, as in gac_msresnet18_cifar.cifar100. An ANN has no spikes
    and no time steps: it is to be trained beside the spiking models.

    Example: timm-gac models 'gac_*'

    Args:
        pattern: Show only names that match, such as 'gac_*'.
    """
    import timm
    import torch

    from gac_kernels import CIFAR, IMAGENET

    from ..layers.encoder import GatedAttentionCoding
    from ..models import ANNResNet
    from ..models.build import registered_names
    from ..runtime.terminal import new_table
    from .output import create_console

    names = registered_names(pattern)
    if not names:
        raise ValueError(f"expected a pattern that matches a model, got {pattern!r}: try '*resnet*'")
    text, numbers = ("model", "encoder", "dialect"), ("parameters", "T", "classes", "input")
    table = new_table(f"{len(names)} models", text, numbers, padding=(0, 1, 0, 0))
    table.add_column("weights", no_wrap=True)
    for name in names:
        network = timm.create_model(name, device=torch.device("meta"))
        ann = isinstance(network, ANNResNet)
        table.add_row(
            name,
            "ANN" if ann else "GAC" if isinstance(network.encoder, GatedAttentionCoding) else "direct",
            "-" if ann else {CIFAR: "CIFAR", IMAGENET: "ImageNet"}[network.spec],
            f"{sum(parameter.numel() for parameter in network.parameters()):,}",
            "-" if ann else str(network.num_steps),
            str(network.num_classes),
            "x".join(map(str, network.pretrained_cfg["input_size"])),
            ", ".join(full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)) or "-",
        )
    create_console().print(table)
    return 0
