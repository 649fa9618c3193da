"""Gated attention coding and multi-step spiking neurons as registered PyTorch ops with Triton kernels."""

from . import layers as layers
from .backend import requested_backend, resolve_backend, use_backend
from .common.ahead import compile_ahead
from .common.neuron_step import surrogate_grad
from .convolution.conv_lif import conv_lif
from .convolution.int8_conv2d import int8_conv2d, int8_weight
from .convolution.spike_conv import spike_conv
from .encoder.gac import gac_encode, gated_lif
from .encoder.gac_fire import gac_fire
from .encoder.pad_frames import pad_frames
from .encoder.pool_frames import pool_frames
from .neuron.integer_lif import integer_lif
from .neuron.lif import lif
from .neuron.models import ADAPTIVE, INTEGER, TERNARY
from .norm.batch_stats import batch_stats
from .norm.norm_lif import norm_lif
from .reference import (
    batch_stats_reference,
    conv_lif_reference,
    count_spikes_reference,
    firing_rate_reference,
    gac_encode_reference,
    gac_fire_reference,
    gated_lif_reference,
    int8_conv2d_reference,
    integer_lif_reference,
    lif_reference,
    norm_lif_reference,
    pack_spikes_reference,
    packed_conv2d_reference,
    pad_frames_reference,
    pool_frames_reference,
    spike_conv_reference,
    unpack_spikes_reference,
)
from .registry import Neuron, Step, Surrogate, register_neuron, register_surrogate
from .spec import CIFAR, IMAGENET, LIFSpec, ResidualNorm
from .spikes.bits import pack_spikes, packed_conv2d, unpack_spikes
from .spikes.count_spikes import count_spikes
from .spikes.firing_rate import firing_rate

__all__ = [
    "ADAPTIVE",
    "CIFAR",
    "IMAGENET",
    "INTEGER",
    "TERNARY",
    "LIFSpec",
    "Neuron",
    "ResidualNorm",
    "Step",
    "Surrogate",
    "batch_stats",
    "batch_stats_reference",
    "compile_ahead",
    "conv_lif",
    "conv_lif_reference",
    "count_spikes",
    "count_spikes_reference",
    "firing_rate",
    "firing_rate_reference",
    "gac_encode",
    "gac_encode_reference",
    "gac_fire",
    "gac_fire_reference",
    "gated_lif",
    "gated_lif_reference",
    "int8_conv2d",
    "int8_conv2d_reference",
    "int8_weight",
    "integer_lif",
    "integer_lif_reference",
    "lif",
    "lif_reference",
    "norm_lif",
    "norm_lif_reference",
    "pack_spikes",
    "pack_spikes_reference",
    "packed_conv2d",
    "packed_conv2d_reference",
    "pad_frames",
    "pad_frames_reference",
    "pool_frames",
    "pool_frames_reference",
    "register_neuron",
    "register_surrogate",
    "requested_backend",
    "resolve_backend",
    "spike_conv",
    "spike_conv_reference",
    "surrogate_grad",
    "unpack_spikes",
    "unpack_spikes_reference",
    "use_backend",
]
