"""Models: importing this package registers them with timm."""

from .ann_resnet import ANNResNet
from .spiking_resnet import SpikingResNet

__all__ = ["ANNResNet", "SpikingResNet"]
