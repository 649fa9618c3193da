"""`lif` with decay and threshold as tensors, values (2, N): its launches, and where N is the number of channels.

The backward pass keeps x: the gradient of a decay needs the membrane, for which two bits a step do not suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..common.layout import as_layout, on_device
from ..common.tiles import channel_tiles
from ..common.triton import cdiv, launchable
from ..reference import of_channels
from ..tuning import launch_config
from . import eager
from .learned_kernels import learned_bwd_kernel, learned_fwd_kernel

CHUNK = 8  # as in neuron/lif.py


def walkable(x: Tensor, per_channel: bool) -> Tensor:
    """``x`` (T, ...) itself where the kernels can walk it as it lies, else a contiguous copy.

    That is contiguous and channels-last memory; of a whole layer every dense memory with time outermost.
    """
    if x.is_contiguous() or (x.dim() > 2 and x.movedim(2, -1).is_contiguous()):
        return x
    if not per_channel and x.dim() > 1:
        like = torch.empty_like(x[:1])  # the frame's own order where it is dense
        if like[0].stride() == x.stride()[1:] and x.stride(0) == x[0].numel():
            return x
    return x.contiguous()


def _frames(x: Tensor, per_channel: bool) -> Tensor:
    """Memory of a walkable (T, ...) tensor as (N, C, H, W), contiguous or channels-last; C is 1 for a whole layer."""
    num_steps = x.shape[0]
    neurons = x.numel() // num_steps
    if not per_channel:
        return x.as_strided((num_steps, 1, neurons, 1), (neurons, neurons, 1, 1))
    channels = x.shape[2]
    pixels = neurons // (x.shape[1] * channels)
    if pixels > 1 and x.is_contiguous():
        return x.as_strided((num_steps * x.shape[1], channels, pixels, 1), (channels * pixels, pixels, 1, 1))
    return x.as_strided((num_steps, channels, neurons // channels, 1), (neurons, 1, channels, channels))


def forward(
    x: Tensor, state: Tensor | None, values: Tensor, spikes: Tensor, last: Tensor, width: float, soft_reset: bool
) -> None:
    """Write spikes and, where it has elements, the last membrane."""
    if resolve_backend(x.device, x.dtype) != "triton":
        decay, threshold = (of_channels(value, x[0]) for value in values)
        nothing = x.new_empty(0, dtype=torch.uint8)
        eager.lif_forward(x, state, spikes, last, nothing, threshold, decay, width, soft_reset)
        return
    per_channel, num_steps = values.shape[1] > 1, x.shape[0]
    config = launch_config("lif_learned_fwd", num_steps, x.element_size(), x.device)
    tiles = channel_tiles(_frames(x, per_channel), num_steps, config)
    with on_device(x):
        launchable(learned_fwd_kernel)[tiles.grid](
            x,
            state,
            values,
            spikes,
            last,
            tiles.rows,
            tiles.channels,
            tiles.spatial,
            x.numel() // num_steps,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            SOFT=soft_reset,
            HAS_STATE=state is not None,
            RETURN_STATE=last.numel() > 0,
            **tiles.meta,
        )


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    values: Tensor,
    grad_x: Tensor,
    grad_state: Tensor,
    grad_values: Tensor,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
) -> None:
    """Write the gradients at x, at decays and thresholds and, where it has elements, at the initial membrane."""
    neuron = (surrogate, width, detach_reset, soft_reset)
    if resolve_backend(x.device, x.dtype) != "triton":
        decay, threshold = (of_channels(value, x[0]) for value in values)
        nothing = x.new_empty(0, dtype=torch.uint8)
        eager.lif_backward(
            grad, grad_last, x, state, nothing, grad_x, grad_state, threshold, decay, *neuron, grad_values=grad_values
        )
        return
    per_channel, num_steps = values.shape[1] > 1, x.shape[0]
    chunks, frame = cdiv(num_steps, CHUNK), x.numel() // num_steps
    config = launch_config("lif_learned_bwd", min(num_steps, CHUNK), x.element_size(), x.device)
    tiles = channel_tiles(_frames(x, per_channel), num_steps, config)
    programs, channels = tiles.grid[0], tiles.channels
    partial = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    scratch = partial.new_empty(chunks * frame if chunks > 1 else 0)
    with on_device(x):
        learned_bwd_kernel[tiles.grid](
            grad,
            grad_last,
            x,
            state,
            values,
            grad_x,
            grad_state,
            partial,
            scratch,
            tiles.rows,
            channels,
            tiles.spatial,
            frame,
            tiles.tiles,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            SURROGATE=surrogate,
            WIDTH=width,
            DETACH=detach_reset,
            SOFT=soft_reset,
            HAS_STATE=state is not None,
            HAS_GV=grad_last is not None,
            **tiles.meta,
        )
    grad_values.copy_(partial.sum(0))


def run_forward(
    x: Tensor, state: Tensor | None, values: Tensor, spikes: Tensor, last: Tensor, width: float, soft_reset: bool
) -> None:
    """`forward` of any memory format; spikes and last membrane are `walkable` ones."""
    source = as_layout(x, spikes)
    start = None if state is None else as_layout(state, torch.empty_like(spikes[0], dtype=state.dtype))
    forward(source, start, values.contiguous(), spikes, last, width, soft_reset)
