"""`lif` with decay and threshold as tensors, values (2, N): its launches, and where N is the number of channels.

The backward pass keeps x: the gradient of a decay needs the membrane, for which two bits a step do not suffice.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..common.layout import as_layout, on_device
from ..common.tiles import is_channels_last, multiprocessors, tiles_of
from ..common.triton import cdiv, is_embedding, launchable, next_power_of_2
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
    pixels = math.prod(x.shape[3:])
    if pixels > 1 and x.is_contiguous():
        return x.as_strided((num_steps * x.shape[1], channels, pixels, 1), (channels * pixels, pixels, 1, 1))
    return x.as_strided((num_steps, channels, neurons // channels, 1), (neurons, 1, channels, channels))


class _Walk(NamedTuple):
    """A launch over all neurons, all programs on one axis.

    Attributes:
        programs: Programs that share the tiles of a block of channels.
        blocks: Of channels.
        rows: Rows (pixels) of one step.
        channels: C; 1 for a whole layer.
        spatial: Rows of a sample.
        tiles: Tiles of rows.
        meta: Constants of the kernel.
    """

    programs: int
    blocks: int
    rows: int
    channels: int
    spatial: int
    tiles: int
    meta: dict[str, Any]


def _walk(x: Tensor, per_channel: bool, op: str, steps: int) -> _Walk:
    """The launch of an op that holds so many steps at a time, over a `walkable` tensor."""
    num_steps, config = x.shape[0], launch_config(op, steps, x.element_size(), x.device)
    frames = _frames(x, per_channel)
    divide = _divide.__wrapped__ if is_embedding() else _divide  # symbols are no keys of a cache
    return divide(frames.shape, is_channels_last(frames), num_steps, tuple(config.items()), x.device)


@functools.lru_cache(maxsize=4096)
def _divide(
    shape: torch.Size, channels_last: bool, num_steps: int, items: tuple[tuple[str, int], ...], device: torch.device
) -> _Walk:
    config = dict(items)
    tiles = tiles_of(shape, channels_last, num_steps, config, device)
    (programs, blocks), meta, count = tiles.grid, tiles.meta | {"BLOCK_S": tiles.meta["BLOCK_R"]}, tiles.tiles
    if not channels_last:
        meta["BLOCK_S"] = _pixels(tiles.spatial, meta["BLOCK_R"])
        samples = meta["BLOCK_R"] // meta["BLOCK_S"]
        programs = count = cdiv(tiles.rows // tiles.spatial, samples) * cdiv(tiles.spatial, meta["BLOCK_S"])
        if "PER_SM" in config:
            programs = max(1, min(count, config["PER_SM"] * multiprocessors(device) // blocks))
    if not is_embedding():  # graphs know no such option: there one neuron in a hundred million may round otherwise
        meta |= {"enable_fp_fusion": False} | ({"maxnreg": config["REGS"]} if "REGS" in config else {})
    return _Walk(programs, blocks, tiles.rows, tiles.channels, tiles.spatial, count, meta)


def _pixels(pixels: int, most: int) -> int:
    """Pixels of a sample in a tile: a power of two, as many as possible of those that leave an eighth of them unused.

    Below 16 pixels a tile's rows would be shorter than what one access to memory brings.
    """
    sizes = [min(most, next_power_of_2(pixels))]
    while sizes[-1] > 16:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: (max(8 * size * cdiv(pixels, size), 9 * pixels), -size))


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
    walk = _walk(x, per_channel, "lif_learned_fwd", num_steps)
    with on_device(x):
        launchable(learned_fwd_kernel)[(walk.programs * walk.blocks,)](
            x,
            state,
            values,
            spikes,
            last,
            walk.rows,
            walk.channels,
            walk.spatial,
            x.numel() // num_steps,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            SOFT=soft_reset,
            HAS_STATE=state is not None,
            RETURN_STATE=last.numel() > 0,
            **walk.meta,
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
    walk = _walk(x, per_channel, "lif_learned_bwd", min(num_steps, CHUNK))
    partial = torch.empty((walk.programs, 2, walk.channels), dtype=torch.float32, device=x.device)
    scratch = partial.new_empty(chunks * frame if chunks > 1 else 0)
    with on_device(x):
        learned_bwd_kernel[(walk.programs * walk.blocks,)](
            grad,
            grad_last,
            x,
            state,
            values,
            grad_x,
            grad_state,
            partial,
            scratch,
            walk.rows,
            walk.channels,
            walk.spatial,
            frame,
            walk.tiles,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            SURROGATE=surrogate,
            WIDTH=width,
            DETACH=detach_reset,
            SOFT=soft_reset,
            HAS_STATE=state is not None,
            HAS_GV=grad_last is not None,
            **walk.meta,
        )
    torch.sum(partial, 0, out=grad_values)


def run_forward(
    x: Tensor, state: Tensor | None, values: Tensor, spikes: Tensor, last: Tensor, width: float, soft_reset: bool
) -> None:
    """`forward` of any memory format; spikes and last membrane are `walkable` ones."""
    source = as_layout(x, spikes)
    start = None if state is None else as_layout(state, torch.empty_like(spikes[0], dtype=state.dtype))
    forward(source, start, values.contiguous(), spikes, last, width, soft_reset)
