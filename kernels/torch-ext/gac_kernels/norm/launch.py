"""Launches of the Triton kernels of `norm_lif`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..common.layout import on_device, packed
from ..common.tiles import FINISH, channel_tiles
from ..common.triton import cdiv
from ..neuron.lif import CHUNK
from ..registry import kernel_constants
from ..tuning import launch_config
from . import eager
from .norm_lif_kernels import apply_kernel, finish_kernel, forward_kernel, reduce_kernel


def forward_triton(
    x, residual, norm, res_norm, eps, res_eps, num_steps, neuron, batch_stats, spikes, membrane, bits, values=None
) -> None:
    """Write spikes and, where they have elements, the input current and the spikes' bits; see `eager.forward`."""
    op = "norm_lif_fwd" if batch_stats else "norm_lif_fwd_eval"
    if batch_stats and residual is not None:
        op += "_normed" if res_norm[2] is not None else "_residual"
    tiles = channel_tiles(x, num_steps, launch_config(op, num_steps, x.element_size(), x.device))
    norm, res_norm = packed(norm), packed(res_norm)
    threshold, decay, surrogate, _, _, soft_reset = neuron
    with on_device(x):
        forward_kernel[tiles.grid](
            x,
            residual,
            *norm,
            *res_norm,
            spikes,
            membrane,
            bits,
            values,
            tiles.rows,
            tiles.channels,
            tiles.spatial,
            x.numel() // num_steps,
            T=num_steps,
            STEPS=min(num_steps, CHUNK),
            EPS=eps,
            R_EPS=res_eps,
            THRESHOLD=threshold,
            DECAY=decay,
            SOFT=soft_reset,
            RESIDUAL=residual is not None,
            NORMED=res_norm[2] is not None,
            KEEP=membrane.numel() > 0,
            PACK=bits.numel() > 0,
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
    normed = res_norm[2] is not None
    sum_count = 3 if normed else 2
    partial_count = sum_count if values is None else sum_count + 2
    frame, size, chunks = x.numel() // num_steps, x.element_size(), cdiv(num_steps, CHUNK)
    kind = "_normed" if normed else "_residual" if source is not None else ""
    config = launch_config(f"norm_lif_bwd_reduce{kind}", min(num_steps, CHUNK), size, x.device)
    if chunks > 1:  # its loops over steps are not unrolled, and only unrolled ones can be overlapped
        config = config | {"STAGES": 1}
    if values is not None:  # two more sums: as many programs fit onto a multiprocessor with tiles of half the size
        config = config | {"TILE": config["TILE"] // 2}
    tiles = channel_tiles(x, num_steps, config)
    channels, programs = tiles.channels, tiles.grid[0]
    partial = torch.empty((programs, partial_count, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((sum_count, channels), dtype=torch.float32, device=x.device)
    written = ga.numel() > 0
    shared = dict(EPS=eps, R_EPS=res_eps, NORMED=normed, T=num_steps, **_constants(neuron))
    states = chunks * frame * shared["STATES"] if chunks > 1 else 0
    scratch = torch.empty(states, dtype=torch.float32, device=x.device)
    with on_device(x):
        reduce_kernel[tiles.grid](
            gs,
            gy,
            x,
            source,
            residual,
            *norm,
            *res_norm,
            ga,
            partial,
            scratch,
            values,
            tiles.rows,
            channels,
            tiles.spatial,
            frame,
            tiles.tiles,
            STEPS=min(num_steps, CHUNK),
            RESIDUAL=residual is not None,
            KEEP=membrane is not None,
            HAS_GS=gs is not None,
            HAS_GY=gy is not None,
            WRITE=written,
            SUMS=partial_count,
            **shared,
            **tiles.meta,
        )
        finish_kernel[(cdiv(channels, FINISH["BLOCK_C"]),)](
            partial,
            norm[3],
            res_norm[3],
            sums,
            gw,
            gb,
            grw,
            grb,
            programs,
            channels,
            EPS=eps,
            R_EPS=res_eps,
            AFFINE=norm[0] is not None,
            BIAS=norm[1] is not None,
            NORMED=normed,
            SUMS=partial_count,
            **FINISH,
        )
        if group and batch_stats:
            dist.all_reduce(sums, group=eager.resolve_group(group))
        tiles = channel_tiles(x, num_steps, launch_config(f"norm_lif_bwd_apply{kind}", num_steps, size, x.device))
        apply_kernel[tiles.grid](
            ga if written else gs,
            x,
            residual,
            *norm,
            *res_norm,
            sums,
            total,
            gx,
            ga,
            values,
            tiles.rows,
            channels,
            tiles.spatial,
            frame,
            tiles.rows * num_steps,
            BATCH=batch_stats,
            HAS_TOTAL=total is not None,
            RECOMPUTE=not written,
            **shared,
            **tiles.meta,
        )
    if grad_values is not None:
        grad_values.copy_(partial[:, sum_count:].sum(0))
