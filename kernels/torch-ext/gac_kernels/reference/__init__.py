"""Plain PyTorch, one line an equation, any floating dtype and device: the definition of right.

Each public op has a twin here with its signature, named ``<op>_reference``. Where an op trains a neuron, its twin takes
``smooth=True``, which replaces the step by the integral of its surrogate derivative: the whole computation is then
differentiable, so that its gradient can be checked numerically.
"""

from .convolution import (
    conv_lif_reference,
    grid_shift,
    on_grid,
    spike_conv_reference,
)
from .encoder import (
    gac_encode_reference,
    gac_fire_reference,
    gated_lif_reference,
    pad_frames_reference,
    pool_frames_reference,
)
from .int8_conv2d import (
    int8_conv2d_gradients_reference,
    int8_conv2d_reference,
    int8_weight_reference,
)
from .neuron import (
    integer_lif_reference,
    lif_reference,
    of_channels,
    run_steps,
    smooth_step,
    state_dtype,
    surrogate_derivative,
)
from .norm import (
    batch_stats_reference,
    norm_lif_reference,
)
from .spikes import (
    count_spikes_reference,
    firing_rate_reference,
    pack_spikes_reference,
    packed_conv2d_reference,
    unpack_spikes_reference,
)

__all__ = [
    "batch_stats_reference",
    "conv_lif_reference",
    "count_spikes_reference",
    "firing_rate_reference",
    "gac_encode_reference",
    "gac_fire_reference",
    "gated_lif_reference",
    "grid_shift",
    "int8_conv2d_gradients_reference",
    "int8_conv2d_reference",
    "int8_weight_reference",
    "integer_lif_reference",
    "lif_reference",
    "norm_lif_reference",
    "of_channels",
    "on_grid",
    "pack_spikes_reference",
    "packed_conv2d_reference",
    "pad_frames_reference",
    "pool_frames_reference",
    "run_steps",
    "smooth_step",
    "spike_conv_reference",
    "state_dtype",
    "surrogate_derivative",
    "unpack_spikes_reference",
]
