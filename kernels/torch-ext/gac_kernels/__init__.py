"""Gated attention coding and multi-step spiking neurons as registered PyTorch ops with Triton kernels."""

from . import layers as layers
from .backend import requested_backend, resolve_backend, use_backend
from .batch_stats import batch_stats
from .conv_lif import conv_lif
from .count_spikes import count_spikes
from .firing_rate import firing_rate
from .gac import gac_encode, gated_lif
from .gac_fire import gac_fire
from .integer_lif import integer_lif
from .lif import lif
from .norm_lif import ResidualNorm, norm_lif
from .pad_frames import pad_frames
from .pool_frames import pool_frames
from .reference import (
    gac_encode_reference,
    gac_fire_reference,
    gated_lif_reference,
    lif_reference,
    norm_lif_reference,
    spike_conv_reference,
)
from .spec import CIFAR, IMAGENET, LIFSpec
from .spike_bits import pack_spikes, packed_conv2d, unpack_spikes
from .spike_conv import spike_conv

__all__ = [
    "CIFAR",
    "IMAGENET",
    "LIFSpec",
    "ResidualNorm",
    "batch_stats",
    "conv_lif",
    "count_spikes",
    "firing_rate",
    "gac_encode",
    "gac_encode_reference",
    "gac_fire",
    "gac_fire_reference",
    "gated_lif",
    "gated_lif_reference",
    "integer_lif",
    "lif",
    "lif_reference",
    "norm_lif",
    "norm_lif_reference",
    "pack_spikes",
    "packed_conv2d",
    "pad_frames",
    "pool_frames",
    "requested_backend",
    "resolve_backend",
    "spike_conv",
    "spike_conv_reference",
    "unpack_spikes",
    "use_backend",
]
