"""Launches of the Triton kernels of `norm_lif`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..common.launch import Launch, prepared
from ..common.layout import packed
from ..common.tiles import FINISH, is_channels_last, tiles_of
from ..common.triton import cdiv, is_embedding
from ..neuron.lif import CHUNK
from ..registry import BUILT_IN, kernel_constants, states_by
from ..tuning import launch_config
from . import eager
from .norm_lif_backward_kernels import apply_kernel, finish_kernel, reduce_kernel
from .norm_lif_kernels import forward_kernel

Place = tuple[torch.Size, bool, int, torch.device]  # of a dense tensor: shape, channels-last, bytes an element, device


def kept(prepare: Any, neuron: tuple) -> Any:
    """``prepare``, which keeps what it made.

    Not for a registered neuron or surrogate, which another may replace, nor for sizes that are symbols.
    """
    return prepare if neuron[2] < len(BUILT_IN) and not is_embedding() else prepare.__wrapped__


def _place(x: torch.Tensor) -> Place:
    return x.shape, is_channels_last(x), x.element_size(), x.device


def forward_triton(
    x, residual, norm, res_norm, eps, res_eps, num_steps, neuron, batch_stats, spikes, membrane, bits, values=None
) -> None:
    """Write spikes and, where they have elements, the input current and the spikes' bits; see `eager.forward`."""
    norm, res_norm = packed(norm), packed(res_norm)
    launch = kept(_forward, neuron)(
        _place(x),
        num_steps,
        eps,
        res_eps,
        neuron,
        batch_stats,
        residual is not None,
        res_norm[2] is not None,
        membrane.numel() > 0,
        bits.numel() > 0,
    )
    launch(x, residual, *norm, *res_norm, spikes, membrane, bits, values)


