"""The Hopper kernel for many pixels: two groups of four warps multiply and fire, three warps copy for them.

Each group owns a tile of 64 output pixels (rows, images, columns) by BN channels at all time steps, its membrane in
registers. While one computes its neurons, tensor cores multiply for the other; the weights that a copy brings serve
both, and where all fit they are copied once. Where SHARED, pixels come with the rows around them, so that one copy
serves three taps of the 3x3 window; not every version of Triton allows that. A 1x1 shortcut is some taps more, in 16
bits, whose sums never reach memory. Programs are as many as multiprocessors and take one pair of tiles after another.
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
def _corner(tile, tiles_h, tiles_w, BH: gl.constexpr, NB: gl.constexpr, BW: gl.constexpr):
    """First row, image and column of a tile."""
    w0 = tile % tiles_w * BW
    tile = tile // tiles_w
    return tile % tiles_h * BH, tile // tiles_h * NB, w0


@gluon.jit
def _consume(
    GROUP: gl.constexpr, pixels, weights, s_desc, s_buffers, r_desc, y_desc, y_buffers, pixels_ready, pixels_free,
    weights_ready, weights_free, residual_ready, scale_ptr, bias_ptr, tiles_h, tiles_w, tiles_n, pairs,
    T: gl.constexpr, STRIDE: gl.constexpr, CHUNKS: gl.constexpr, STEPS: gl.constexpr, SIDE_CHUNKS: gl.constexpr,
    THRESHOLD: gl.constexpr, DECAY: gl.constexpr, SOFT: gl.constexpr, RESIDUAL: gl.constexpr, SHIFT: gl.constexpr,
    KEEP: gl.constexpr, BH: gl.constexpr, NB: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    LINES: gl.constexpr, SHARED: gl.constexpr, COPIES: gl.constexpr, RING: gl.constexpr, RESIDENT: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
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
        h0, b0, w0 = _corner(pair // tiles_n * 2 + GROUP, tiles_h, tiles_w, BH, NB, BW)
        v = gl.zeros([BM, BN], gl.float32, SUMS)
        for group in range(GROUPS):
            first = gl.zeros([BM, BN], SUM, SUMS)
            if STEPS == 2:
                second = gl.zeros([BM, BN], SUM, SUMS)
            for j in range(3 * CHUNKS):
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
            side = first
            if SIDE_CHUNKS > 0:
                DEPTH: gl.constexpr = BK * BITS // 16
                SIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DEPTH], r_desc.dtype)
                KERNEL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, DEPTH], r_desc.dtype)
                WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
                more = gl.zeros([BM, BN], gl.float32, WIDE)
                for _ in range(SIDE_CHUNKS):
                    slot = GROUP * COPIES + copy % COPIES
                    weight = tap % RING
                    mbarrier.wait(pixels_ready.index(slot), (copy // COPIES) & 1)
                    mbarrier.wait(weights_ready.index(weight), 0 if RESIDENT else (tap // RING) & 1)
                    left = pixels.index(slot * STEPS * LINES)._reinterpret(r_desc.dtype, [BM, DEPTH], SIDE)
                    right = weights.index(weight)._reinterpret(r_desc.dtype, [BN, DEPTH], KERNEL)
                    more = warpgroup_mma(left, right.permute((1, 0)), more, is_async=True)
                    more = warpgroup_mma_wait(0, deps=(more,))
                    if not RESIDENT:
                        mbarrier.arrive(weights_free.index(weight))
                    mbarrier.arrive(pixels_free.index(slot))
                    copy += 1
                    tap += 1
                side = gl.convert_layout(more.to(r_desc.dtype), SUMS)
            if RESIDUAL:
                mbarrier.wait(residual_ready.index(GROUP), steps & 1)
            else:
                tma.store_wait(0)
                barrier()
            steps += 1
            v = finish_step(
                first, side, v, scale_ptr, bias_ptr, SCALED, group * STEPS, b0, h0, w0, n0, s_desc,
                s_buffers.index(GROUP * STEPS), y_desc, y_buffers.index(GROUP * STEPS), THRESHOLD, DECAY, SOFT,
                RESIDUAL, SIDE_CHUNKS > 0, SHIFT, KEEP, BM, BN, SUMS,
            )  # fmt: skip
            if STEPS == 2:
                v = finish_step(
                    second, second, v, scale_ptr, bias_ptr, SCALED, group * STEPS + 1, b0, h0, w0, n0, s_desc,
                    s_buffers.index(GROUP * STEPS + 1), y_desc, y_buffers.index(GROUP * STEPS + 1), THRESHOLD, DECAY,
                    SOFT, RESIDUAL, False, SHIFT, KEEP, BM, BN, SUMS,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _copy_pixels(
    GROUP: gl.constexpr, x_desc, edge_desc, side_desc, pixels, pixels_ready, pixels_free, tiles_h, tiles_w, tiles_n,
    pairs, B, C, T: gl.constexpr, STRIDE: gl.constexpr, CHUNKS: gl.constexpr, STEPS: gl.constexpr,
    SIDE_CHUNKS: gl.constexpr, SIDE_STRIDE: gl.constexpr, BH: gl.constexpr, NB: gl.constexpr, BW: gl.constexpr,
    BK: gl.constexpr, LINES: gl.constexpr, SHARED: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """A group's pixels, BK channels at a time: for each column of the window with the rows around, or for each tap."""
    OPERAND: gl.constexpr = x_desc.dtype
    LINE_BYTES: gl.constexpr = (NB * BW if SHARED else BH * NB * BW) * BK * (OPERAND.primitive_bitwidth // 8)
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    EDGE: gl.constexpr = 2 // STRIDE
    copy = 0
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        h0, b0, w0 = _corner(pair // tiles_n * 2 + GROUP, tiles_h, tiles_w, BH, NB, BW)
        for group in range(GROUPS):
            for j in range(3 * CHUNKS if SHARED else 9 * CHUNKS):
                slot = GROUP * COPIES + copy % COPIES
                mbarrier.wait(pixels_free.index(slot), ((copy // COPIES) & 1) ^ 1)
                done = pixels_ready.index(slot)
                kw = j % 3 if SHARED else j // 3 % 3
                kh = 0 if SHARED else j % 3
                column = w0 + kw - 1
                channel = (j // 3 if SHARED else j // 9) * BK
                if STRIDE == 2:  # in pairs of rows and columns: the middle of the window is even, its sides odd
                    column = w0 - (kw == 0).to(gl.int32)
                    channel += (kw != 1).to(gl.int32) * C
                mbarrier.expect(done, STEPS * LINES * LINE_BYTES)
                for s in gl.static_range(STEPS):
                    t = group * STEPS + s
                    image = t * B + b0
                    line = (slot * STEPS + s) * LINES
                    body = pixels.index(line)._reinterpret(OPERAND, [BH, 1, NB, BW, BK], x_desc.layout)
                    if not SHARED:
                        if STRIDE == 1:
                            corner = [h0 + kh - 1, t, b0, column, channel]
                        else:
                            corner = [h0 - (kh == 0).to(gl.int32), (kh != 1).to(gl.int32), image, column, channel]
                        tma.async_copy_global_to_shared(x_desc, corner, done, body)
                    else:
                        edge = pixels.index(line + BH)._reinterpret(OPERAND, [EDGE, 1, NB, BW, BK], edge_desc.layout)
                        if STRIDE == 1:
                            tma.async_copy_global_to_shared(x_desc, [h0 - 1, t, b0, column, channel], done, body)
                            tma.async_copy_global_to_shared(
                                edge_desc, [h0 - 1 + BH, t, b0, column, channel], done, edge
                            )
                        else:
                            even = pixels.index(line + BH + 1)._reinterpret(OPERAND, [BH, 1, NB, BW, BK], x_desc.layout)
                            tma.async_copy_global_to_shared(x_desc, [h0 - 1, 1, image, column, channel], done, body)
                            tma.async_copy_global_to_shared(
                                edge_desc, [h0 - 1 + BH, 1, image, column, channel], done, edge
                            )
                            tma.async_copy_global_to_shared(x_desc, [h0, 0, image, column, channel], done, even)
                copy += 1
            if SIDE_CHUNKS > 0:
                DEPTH: gl.constexpr = BK * OPERAND.primitive_bitwidth // 16
                for i in range(SIDE_CHUNKS):
                    slot = GROUP * COPIES + copy % COPIES
                    mbarrier.wait(pixels_free.index(slot), ((copy // COPIES) & 1) ^ 1)
                    done = pixels_ready.index(slot)
                    mbarrier.expect(done, BH * NB * BW * BK * (OPERAND.primitive_bitwidth // 8))
                    if SIDE_STRIDE == 1:
                        corner = [h0, group, b0, w0, i * DEPTH]
                    else:
                        corner = [h0, 0, group * B + b0, w0, i * DEPTH]
                    tma.async_copy_global_to_shared(
                        side_desc, corner, done,
                        pixels.index(slot * STEPS * LINES)._reinterpret(
                            side_desc.dtype, [BH, 1, NB, BW, DEPTH], side_desc.layout
                        ),
                    )  # fmt: skip
                    copy += 1


@gluon.jit
def _copy_weights(
    w_desc, side_w_desc, weights, weights_ready, weights_free, tiles_n, pairs, C,
    T: gl.constexpr, CHUNKS: gl.constexpr, STEPS: gl.constexpr, SIDE_CHUNKS: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, RING: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """The weights of one tap and BK channels after another, again for every group of steps or, RESIDENT, once."""
    OPERAND: gl.constexpr = w_desc.dtype
    BYTES: gl.constexpr = BN * BK * (OPERAND.primitive_bitwidth // 8)
    DEPTH: gl.constexpr = BK * OPERAND.primitive_bitwidth // 16
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    count = 0
    last = gl.program_id(0) + 1 if RESIDENT else pairs
    for pair in range(gl.program_id(0), last, gl.num_programs(0)):
        n0 = pair % tiles_n * BN
        for _ in range(1 if RESIDENT else GROUPS):
            for tap in range(9 * CHUNKS):
                slot = count % RING
                mbarrier.wait(weights_free.index(slot), ((count // RING) & 1) ^ 1)
                mbarrier.expect(weights_ready.index(slot), BYTES)
                column = (tap % 3 * 3 + tap // 3 % 3) * C + tap // 9 * BK
                tma.async_copy_global_to_shared(w_desc, [n0, column], weights_ready.index(slot), weights.index(slot))
                count += 1
            if SIDE_CHUNKS > 0:
                for i in range(SIDE_CHUNKS):
                    slot = count % RING
                    mbarrier.wait(weights_free.index(slot), ((count // RING) & 1) ^ 1)
                    mbarrier.expect(weights_ready.index(slot), BYTES)
                    beside = weights.index(slot)._reinterpret(side_w_desc.dtype, [BN, DEPTH], side_w_desc.layout)
                    tma.async_copy_global_to_shared(side_w_desc, [n0, i * DEPTH], weights_ready.index(slot), beside)
                    count += 1


@gluon.jit
def pair_kernel(
    x_desc, edge_desc, w_desc, s_desc, r_desc, y_desc, side_w_desc, scale_ptr, bias_ptr, B, C, tiles_h, tiles_w,
    tiles_n, pairs, T: gl.constexpr, STRIDE: gl.constexpr, CHUNKS: gl.constexpr, STEPS: gl.constexpr,
    SIDE_CHUNKS: gl.constexpr, SIDE_STRIDE: gl.constexpr, THRESHOLD: gl.constexpr, DECAY: gl.constexpr,
    SOFT: gl.constexpr, RESIDUAL: gl.constexpr, SHIFT: gl.constexpr, KEEP: gl.constexpr, BH: gl.constexpr,
    NB: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, SHARED: gl.constexpr,
    COPIES: gl.constexpr, RING: gl.constexpr, SCALED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Buffers, barriers and the division of labour; arguments as `launch.launch` gives them."""
    OPERAND: gl.constexpr = x_desc.dtype
    # A copy consists of lines, of which a window takes BH from any on, or is one.
    LINES: gl.constexpr = (BH + 2 if STRIDE == 1 else 2 * BH + 1) if SHARED else 1
    LINE: gl.constexpr = NB * BW if SHARED else BH * NB * BW
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([LINE, BK], OPERAND)
    RESIDENT: gl.constexpr = RING == 9 * CHUNKS + SIDE_CHUNKS
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
            (_consume, (
                0, pixels, weights, s_desc, s_buffers, r_desc, y_desc, y_buffers, pixels_ready, pixels_free,
                weights_ready, weights_free, residual_ready, scale_ptr, bias_ptr, tiles_h, tiles_w, tiles_n, pairs, T,
                STRIDE, CHUNKS, STEPS, SIDE_CHUNKS, THRESHOLD, DECAY, SOFT, RESIDUAL, SHIFT, KEEP, BH, NB, BW, BN, BK,
                LINES, SHARED, COPIES, RING, RESIDENT, SCALED,
            )),
            (_consume, (
                1, pixels, weights, s_desc, s_buffers, r_desc, y_desc, y_buffers, pixels_ready, pixels_free,
                weights_ready, weights_free, residual_ready, scale_ptr, bias_ptr, tiles_h, tiles_w, tiles_n, pairs, T,
                STRIDE, CHUNKS, STEPS, SIDE_CHUNKS, THRESHOLD, DECAY, SOFT, RESIDUAL, SHIFT, KEEP, BH, NB, BW, BN, BK,
                LINES, SHARED, COPIES, RING, RESIDENT, SCALED,
            )),
            (_copy_pixels, (
                0, x_desc, edge_desc, r_desc, pixels, pixels_ready, pixels_free, tiles_h, tiles_w, tiles_n, pairs, B, C,
                T, STRIDE, CHUNKS, STEPS, SIDE_CHUNKS, SIDE_STRIDE, BH, NB, BW, BK, LINES, SHARED, COPIES,
            )),
            (_copy_pixels, (
                1, x_desc, edge_desc, r_desc, pixels, pixels_ready, pixels_free, tiles_h, tiles_w, tiles_n, pairs, B, C,
                T, STRIDE, CHUNKS, STEPS, SIDE_CHUNKS, SIDE_STRIDE, BH, NB, BW, BK, LINES, SHARED, COPIES,
            )),
            (_copy_weights, (
                w_desc, side_w_desc, weights, weights_ready, weights_free, tiles_n, pairs, C, T, CHUNKS, STEPS,
                SIDE_CHUNKS, BN, BK, RING, RESIDENT,
            )),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],  # registers; the first group has the rest
    )  # fmt: skip
