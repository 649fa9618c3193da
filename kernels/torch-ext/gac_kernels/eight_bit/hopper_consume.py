"""What a warpgroup of the Hopper kernel in `hopper_kernel` does: multiply, scale, store and add up statistics.

Float8 sums are cut to about 14 bits (see `conv_kernels`): with PROMOTE they are added up in float32 after the three
taps of a column of the window, 3 * BK products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..convolution.hopper.finish import barrier
from ..convolution.hopper.pair_consume import multiply_row
from ..convolution.hopper.pair_copy import first_pixel


@gluon.jit
def _rows_added(values, BM: gl.constexpr, BN: gl.constexpr):
    """Sums of the two rows of a tile that a thread has of each channel: [4, 8, BN], nothing leaves a thread."""
    return gl.sum(gl.reshape(values, [4, 2, BM // 8, BN]), 1)


@gluon.jit
def _rounded(y, HALF: gl.constexpr):
    """Sums in 16 bits, and these in float32: two at once, where the compiler takes the slow unit for each."""
    if not HALF:
        stored, again = gl.inline_asm_elementwise(
            "{ cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000; }",
            "=r,=r,=r,r,r",
            [y],
            dtype=(gl.bfloat16, gl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        stored, again = gl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.f16x2.f32 $0, $4, $3; mov.b32 {low, high}, $0; cvt.f32.f16 $1, low; "
            "cvt.f32.f16 $2, high; }",
            "=r,=r,=r,r,r",
            [y],
            dtype=(gl.float16, gl.float32),
            is_pure=True,
            pack=2,
        )
    return stored, again


@gluon.jit
def _finish(
    total,
    scale_ptr,
    divisor_ptr,
    y_desc,
    y_buffer,
    pivots,
    sums,
    squares,
    values,
    exists,
    count,
    t,
    b0,
    h0,
    w0,
    n0,
    STATS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Store a tile of step t; sums and squares of what is stored, less the pivot, with this tile's.

    The pivot of a channel is its mean over the first tile, so that the sums keep their digits where a mean is many
    standard deviations. Sums stay in registers, those of the rows of a thread: to add up all rows of each tile costs
    as much as half of its products.
    """
    y = total.to(gl.float32)
    if scale_ptr is not None:
        channel = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, SUMS))
        y = y * gl.expand_dims(gl.load(scale_ptr + channel), 0)
    if divisor_ptr is not None:
        y = y * (1.0 / gl.load(divisor_ptr))  # a power of two
    if STATS:
        stored, y = _rounded(y, y_buffer.dtype == gl.float16)
    else:
        stored = y.to(y_buffer.dtype)
    tma.store_wait(0)
    barrier()
    Y: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], y_buffer.dtype)
    y_buffer._reinterpret(y_buffer.dtype, [BM, BN], Y).store(stored)
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(y_desc, [h0, t, b0, w0, n0], y_buffer)
    if STATS:
        if values == 0.0:
            mean = gl.sum(gl.where(exists, y, 0.0), 0) / gl.maximum(count, 1.0)
            pivots.store(mean)
            barrier()
        d = gl.where(exists, y - gl.expand_dims(pivots.load(gl.SliceLayout(0, SUMS)), 0), 0.0)
        sums += _rows_added(d, BM, BN)
        squares += _rows_added(d * d, BM, BN)
    return sums, squares


