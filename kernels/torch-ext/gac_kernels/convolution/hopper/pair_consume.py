"""What the computing warps of the pair kernel do: sums and neurons of every second tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .finish import barrier, finish_step
from .pair_copy import first_pixel


@gluon.jit
def multiply_row(
    first,
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
    GROUP: gl.constexpr,
    STRIDE: gl.constexpr,
    STEPS: gl.constexpr,
    BM: gl.constexpr,
    BH: gl.constexpr,
    BK: gl.constexpr,
    LINES: gl.constexpr,
    PIXELS: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    RING: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Three taps of the window: their products added to the sums; sums, copies and taps that were used."""
    OPERAND: gl.constexpr = weights.dtype
    for kh in gl.static_range(3):
        slot = GROUP * COPIES + copy % COPIES
        if not SHARED or kh == 0:
            mbarrier.wait(pixels_ready.index(slot), (copy // COPIES) & 1)
        weight = tap % RING
        mbarrier.wait(weights_ready.index(weight), 0 if RESIDENT else (tap // RING) & 1)
        right = weights.index(weight).permute((1, 0))
        # Rows lie in order, with stride 2 the odd ones before the even ones.
        line = slot * STEPS * LINES
        if SHARED:
            line += kh if STRIDE == 1 else BH + 1 if kh == 1 else kh // 2
        left = pixels.index(line)._reinterpret(OPERAND, [BM, BK], PIXELS)
        first = warpgroup_mma(left, right, first, is_async=True)
        if STEPS == 2:
            left = pixels.index(line + LINES)._reinterpret(OPERAND, [BM, BK], PIXELS)
            second = warpgroup_mma(left, right, second, is_async=True)
        # What the tap before read may be overwritten once its products are done; none before the first.
        if STEPS == 2:
            first, second = warpgroup_mma_wait(2, deps=(first, second))
        else:
            first = warpgroup_mma_wait(1, deps=(first,))
        another = (j > 0) | (kh > 0)
        if not RESIDENT:
            mbarrier.arrive(weights_free.index((tap + RING - 1) % RING), pred=another)
        if not SHARED or kh == 0:
            mbarrier.arrive(pixels_free.index(GROUP * COPIES + (copy + COPIES - 1) % COPIES), pred=another)
        tap += 1
        if not SHARED or kh == 2:
            copy += 1
    return first, second, copy, tap


@gluon.jit
def consume(
    GROUP: gl.constexpr,
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
    T: gl.constexpr,
    STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
    SHORTCUT_CHUNKS: gl.constexpr,
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
    LINES: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
    RING: gl.constexpr,
    RESIDENT: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Sums and neurons of every second tile."""
    OPERAND: gl.constexpr = weights.dtype
    BITS: gl.constexpr = OPERAND.primitive_bitwidth
    SUM: gl.constexpr = gl.int32 if BITS == 8 else gl.float32
    BM: gl.constexpr = BH * NB * BW
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 256 // BITS])
    PIXELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], OPERAND)
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    copy = 0  # copies of pixels and taps that were used
    tap = 0
    steps = 0
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        n0 = pair % tiles_n * BN
        h0, b0, w0 = first_pixel(pair // tiles_n * 2 + GROUP, tiles_h, tiles_w, BH, NB, BW)
        v = gl.zeros([BM, BN], gl.float32, SUMS)
        for group in range(GROUPS):
            first = gl.zeros([BM, BN], SUM, SUMS)
            second = gl.zeros([BM, BN], SUM, SUMS)  # with two steps
            for j in range(3 * CHUNKS):
                first, second, copy, tap = multiply_row(
                    first,
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
                if RESIDUAL:  # noqa: SIM102 (known when compiling, the other when running)
                    if j == 0:  # by now the stores of the group before have left the buffers
                        tma.store_wait(0)
                        barrier()
                        done = residual_ready.index(GROUP)
                        mbarrier.expect(done, STEPS * BM * BN * (r_desc.dtype.primitive_bitwidth // 8))
                        for s in gl.static_range(STEPS):
                            tma.async_copy_global_to_shared(
                                r_desc, [h0, group * STEPS + s, b0, w0, n0], done, y_buffers.index(GROUP * STEPS + s)
                            )
            if STEPS == 2:
                first, second = warpgroup_mma_wait(0, deps=(first, second))
            else:
                first = warpgroup_mma_wait(0, deps=(first,))
            if not RESIDENT:
                mbarrier.arrive(weights_free.index((tap + RING - 1) % RING))
            mbarrier.arrive(pixels_free.index(GROUP * COPIES + (copy + COPIES - 1) % COPIES))
            shortcut = first
            if SHORTCUT_CHUNKS > 0:
                DEPTH: gl.constexpr = BK * BITS // 16
                SHORTCUT_PIXELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DEPTH], r_desc.dtype)
                SHORTCUT_WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, DEPTH], r_desc.dtype)
                WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
                shortcut_sums = gl.zeros([BM, BN], gl.float32, WIDE)
                for _ in range(SHORTCUT_CHUNKS):
                    slot = GROUP * COPIES + copy % COPIES
                    weight = tap % RING
                    mbarrier.wait(pixels_ready.index(slot), (copy // COPIES) & 1)
                    mbarrier.wait(weights_ready.index(weight), 0 if RESIDENT else (tap // RING) & 1)
                    left = pixels.index(slot * STEPS * LINES)._reinterpret(r_desc.dtype, [BM, DEPTH], SHORTCUT_PIXELS)
                    right = weights.index(weight)._reinterpret(r_desc.dtype, [BN, DEPTH], SHORTCUT_WEIGHTS)
                    shortcut_sums = warpgroup_mma(left, right.permute((1, 0)), shortcut_sums, is_async=True)
                    shortcut_sums = warpgroup_mma_wait(0, deps=(shortcut_sums,))
                    if not RESIDENT:
                        mbarrier.arrive(weights_free.index(weight))
                    mbarrier.arrive(pixels_free.index(slot))
                    copy += 1
                    tap += 1
                shortcut = gl.convert_layout(shortcut_sums.to(r_desc.dtype), SUMS)
            if RESIDUAL:
                mbarrier.wait(residual_ready.index(GROUP), steps & 1)
            else:
                tma.store_wait(0)
                barrier()
            steps += 1
            v = finish_step(
                first,
                shortcut,
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
                s_buffers.index(GROUP * STEPS),
                y_desc,
                y_buffers.index(GROUP * STEPS),
                THRESHOLD,
                DECAY,
                SOFT,
                RESIDUAL,
                SHORTCUT_CHUNKS > 0,
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
                    s_buffers.index(GROUP * STEPS + 1),
                    y_desc,
                    y_buffers.index(GROUP * STEPS + 1),
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