@prepared
def _forward(
    place: Place,
    num_steps: int,
    eps: float,
    res_eps: float,
    neuron: tuple,
    batch_stats: bool,
    residual: bool,
    normed: bool,
    keep: bool,
    pack: bool,
) -> Launch:
    shape, channels_last, size, device = place
    op = "norm_lif_fwd" if batch_stats else "norm_lif_fwd_eval"
    if batch_stats and residual:
        op += "_normed" if normed else "_residual"
    tiles = tiles_of(shape, channels_last, num_steps, launch_config(op, num_steps, size, device), device)
    threshold, decay, surrogate, _, _, soft_reset = neuron
    return Launch(
        forward_kernel,
        tiles.grid,
        device,
        (tiles.rows, tiles.channels, tiles.spatial, math.prod(shape) // num_steps),
        T=num_steps,
        STEPS=min(num_steps, CHUNK),
        EPS=eps,
        R_EPS=res_eps,
        THRESHOLD=threshold,
        DECAY=decay,
        SOFT=soft_reset,
        RESIDUAL=residual,
        NORMED=normed,
        KEEP=keep,
        PACK=pack,
        **kernel_constants(surrogate, backward=False),
        **tiles.meta,
    )


def _constants(neuron: tuple) -> dict[str, Any]:
    names = ("THRESHOLD", "DECAY", "SURROGATE", "WIDTH", "DETACH", "SOFT")
    return dict(zip(names, neuron, strict=True)) | kernel_constants(neuron[2], backward=True)


def backward_triton(
    gs,
    gy,
    x,
    residual,
    membrane,
    norm,
    res_norm,
    total,
    eps,
    res_eps,
    num_steps,
    neuron,
    batch_stats,
    ga,
    gx,
    gw,
    gb,
    grw,
    grb,
    group,
    values=None,
    grad_values=None,
) -> None:
    """Write the gradients at x and, where they have elements, at the others; see `eager.backward`."""
    norm, res_norm = packed(norm), packed(res_norm)
    source = residual if membrane is None else membrane
    normed, written = res_norm[2] is not None, ga.numel() > 0
    launches = kept(_backward, neuron)(
        _place(x),
        num_steps,
        eps,
        res_eps,
        neuron,
        batch_stats,
        (residual is not None, membrane is not None, gs is not None, gy is not None, total is not None),
        normed,
        written,
        values is not None,
        norm[0] is not None,
        norm[1] is not None,
    )
    memory = torch.empty(launches.elements, dtype=torch.float32, device=x.device)
    partial, sums, scratch = memory.split_with_sizes(launches.sizes)
    launches.reduce(gs, gy, x, source, residual, *norm, *res_norm, ga, partial, scratch, values)
    launches.finish(partial, norm[3], res_norm[3], sums, gw, gb, grw, grb, grad_values)
    if group and batch_stats:
        dist.all_reduce(sums, group=eager.resolve_group(group))
    launches.apply(ga if written else gs, x, residual, *norm, *res_norm, sums, total, gx, ga, values)


class _Backward(NamedTuple):
    """Launches of a backward pass, and the float32 memory that they share: partial sums, sums, scratch.

    Attributes:
        sizes: Elements of each; addresses stay multiples of 256 bytes.
        elements: Of all.
    """

    reduce: Launch
    finish: Launch
    apply: Launch
    sizes: list[int]
    elements: int


@prepared
def _backward(
    place: Place,
    num_steps: int,
    eps: float,
    res_eps: float,
    neuron: tuple,
    batch_stats: bool,
    given: tuple[bool, bool, bool, bool, bool],
    normed: bool,
    written: bool,
    learned: bool,
    affine: bool,
    bias: bool,
) -> _Backward:
    shape, channels_last, size, device = place
    residual, membrane, has_gs, has_gy, has_total = given
    sum_count = 3 if normed else 2
    partial_count = sum_count + 2 if learned else sum_count
    frame, chunks = shape.numel() // num_steps, cdiv(num_steps, CHUNK)
    kind = "_normed" if normed else "_residual" if residual or membrane else ""
    config = launch_config(f"norm_lif_bwd_reduce{kind}", min(num_steps, CHUNK), size, device)
    if chunks > 1:  # its loops over steps are not unrolled, and only unrolled ones can be overlapped
        config = config | {"STAGES": 1}
    if learned:  # two more sums: tiles of half the size
        config = config | {"TILE": config["TILE"] // 2}
        if size == 2 and num_steps <= 6:  # of 16 bits, half as many again fit onto a multiprocessor by their registers
            config = config | {"PER_SM": config["PER_SM"] * 3 // 2}
    tiles = tiles_of(shape, channels_last, num_steps, config, device)
    channels, programs = tiles.channels, tiles.grid[0]
    shared = dict(EPS=eps, R_EPS=res_eps, NORMED=normed, T=num_steps, **_constants(neuron))
    reduce = Launch(
        reduce_kernel,
        tiles.grid,
        device,
        (tiles.rows, channels, tiles.spatial, frame, tiles.tiles),
        STEPS=min(num_steps, CHUNK),
        RESIDUAL=residual,
        KEEP=membrane,
        HAS_GS=has_gs,
        HAS_GY=has_gy,
        WRITE=written,
        SUMS=partial_count,
        **shared,
        **tiles.meta,
    )
    finish = Launch(
        finish_kernel,
        (cdiv(channels, FINISH["BLOCK_C"]),),
        device,
        (programs, channels),
        EPS=eps,
        R_EPS=res_eps,
        AFFINE=affine,
        BIAS=bias,
        NORMED=normed,
        SUMS=partial_count,
        **FINISH,
    )
    config = launch_config(f"norm_lif_bwd_apply{kind}", num_steps, size, device)
    tiles = tiles_of(shape, channels_last, num_steps, config, device)
    apply = Launch(
        apply_kernel,
        tiles.grid,
        device,
        (tiles.rows, channels, tiles.spatial, frame, tiles.rows * num_steps),
        BATCH=batch_stats,
        HAS_TOTAL=has_total,
        RECOMPUTE=not written,
        **shared,
        **tiles.meta,
    )
    sizes = [
        programs * partial_count * channels,
        sum_count * channels,
        chunks * frame * states_by(neuron[2]) if chunks > 1 else 0,
    ]
    sizes = [64 * cdiv(elements, 64) for elements in sizes]
    return _Backward(reduce, finish, apply, sizes, sum(sizes))
