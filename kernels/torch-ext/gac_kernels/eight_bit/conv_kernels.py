"""3x3 convolutions with operands of one byte as plain Triton: implicit matrix products over channels.

The forward pass multiplies spikes and weights as int8, sums of which are exact. The input gradient multiplies e4m3
gradients and weights with taps in reverse order; that of a convolution with stride 2 is in `transposed`.

Hopper's tensor cores keep about 14 bits of a sum of float8 products, aligned to its largest term, and cut the others
off: over the up to 4,608 products of a sum here that is up to a percent, always towards 0, where the float32 sums of
the definition have none. IMPRECISE says after how many products sums are added up in float32: 128 keeps the error
below 2**-12, a sixteenth of what rounding the result to bfloat16 costs. Other GPUs ignore it.
"""

from __future__ import annotations

from ..common.triton import tl, triton


@triton.jit
def tile_statistics(y, exists, count):
    """Mean and sum of squares around it over the rows of a tile that exist, count of them: [BLOCK_N] each."""
    mean = tl.sum(tl.where(exists, y, 0.0), 0) / count
    d = tl.where(exists, y - mean[None, :], 0.0)
    return mean, tl.sum(d * d, 0)


@triton.jit
def conv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    divisor_ptr,
    y_ptr,
    partial_ptr,
    frames,
    H,
    W,
    OH,
    OW,
    C,
    N,
    STRIDE: tl.constexpr,
    STATS: tl.constexpr,
    IMPRECISE: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M output pixels by BLOCK_N channels: sums times scale (of channels) and through divisor (a scalar).

    x is (frames, H, W, C) and w (N, 3, 3, C), int8 or float8 e4m3, y (frames, OH, OW, N). With STATS, partial
    (tiles, 3, N) gets count, mean and sum of squares around the mean of what is stored.
    """
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    # Neighbouring programs share pixels and differ in channels: the second finds the pixels in the L2 cache.
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = frames * OH * OW
    exists = row < rows
    in_n = n < N
    frame = row // (OH * OW)
    oh = row % (OH * OW) // OW
    ow = row % OW
    top = oh * STRIDE - 1
    left = ow * STRIDE - 1
    corner = ((frame.to(tl.int64) * H + top) * W + left) * C  # [M], the window's first pixel, maybe in the padding
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    zeros_a = tl.zeros((BLOCK_M, BLOCK_K), x_ptr.dtype.element_ty)
    zeros_b = tl.zeros((BLOCK_K, BLOCK_N), x_ptr.dtype.element_ty)
    for step in range(9 * tl.cdiv(C, BLOCK_K)):
        tap = step % 9
        first = step // 9 * BLOCK_K
        dh = tap // 3
        dw = tap % 3
        ih = top + dh
        iw = left + dw
        inside = (exists & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W))[:, None]
        of_weight = in_n[None, :]
        if WHOLE_N:
            of_weight = tl.full((1, BLOCK_N), True, tl.int1)
        if not WHOLE_K:
            inside = inside & (first + k < C)[None, :]
            of_weight = of_weight & (first + k < C)[:, None]
        pixels = x_ptr + ((dh * W + dw) * C + first) + corner[:, None] + k[None, :]
        weights = w_ptr + (tap * C + first) + n[None, :] * (9 * C) + k[:, None]
        a = tl.load(pixels, mask=inside, other=zeros_a)  # [M, K]
        b = tl.load(weights, mask=of_weight, other=zeros_b)  # [K, N]
        acc = tl.dot(a, b, acc, out_dtype=SUM, max_num_imprecise_acc=IMPRECISE)
    y = acc.to(tl.float32)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
    if divisor_ptr is not None:
        y *= 1.0 / tl.load(divisor_ptr)  # a power of two
    stored = y.to(y_ptr.dtype.element_ty)
    out = ((frame.to(tl.int64) * OH + oh) * OW + ow)[:, None] * N + n[None, :]
    tl.store(y_ptr + out, stored, mask=exists[:, None] & in_n[None, :])
    if STATS:
        count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, square = tile_statistics(stored.to(tl.float32), exists[:, None], count)
        at = partial_ptr + tile.to(tl.int64) * 3 * N + n
        tl.store(at, tl.zeros_like(mean) + count, mask=in_n)
        tl.store(at + N, mean, mask=in_n)
        tl.store(at + 2 * N, square, mask=in_n)


@triton.jit
def finish_statistics_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    w_ptr,
    b_ptr,
    affine_ptr,
    momentum,
    parts,
    C,
    EPS: tl.constexpr,
    UPDATE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of channels from those of parts, added up in a fixed order; and the running ones.

    With affine_ptr also scale and shift of the batch norm, (2, C), as `norm_affine` computes them.
    """
    if COUNT:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(0) == 0)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < C
    pivot = tl.load(partial_ptr + C + channel, mask=in_c, other=0.0)
    counts = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part[:, None] < parts) & in_c[None, :]
        at = partial_ptr + part[:, None] * 3 * C + channel[None, :]
        count = tl.load(at, mask=inside, other=0.0)
        d = tl.where(count > 0.0, tl.load(at + C, mask=inside, other=0.0) - pivot[None, :], 0.0)
        counts += count
        total += count * d
        square += tl.load(at + 2 * C, mask=inside, other=0.0) + count * d * d
    values = tl.maximum(tl.sum(counts, 0), 1.0)
    shift = tl.sum(total, 0) / values
    mean = pivot + shift
    var = tl.maximum(tl.sum(square, 0) / values - shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean_ptr + channel, mean, mask=in_c)
    tl.store(var_ptr + channel, var, mask=in_c)
    if affine_ptr is not None:
        scale = 1.0 / tl.sqrt(var + EPS)
        if w_ptr is not None:
            scale *= tl.load(w_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        shift = -mean * scale
        if b_ptr is not None:
            shift += tl.load(b_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        tl.store(affine_ptr + channel, scale, mask=in_c)
        tl.store(affine_ptr + C + channel, shift, mask=in_c)
    if UPDATE:
        weight = tl.cast(momentum, tl.float32)
        before = tl.load(running_mean_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        running_mean = (before + weight * (mean - before)).to(running_mean_ptr.dtype.element_ty)
        before = tl.load(running_var_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        running_var = before + weight * (var * (values / (values - 1.0)) - before)
        running_var = running_var.to(running_var_ptr.dtype.element_ty)
        # Where one would not be finite in its dtype, both stay as they are. A difference is 0 unless one is so.
        finite = (running_mean - running_mean == 0.0) & (running_var - running_var == 0.0)
        tl.store(running_mean_ptr + channel, running_mean, mask=in_c & finite)
        tl.store(running_var_ptr + channel, running_var, mask=in_c & finite)
