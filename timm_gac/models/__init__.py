"""Models: importing this package registers them with timm."""

from .spiking_resnet import SpikingResNet

__all__ = ["SpikingResNet"]
