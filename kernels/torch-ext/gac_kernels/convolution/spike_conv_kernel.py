"""Triton kernel of `spike_conv` for GPUs, sizes and dtypes that the Hopper kernels do not take."""

from __future__ import annotations

from ..common.neuron_step import reset
from ..common.triton import tl, triton


@triton.jit
def spike_conv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    res_ptr,
    s_ptr,
    y_ptr,
    rows,
    H,
    W,
    OH,
    OW,
    C,
    N,
    frame_in,
    frame_out,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SOFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Spikes and, with KEEP, currents of BLOCK_M output pixels by BLOCK_N channels at all steps."""
    # Neighbouring programs share pixels and differ in channels: the second finds the pixels in the L2 cache.
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    exists = row < rows
    in_n = n < N
    batch = row // (OH * OW)
    top = (row % (OH * OW)) // OW * STRIDE - 1
    left = row % OW * STRIDE - 1
    corner = ((batch.to(tl.int64) * H + top) * W + left) * C  # [M], the window's first pixel, maybe in the padding
    frame_in = tl.cast(frame_in, tl.int64)
    frame_out = tl.cast(frame_out, tl.int64)
    scale = tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
    bias = tl.load(bias_ptr + n, mask=in_n, other=0.0)[None, :] - SHIFT
    out = row.to(tl.int64)[:, None] * N + n[None, :]
    here = exists[:, None] & in_n[None, :]
    v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(T):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(9 * tl.cdiv(C, BLOCK_K)):
            tap = step % 9
            first = step // 9 * BLOCK_K
            ih = top + tap // 3
            iw = left + tap % 3
            inside = (exists & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
            of_weight = in_n[None, :]
            if WHOLE_N:
                of_weight = tl.full((1, BLOCK_N), True, tl.int1)
            if not WHOLE_K:
                inside = inside & (first + k < C)[None, :]
                of_weight = of_weight & (first + k < C)[:, None]
            pixels = x_ptr + t * frame_in + ((tap // 3 * W + tap % 3) * C + first) + corner[:, None] + k[None, :]
            weights = w_ptr + (tap * C + first) + n[None, :] * (9 * C) + k[:, None]
            a = tl.load(pixels, mask=inside, other=0)  # [M, K]
            b = tl.load(weights, mask=of_weight, other=0)  # [K, N]
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        current = acc.to(tl.float32) * scale + bias
        if RESIDUAL:
            r = tl.load(res_ptr + t * frame_out + out, mask=here, other=0.0).to(tl.float32)
            if SHIFT != 0.0:
                r += SHIFT  # so large that r is rounded to the grid; the bias takes it away again
            current += r
        if KEEP:
            tl.store(y_ptr + t * frame_out + out, current.to(y_ptr.dtype.element_ty), mask=here)
        u = DECAY * v + current
        tl.store(s_ptr + t * frame_out + out, tl.where(u > THRESHOLD, 1, 0).to(tl.int8), mask=here)
        v = reset(u, THRESHOLD, SOFT)
