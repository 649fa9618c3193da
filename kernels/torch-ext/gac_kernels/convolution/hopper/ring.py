"""The Hopper kernel for few pixels: one warpgroup copies, multiplies and computes the neurons.

A program owns a tile of 64 output pixels (rows, images, columns) by BN channels at all time steps. For every tap of the
3x3 window and every BK input channels, one stage of a ring takes the shifted pixels and the weights; the weights of a
stage serve STEPS time steps. The membrane stays in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .finish import barrier, finish_step


@gluon.jit
def _copy_tap(
    x_desc,
    w_desc,
    pixels,
    weights,
    ready,
    tap,
    active,
    b0,
    h0,
    w0,
    n0,
    B,
    C,
    STRIDE: gl.constexpr,
    STEPS: gl.constexpr,
    CHUNKS: gl.constexpr,
    RING: gl.constexpr,
    BK: gl.constexpr,
    BYTES: gl.constexpr,
):
    """Start the copies of a tap: BK channels of pixels at STEPS time steps, and their weights.

    Taps run over the window's rows and columns, then channels, then time. What lies outside is copied as 0.
    """
    slot = tap % RING
    kh = tap % 9 // 3
    kw = tap % 3
    first = tap // 9 % CHUNKS * BK
    step = tap // (9 * CHUNKS) * STEPS
    done = ready.index(slot)
    mbarrier.expect(done, BYTES, pred=active)
    column = (kh * 3 + kw) * C + first
    tma.async_copy_global_to_shared(w_desc, [n0, column], done, weights.index(slot), pred=active)
    for s in gl.static_range(STEPS):
        tile = pixels.index(slot * STEPS + s)
        if STRIDE == 1:
            corner = [h0 + kh - 1, step + s, b0, w0 + kw - 1, first]
        else:  # in pairs of rows and columns: the middle of the window is even, its sides odd
            corner = [
                h0 - (kh == 0).to(gl.int32),
                (kh != 1).to(gl.int32),
                (step + s) * B + b0,
                w0 - (kw == 0).to(gl.int32),
                (kw != 1).to(gl.int32) * C + first,
            ]
        tma.async_copy_global_to_shared(x_desc, corner, done, tile, pred=active)


@gluon.jit
def ring_kernel(
    x_desc,
    w_desc,
    s_desc,
    r_desc,
    y_desc,
    scale_ptr,
    bias_ptr,
    B,
    C,
    tiles_h,
    tiles_w,
    tiles_n,
    T: gl.constexpr,
    STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
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
    RING: gl.constexpr,
    SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """All steps of one tile; arguments as `launch.launch` gives them."""
    OPERAND: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = OPERAND.primitive_bitwidth
    SUM: gl.constexpr = gl.int32 if BITS == 8 else gl.float32
    BM: gl.constexpr = BH * NB * BW
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    TAPS: gl.constexpr = 9 * CHUNKS
    BYTES: gl.constexpr = (STEPS * BM + BN) * BK * (BITS // 8)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 256 // BITS])
    PIXELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], OPERAND)

    # Neighbouring programs share pixels and differ in channels: the second finds the pixels in the L2 cache.
    tile = gl.program_id(0)
    n0 = tile % tiles_n * BN
    tile = tile // tiles_n
    w0 = tile % tiles_w * BW
    tile = tile // tiles_w
    h0 = tile % tiles_h * BH
    b0 = tile // tiles_h * NB

    pixels = gl.allocate_shared_memory(OPERAND, [RING * STEPS, BH, 1, NB, BW, BK], x_desc.layout)
    weights = gl.allocate_shared_memory(OPERAND, [RING, BN, BK], w_desc.layout)
    s_buffers = gl.allocate_shared_memory(OPERAND, [STEPS, BH, 1, NB, BW, BN], s_desc.layout)
    if KEEP:
        y_buffers = gl.allocate_shared_memory(y_desc.dtype, [STEPS, BH, 1, NB, BW, BN], y_desc.layout)
    elif RESIDUAL:
        y_buffers = gl.allocate_shared_memory(r_desc.dtype, [STEPS, BH, 1, NB, BW, BN], r_desc.layout)
    else:
        y_buffers = s_buffers
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    residual_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(residual_ready, count=1)
    fence_async_shared()
    barrier()

    for i in gl.static_range(RING - 1):
        _copy_tap(
            x_desc,
            w_desc,
            pixels,
            weights,
            ready,
            i,
            True,
            b0,
            h0,
            w0,
            n0,
            B,
            C,
            STRIDE,
            STEPS,
            CHUNKS,
            RING,
            BK,
            BYTES,
        )

    v = gl.zeros([BM, BN], gl.float32, SUMS)
    for group in range(GROUPS):
        first = gl.zeros([BM, BN], SUM, SUMS)
        if STEPS == 2:
            second = gl.zeros([BM, BN], SUM, SUMS)
        for j in range(TAPS):
            tap = group * TAPS + j
            slot = tap % RING
            mbarrier.wait(ready.index(slot), (tap // RING) & 1)
            right = weights.index(slot).permute((1, 0))
            left = pixels.index(slot * STEPS)._reinterpret(OPERAND, [BM, BK], PIXELS)
            first = warpgroup_mma(left, right, first, is_async=True)
            if STEPS == 2:
                left = pixels.index(slot * STEPS + 1)._reinterpret(OPERAND, [BM, BK], PIXELS)
                second = warpgroup_mma(left, right, second, is_async=True)
            # What the tap before read may be overwritten once its products are done in every warp.
            if STEPS == 2:
                first, second = warpgroup_mma_wait(2, deps=(first, second))
            else:
                first = warpgroup_mma_wait(1, deps=(first,))
            barrier()
            _copy_tap(
                x_desc,
                w_desc,
                pixels,
                weights,
                ready,
                tap + RING - 1,
                tap + RING - 1 < GROUPS * TAPS,
                b0,
                h0,
                w0,
                n0,
                B,
                C,
                STRIDE,
                STEPS,
                CHUNKS,
                RING,
                BK,
                BYTES,
            )
            if RESIDUAL:  # noqa: SIM102 (known when compiling, the other when running)
                if j == 2:  # by now the stores of the group before have left the buffers
                    tma.store_wait(0)
                    barrier()
                    mbarrier.expect(residual_ready, STEPS * BM * BN * (r_desc.dtype.primitive_bitwidth // 8))
                    for s in gl.static_range(STEPS):
                        tma.async_copy_global_to_shared(
                            r_desc, [h0, group * STEPS + s, b0, w0, n0], residual_ready, y_buffers.index(s)
                        )
        if STEPS == 2:
            first, second = warpgroup_mma_wait(0, deps=(first, second))
        else:
            first = warpgroup_mma_wait(0, deps=(first,))
        if RESIDUAL:
            mbarrier.wait(residual_ready, group & 1)
        else:
            tma.store_wait(0)
            barrier()
        v = finish_step(
            first,
            first,
            v,
            scale_ptr,
            bias_ptr,
            SCALED,
            group * STEPS,
            b0,
            h0,
            w0,
            n0,
            s_desc,
            s_buffers.index(0),
            y_desc,
            y_buffers.index(0),
            THRESHOLD,
            DECAY,
            SOFT,
            RESIDUAL,
            False,
            SHIFT,
            KEEP,
            BM,
            BN,
            SUMS,
        )
        if STEPS == 2:
            v = finish_step(
                second,
                second,
                v,
                scale_ptr,
                bias_ptr,
                SCALED,
                group * STEPS + 1,
                b0,
                h0,
                w0,
                n0,
                s_desc,
                s_buffers.index(1),
                y_desc,
                y_buffers.index(1),
                THRESHOLD,
                DECAY,
                SOFT,
                RESIDUAL,
                False,
                SHIFT,
                KEEP,
                BM,
                BN,
                SUMS,
            )
    tma.store_wait(0)
