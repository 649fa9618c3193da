"""The Hopper kernel of convolutions with operands of one byte in training: currents or input gradients, no neuron.

It divides its labour as `convolution.hopper.pair` does, whose copying warps these are: two warpgroups with a tile of 64
output pixels by BN channels each, which share the weights, and three warps that copy for them. What the warpgroups do
is in `hopper_consume`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..convolution.hopper.finish import barrier
from ..convolution.hopper.pair_copy import copy_pixels, copy_weights
from .hopper_consume import consume


@gluon.jit
def sums_kernel(
    x_desc,
    edge_desc,
    w_desc,
    y_desc,
    scale_ptr,
    divisor_ptr,
    partial_ptr,
    B,
    OH,
    OW,
    C,
    tiles_h,
    tiles_w,
    tiles_n,
    pairs,
    T: gl.constexpr,
    STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
    STATS: gl.constexpr,
    PROMOTE: gl.constexpr,
    BH: gl.constexpr,
    NB: gl.constexpr,
    BW: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    RING: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Buffers, barriers and the division of labour; arguments as `hopper.launch` gives them."""
    OPERAND: gl.constexpr = x_desc.dtype
    # A copy consists of lines, of which a window takes BH from any on, or is one.
    LINES: gl.constexpr = (BH + 2 if STRIDE == 1 else 2 * BH + 1) if SHARED else 1
    LINE: gl.constexpr = NB * BW if SHARED else BH * NB * BW
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LINE, BK], OPERAND)
    RESIDENT: gl.constexpr = RING == 9 * CHUNKS
    pixels = gl.allocate_shared_memory(OPERAND, [2 * COPIES * STEPS * LINES, LINE, BK], LAYOUT)
    weights = gl.allocate_shared_memory(OPERAND, [RING, BN, BK], w_desc.layout)
    y_buffers = gl.allocate_shared_memory(y_desc.dtype, [2 * STEPS, BH, 1, NB, BW, BN], y_desc.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    statistics = gl.allocate_shared_memory(gl.float32, [2, BN], FLAT)
    pixels_ready = gl.allocate_shared_memory(gl.int64, [2 * COPIES, 1], mbarrier.MBarrierLayout())
    pixels_free = gl.allocate_shared_memory(gl.int64, [2 * COPIES, 1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * COPIES):
        mbarrier.init(pixels_ready.index(i), count=1)
        mbarrier.init(pixels_free.index(i), count=1)
    for i in gl.static_range(RING):
        mbarrier.init(weights_ready.index(i), count=1)
        mbarrier.init(weights_free.index(i), count=2)
    for i in gl.static_range(2):
        statistics.index(i).store(gl.zeros([BN], gl.float32, gl.BlockedLayout([1], [32], [num_warps], [0])))
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
                    y_desc,
                    y_buffers,
                    statistics,
                    pixels_ready,
                    pixels_free,
                    weights_ready,
                    weights_free,
                    scale_ptr,
                    divisor_ptr,
                    partial_ptr,
                    B,
                    OH,
                    OW,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    STATS,
                    PROMOTE,
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
                ),
            ),
            (
                consume,
                (
                    1,
                    pixels,
                    weights,
                    y_desc,
                    y_buffers,
                    statistics,
                    pixels_ready,
                    pixels_free,
                    weights_ready,
                    weights_free,
                    scale_ptr,
                    divisor_ptr,
                    partial_ptr,
                    B,
                    OH,
                    OW,
                    tiles_h,
                    tiles_w,
                    tiles_n,
                    pairs,
                    T,
                    STRIDE,
                    CHUNKS,
                    STEPS,
                    STATS,
                    PROMOTE,
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
                ),
            ),
            (
                copy_pixels,
                (
                    0,
                    x_desc,
                    edge_desc,
                    x_desc,
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
                    0,
                    1,
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
                    x_desc,
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
                    0,
                    1,
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
                    w_desc,
                    weights,
                    weights_ready,
                    weights_free,
                    tiles_n,
                    pairs,
                    C,
                    T,
                    CHUNKS,
                    STEPS,
                    0,
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
