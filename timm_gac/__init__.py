"""Gated attention coding and spiking ResNets for timm: importing this package registers the models."""

from importlib.metadata import PackageNotFoundError, version

from gac_kernels import CIFAR, IMAGENET, LIFSpec, use_backend

from . import models as models
from .encoder import DirectCoding, GatedAttentionCoding
from .graphs import GraphedStep
from .inference import fuse_for_inference
from .neuron import LIF, BatchNormLIF
from .quantize import quantize

try:
    __version__ = version("timm-gac")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"

__all__ = [
    "CIFAR",
    "IMAGENET",
    "LIF",
    "BatchNormLIF",
    "DirectCoding",
    "GatedAttentionCoding",
    "GraphedStep",
    "LIFSpec",
    "__version__",
    "fuse_for_inference",
    "quantize",
    "use_backend",
]
