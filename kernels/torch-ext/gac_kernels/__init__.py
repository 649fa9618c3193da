"""Gated attention coding and multi-step spiking neurons as registered PyTorch ops with Triton kernels."""

from . import layers as layers
from .backend import requested_backend, resolve_backend, use_backend
from .gac import gac_encode, gated_lif
from .lif import lif
from .reference import gac_encode_reference, gated_lif_reference, lif_reference
from .spec import CIFAR, IMAGENET, LIFSpec

__all__ = [
    "CIFAR",
    "IMAGENET",
    "LIFSpec",
    "gac_encode",
    "gac_encode_reference",
    "gated_lif",
    "gated_lif_reference",
    "lif",
    "lif_reference",
    "requested_backend",
    "resolve_backend",
    "use_backend",
]
