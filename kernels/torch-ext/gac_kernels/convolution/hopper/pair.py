"""The Hopper kernel for many pixels: two warpgroups compute, and three warps copy for them.

Each warpgroup owns a tile of 64 output pixels (rows, images, columns) by BN channels at all time steps, with its
membrane in registers. While one computes its neurons, tensor cores multiply for the other. Both use the same copy of
the weights, which are copied once where all fit. With SHARED, pixels are copied with the rows above and below, so that
one copy serves three taps of the 3x3 window; not every version of Triton allows that. A 1x1 shortcut adds taps in 16
bits, whose sums stay in registers. There are as many programs as multiprocessors; each takes pairs of tiles in turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from .finish import barrier
from .pair_consume import consume
from .pair_copy import copy_pixels, copy_weights


@gluon.jit
def pair_kernel(
    x_desc,
    edge_desc,
    w_desc,
    s_desc,
    r_desc,
    y_desc,
    shortcut_w_desc,
    scale_ptr,
    bias_ptr,
    B,
    C,
    tiles_h,
    tiles_w,
    tiles_n,
    pairs,
    T: gl.constexpr,
    STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
    SHORTCUT_CHUNKS: gl.constexpr,
    SHORTCUT_STRIDE: gl.constexpr,
    THRESHOLD: gl.constexpr,
    DECAY: gl.constexpr,
    SOFT: gl.constexpr,
    RESIDUAL: gl.constexpr,
    SHIFT: gl.constexpr,
    KEEP: gl.constexpr,
    BH: gl.constexpr,
    NB: gl.constexpr,
    BW: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    RING: gl.constexpr,
    SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Buffers, barriers and the division of labour; arguments as `launch.launch` gives them."""
    OPERAND: gl.constexpr = x_desc.dtype
    # A copy consists of lines, of which a window takes BH from any on, or is one.
    LINES: gl.constexpr = (BH + 2 if STRIDE == 1 else 2 * BH + 1) if SHARED else 1
    LINE: gl.constexpr = NB * BW if SHARED else BH * NB * BW
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LINE, BK], OPERAND)
    RESIDENT: gl.constexpr = RING == 9 * CHUNKS + SHORTCUT_CHUNKS
    pixels = gl.allocate_shared_memory(OPERAND, [2 * COPIES * STEPS * LINES, LINE, BK], LAYOUT)
    weights = gl.allocate_shared_memory(OPERAND, [RING, BN, BK], w_desc.layout)
    s_buffers = gl.allocate_shared_memory(OPERAND, [2 * STEPS, BH, 1, NB, BW, BN], s_desc.layout)
    if KEEP:
        y_buffers = gl.allocate_shared_memory(y_desc.dtype, [2 * STEPS, BH, 1, NB, BW, BN], y_desc.layout)
    elif RESIDUAL:
        y_buffers = gl.allocate_shared_memory(r_desc.dtype, [2 * STEPS, BH, 1, NB, BW, BN], r_desc.layout)
    else:
        y_buffers = s_buffers
    pixels_ready = gl.allocate_shared_memory(gl.int64, [2 * COPIES, 1], mbarrier.MBarrierLayout())
    pixels_free = gl.allocate_shared_memory(gl.int64, [2 * COPIES, 1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    residual_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * COPIES):
        mbarrier.init(pixels_ready.index(i), count=1)
        mbarrier.init(pixels_free.index(i), count=1)
    for i in gl.static_range(RING):
        mbarrier.init(weights_ready.index(i), count=1)
        mbarrier.init(weights_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(residual_ready.index(i), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0,
                    pixels,
                    weights,
                    s_desc,
                    s_buffers,
                    r_desc,
                    y_desc,
                    y_buffers,
                    pixels_ready,
                    pixels_free,
                    weights_ready,
                    weights_free,
                    residual_ready,
                    scale_ptr,
                    bias_ptr,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    SHORTCUT_CHUNKS,
                    THRESHOLD,
                    DECAY,
                    SOFT,
                    RESIDUAL,
                    SHIFT,
                    KEEP,
                    BH,
                    NB,
                    BW,
                    BN,
                    BK,
                    LINES,
                    SHARED,
                    COPIES,
                    RING,
                    RESIDENT,
                    SCALED,
                ),
            ),
            (
                consume,
                (
                    1,
                    pixels,
                    weights,
                    s_desc,
                    s_buffers,
                    r_desc,
                    y_desc,
                    y_buffers,
                    pixels_ready,
                    pixels_free,
                    weights_ready,
                    weights_free,
                    residual_ready,
                    scale_ptr,
                    bias_ptr,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    SHORTCUT_CHUNKS,
                    THRESHOLD,
                    DECAY,
                    SOFT,
                    RESIDUAL,
                    SHIFT,
                    KEEP,
                    BH,
                    NB,
                    BW,
                    BN,
                    BK,
                    LINES,
                    SHARED,
                    COPIES,
                    RING,
                    RESIDENT,
                    SCALED,
                ),
            ),
            (
                copy_pixels,
                (
                    0,
                    x_desc,
                    edge_desc,
                    r_desc,
                    pixels,
                    pixels_ready,
                    pixels_free,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    B,
                    C,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    SHORTCUT_CHUNKS,
                    SHORTCUT_STRIDE,
                    BH,
                    NB,
                    BW,
                    BK,
                    LINES,
                    SHARED,
                    COPIES,
                ),
            ),
            (
                copy_pixels,
                (
                    1,
                    x_desc,
                    edge_desc,
                    r_desc,
                    pixels,
                    pixels_ready,
                    pixels_free,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    B,
                    C,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    SHORTCUT_CHUNKS,
                    SHORTCUT_STRIDE,
                    BH,
                    NB,
                    BW,
                    BK,
                    LINES,
                    SHARED,
                    COPIES,
                ),
            ),
            (
                copy_weights,
                (
                    w_desc,
                    shortcut_w_desc,
                    weights,
                    weights_ready,
                    weights_free,
                    tiles_n,
                    pairs,
                    C,
                    T,
                    CHUNKS,
                    STEPS,
                    SHORTCUT_CHUNKS,
                    BN,
                    BK,
                    RING,
                    RESIDENT,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],  # registers; the first group has the rest
    )