@gluon.jit
def consume(
    GROUP: gl.constexpr,
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
    LINES: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    RING: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Sums of every second tile."""
    OPERAND: gl.constexpr = weights.dtype
    SUM: gl.constexpr = gl.float32 if OPERAND.is_floating() else gl.int32
    BM: gl.constexpr = BH * NB * BW
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    PIXELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], OPERAND)
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    pivots = statistics.index(GROUP)
    sums = 0.0
    squares = 0.0
    if STATS:
        sums = _rows_added(gl.zeros([BM, BN], gl.float32, SUMS), BM, BN)
        squares = sums
    copy = 0  # copies of pixels and taps that were used
    tap = 0
    values = 0.0  # of a channel so far
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, SUMS))
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        n0 = pair % tiles_n * BN
        h0, b0, w0 = first_pixel(pair // tiles_n * 2 + GROUP, tiles_h, tiles_w, BH, NB, BW)
        inside = (h0 + m // (NB * BW) < OH) & (b0 + m // BW % NB < B) & (w0 + m % BW < OW)
        exists = gl.expand_dims(inside, 1)
        count = (
            gl.maximum(gl.minimum(OH - h0, BH), 0)
            * gl.maximum(gl.minimum(B - b0, NB), 0)
            * gl.maximum(gl.minimum(OW - w0, BW), 0)
        ).to(gl.float32)
        for group in range(GROUPS):
            first = gl.zeros([BM, BN], SUM, SUMS)
            second = gl.zeros([BM, BN], SUM, SUMS)  # with two steps
            for j in range(3 * CHUNKS):
                part = first
                if PROMOTE:
                    part = gl.zeros([BM, BN], SUM, SUMS)
                part, second, copy, tap = multiply_row(
                    part,
                    second,
                    pixels,
                    weights,
                    pixels_ready,
                    pixels_free,
                    weights_ready,
                    weights_free,
                    j,
                    copy,
                    tap,
                    GROUP,
                    STRIDE,
                    STEPS,
                    BM,
                    BH,
                    BK,
                    LINES,
                    PIXELS,
                    SHARED,
                    COPIES,
                    RING,
                    RESIDENT,
                )
                if PROMOTE:
                    part = warpgroup_mma_wait(0, deps=(part,))
                    first += part
                else:
                    first = part
            if STEPS == 2:
                first, second = warpgroup_mma_wait(0, deps=(first, second))
            elif not PROMOTE:
                first = warpgroup_mma_wait(0, deps=(first,))
            if not RESIDENT:
                mbarrier.arrive(weights_free.index((tap + RING - 1) % RING))
            mbarrier.arrive(pixels_free.index(GROUP * COPIES + (copy + COPIES - 1) % COPIES))
            # A tile beyond the last one has no values, and what it would store is clipped.
            sums, squares = _finish(
                first,
                scale_ptr,
                divisor_ptr,
                y_desc,
                y_buffers.index(GROUP * STEPS),
                pivots,
                sums,
                squares,
                values,
                exists,
                count,
                group * STEPS,
                b0,
                h0,
                w0,
                n0,
                STATS,
                BM,
                BN,
                SUMS,
            )
            values += count
            if STEPS == 2:
                sums, squares = _finish(
                    second,
                    scale_ptr,
                    divisor_ptr,
                    y_desc,
                    y_buffers.index(GROUP * STEPS + 1),
                    pivots,
                    sums,
                    squares,
                    values,
                    exists,
                    count,
                    group * STEPS + 1,
                    b0,
                    h0,
                    w0,
                    n0,
                    STATS,
                    BM,
                    BN,
                    SUMS,
                )
                values += count
    tma.store_wait(0)
    if STATS:
        sum_d = gl.convert_layout(gl.sum(gl.sum(sums, 1), 0), gl.SliceLayout(0, SUMS))
        sum_dd = gl.convert_layout(gl.sum(gl.sum(squares, 1), 0), gl.SliceLayout(0, SUMS))
        channel = gl.program_id(0) % tiles_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, SUMS))
        C_OUT = tiles_n * BN
        to = partial_ptr + (gl.program_id(0) // tiles_n * 2 + GROUP) * 3 * C_OUT + channel
        shift = sum_d / gl.maximum(values, 1.0)
        gl.store(to, shift * 0.0 + values)
        gl.store(to + C_OUT, pivots.load(gl.SliceLayout(0, SUMS)) + shift)
        square = sum_dd - sum_d * shift
        gl.store(to + 2 * C_OUT, gl.where(square < 0.0, 0.0, square))  # NaN stays
