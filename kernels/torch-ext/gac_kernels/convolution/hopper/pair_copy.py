"""What the copying warps of the pair kernel do: pixels for each of its two groups, and weights for both."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
)


@gluon.jit
def first_pixel(tile, tiles_h, tiles_w, BH: gl.constexpr, NB: gl.constexpr, BW: gl.constexpr):
    """First row, image and column of a tile."""
    w0 = tile % tiles_w * BW
    tile = tile // tiles_w
    return tile % tiles_h * BH, tile // tiles_h * NB, w0


@gluon.jit
def _copy_window(
    x_desc,
    edge_desc,
    pixels,
    pixels_ready,
    pixels_free,
    h0,
    b0,
    w0,
    group,
    j,
    copy,
    B,
    C,
    GROUP: gl.constexpr,
    STRIDE: gl.constexpr,
    STEPS: gl.constexpr,
    BH: gl.constexpr,
    NB: gl.constexpr,
    BW: gl.constexpr,
    BK: gl.constexpr,
    LINES: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
):
    """BK channels of one column of the window with the rows around, or of one tap, at STEPS time steps."""
    OPERAND: gl.constexpr = x_desc.dtype
    LINE_BYTES: gl.constexpr = (NB * BW if SHARED else BH * NB * BW) * BK * (OPERAND.primitive_bitwidth // 8)
    EDGE: gl.constexpr = 2 // STRIDE
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
                corner = [h0 - (kh == 0).to(gl.int32), (kh != 1).to(gl.int32), image, column, channel]  # type: ignore[union-attr]
            tma.async_copy_global_to_shared(x_desc, corner, done, body)
        else:
            edge = pixels.index(line + BH)._reinterpret(OPERAND, [EDGE, 1, NB, BW, BK], edge_desc.layout)
            if STRIDE == 1:
                tma.async_copy_global_to_shared(x_desc, [h0 - 1, t, b0, column, channel], done, body)
                tma.async_copy_global_to_shared(edge_desc, [h0 - 1 + BH, t, b0, column, channel], done, edge)
            else:
                even = pixels.index(line + BH + 1)._reinterpret(OPERAND, [BH, 1, NB, BW, BK], x_desc.layout)
                tma.async_copy_global_to_shared(x_desc, [h0 - 1, 1, image, column, channel], done, body)
                tma.async_copy_global_to_shared(edge_desc, [h0 - 1 + BH, 1, image, column, channel], done, edge)
                tma.async_copy_global_to_shared(x_desc, [h0, 0, image, column, channel], done, even)


@gluon.jit
def copy_pixels(
    GROUP: gl.constexpr,
    x_desc,
    edge_desc,
    shortcut_desc,
    pixels,
    pixels_ready,
    pixels_free,
    tiles_h,
    tiles_w,
    tiles_n,
    pairs,
    B,
    C,
    T: gl.constexpr,
    STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
    SHORTCUT_CHUNKS: gl.constexpr,
    SHORTCUT_STRIDE: gl.constexpr,
    BH: gl.constexpr,
    NB: gl.constexpr,
    BW: gl.constexpr,
    BK: gl.constexpr,
    LINES: gl.constexpr,
    SHARED: gl.constexpr,
    COPIES: gl.constexpr,
):
    """A group's pixels, BK channels at a time: for each column of the window with the rows around, or for each tap."""
    OPERAND: gl.constexpr = x_desc.dtype
    GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
    copy = 0
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        h0, b0, w0 = first_pixel(pair // tiles_n * 2 + GROUP, tiles_h, tiles_w, BH, NB, BW)
        for group in range(GROUPS):
            for j in range(3 * CHUNKS if SHARED else 9 * CHUNKS):
                _copy_window(
                    x_desc,
                    edge_desc,
                    pixels,
                    pixels_ready,
                    pixels_free,
                    h0,
                    b0,
                    w0,
                    group,
                    j,
                    copy,
                    B,
                    C,
                    GROUP,
                    STRIDE,
                    STEPS,
                    BH,
                    NB,
                    BW,
                    BK,
                    LINES,
                    SHARED,
                    COPIES,
                )
                copy += 1
            if SHORTCUT_CHUNKS > 0:
                DEPTH: gl.constexpr = BK * OPERAND.primitive_bitwidth // 16
                for i in range(SHORTCUT_CHUNKS):
                    slot = GROUP * COPIES + copy % COPIES
                    mbarrier.wait(pixels_free.index(slot), ((copy // COPIES) & 1) ^ 1)
                    done = pixels_ready.index(slot)
                    mbarrier.expect(done, BH * NB * BW * BK * (OPERAND.primitive_bitwidth // 8))
                    if SHORTCUT_STRIDE == 1:
                        corner = [h0, group, b0, w0, i * DEPTH]
                    else:
                        corner = [h0, 0, group * B + b0, w0, i * DEPTH]
                    tma.async_copy_global_to_shared(
                        shortcut_desc,
                        corner,
                        done,
                        pixels.index(slot * STEPS * LINES)._reinterpret(
                            shortcut_desc.dtype, [BH, 1, NB, BW, DEPTH], shortcut_desc.layout
                        ),
                    )
                    copy += 1


@gluon.jit
def copy_weights(
    w_desc,
    shortcut_w_desc,
    weights,
    weights_ready,
    weights_free,
    tiles_n,
    pairs,
    C,
    T: gl.constexpr,
    CHUNKS: gl.constexpr,
    STEPS: gl.constexpr,
    SHORTCUT_CHUNKS: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    RING: gl.constexpr,
    RESIDENT: gl.constexpr,
):
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
            if SHORTCUT_CHUNKS > 0:
                for i in range(SHORTCUT_CHUNKS):
                    slot = count % RING
                    mbarrier.wait(weights_free.index(slot), ((count // RING) & 1) ^ 1)
                    mbarrier.expect(weights_ready.index(slot), BYTES)
                    target = weights.index(slot)._reinterpret(
                        shortcut_w_desc.dtype, [BN, DEPTH], shortcut_w_desc.layout
                    )
                    tma.async_copy_global_to_shared(shortcut_w_desc, [n0, i * DEPTH], weights_ready.index(slot), target)
                    count += 1
