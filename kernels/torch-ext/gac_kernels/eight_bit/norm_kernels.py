"""Triton kernels of batch norm and neuron between convolutions in 8 bits: they write bytes, as they are and turned.

A program has one pixel of BLOCK_B images at all steps, BLOCK_C channels of it: of these a turned tensor
(`weight_gradient.turned_size`) has whole words side by side. Reads and writes of channels-last tensors are then pieces
of BLOCK_C channels. Neighbouring programs have other images of the same pixel, then the next pixel.

Spikes are 0 and 1 for the forward pass, which multiplies integers, and in turned tensors 0 and 1.0 in e4m3.
"""

from __future__ import annotations

from ..common.neuron_step import membrane_grad, reset
from ..common.tiles import norm_affine
from ..common.triton import tl, triton
from ..norm.norm_lif_kernels import _input_gradient as input_gradient
from .rounding import e4m3_code, power_scale

_ONE = tl.constexpr(0x38)  # 1.0 in e4m3


@triton.jit
def _places(B, C, S, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixel, images and channels of this program; offsets in one step's (B, S, C) frame, and their mask."""
    groups = tl.cdiv(B, BLOCK_B)
    pixel = tl.program_id(0) // groups
    image = tl.program_id(0) % groups * BLOCK_B + tl.arange(0, BLOCK_B)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (image.to(tl.int64) * S + pixel)[:, None] * C + channel[None, :]
    return pixel, image, channel, at, (image[:, None] < B) & (channel[None, :] < C)


@triton.jit
def _store_turned(to_ptr, words, pixel, image, channel, nth, B, C, WORDS: tl.constexpr):
    """Store the nth word of each image, up to the next four images: those beyond the batch are 0."""
    padded = tl.cdiv(B, 4) * 4
    at = (pixel.to(tl.int64) * C + channel)[None, :] * (padded * WORDS) + (image * WORDS + nth)[:, None]
    words = tl.where(image[:, None] < B, words, 0)
    tl.store(to_ptr + at, words, mask=(image[:, None] < padded) & (channel[None, :] < C))


@triton.jit
def bytes_kernel(
    x_ptr,
    s_ptr,
    turned_ptr,
    B,
    C,
    S,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spikes of a floating dtype as bytes."""
    pixel, image, channel, at, inside = _places(B, C, S, BLOCK_B, BLOCK_C)
    frame = tl.cast(B, tl.int64) * S * C
    xs = ()
    for t in tl.static_range(T):
        xs += (tl.load(x_ptr + at + t * frame, mask=inside, other=0.0),)
    words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
    for t in tl.static_range(T):
        fired = xs[t].to(tl.float32) > 0.5
        tl.store(s_ptr + at + t * frame, fired.to(tl.int8), mask=inside)
        words |= tl.where(fired, _ONE << (t % 4 * 8), 0)
        if t % 4 == 3 or t == T - 1:
            _store_turned(turned_ptr, words, pixel, image, channel, t // 4, B, C, WORDS)
            words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)


@triton.jit
def forward_kernel(
    x_ptr,
    res_ptr,
    w_ptr,
    b_ptr,
    mean_ptr,
    var_ptr,
    rw_ptr,
    rb_ptr,
    rmean_ptr,
    rvar_ptr,
    s_ptr,
    turned_ptr,
    full_ptr,
    y_ptr,
    B,
    C,
    S,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`norm_lif`'s forward pass with spikes as bytes, turned bytes and, where full_ptr is given, in its dtype.

    Pointers that are None: no residual, no norm of it, no membrane to keep, no bytes.
    """
    pixel, image, channel, at, inside = _places(B, C, S, BLOCK_B, BLOCK_C)
    frame = tl.cast(B, tl.int64) * S * C
    scale, shift, _, _ = norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS)
    if rmean_ptr is not None:
        r_scale, r_shift, _, _ = norm_affine(channel, C, rw_ptr, rb_ptr, rmean_ptr, rvar_ptr, R_EPS)
        shift += r_shift
    xs = ()  # loads first: a store between them would keep the compiler from overlapping them
    rs = ()
    for t in tl.static_range(T):
        xs += (tl.load(x_ptr + at + t * frame, mask=inside, other=0.0),)
        if res_ptr is not None:
            rs += (tl.load(res_ptr + at + t * frame, mask=inside, other=0.0),)
    v = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
    for t in tl.static_range(T):
        a = xs[t].to(tl.float32) * scale + shift
        if rmean_ptr is not None:
            a += rs[t].to(tl.float32) * r_scale
        elif res_ptr is not None:
            a += rs[t].to(tl.float32)
        if y_ptr is not None:  # the neuron sees what is stored, so that backward recomputes the same
            stored = a.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + at + t * frame, stored, mask=inside)
            a = stored.to(tl.float32)
        u = DECAY * v + a
        fired = u > THRESHOLD
        if s_ptr is not None:
            tl.store(s_ptr + at + t * frame, fired.to(tl.int8), mask=inside)
        if full_ptr is not None:
            tl.store(full_ptr + at + t * frame, tl.where(fired, 1.0, 0.0).to(full_ptr.dtype.element_ty), mask=inside)
        v = reset(u, THRESHOLD, SOFT)
        if turned_ptr is not None:
            words |= tl.where(fired, _ONE << (t % 4 * 8), 0)
            if t % 4 == 3 or t == T - 1:
                _store_turned(turned_ptr, words, pixel, image, channel, t // 4, B, C, WORDS)
                words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)


@triton.jit
def bound_kernel(
    partial_ptr,
    sums_ptr,
    w_ptr,
    var_ptr,
    conv_scale_ptr,
    total_ptr,
    bound_ptr,
    programs,
    C,
    count,
    EPS: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A bound of the gradient at a convolution's output times its scale, in each channel.

    ``gx = scale * (ga - sum_a / n) + k1 * (x - mean)`` is at most the sum of its parts' magnitudes; the largest of ga
    and of x - mean are the last two rows of `reduce_kernel`'s partial sums.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < C
    of_gradient = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_input = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program[:, None] < programs) & in_c[None, :]
        at = partial_ptr + (program[:, None] * SUMS + SUMS - 2) * C + channel[None, :]
        of_gradient = tl.maximum(of_gradient, tl.load(at, mask=inside, other=0.0))
        of_input = tl.maximum(of_input, tl.load(at + C, mask=inside, other=0.0))
    values = tl.load(total_ptr).to(tl.float32) if HAS_TOTAL else tl.cast(count, tl.float32)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=in_c, other=1.0).to(tl.float32) + EPS)
    scale = rstd
    if w_ptr is not None:
        scale = rstd * tl.load(w_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
    sum_a = tl.load(sums_ptr + channel, mask=in_c, other=0.0)
    sum_b = tl.load(sums_ptr + C + channel, mask=in_c, other=0.0)
    k1 = scale * rstd * rstd * (sum_b / values)
    bound = tl.abs(scale) * tl.max(of_gradient, 0) + tl.abs(k1) * tl.max(of_input, 0) + tl.abs(scale * (sum_a / values))
    bound *= tl.load(conv_scale_ptr + channel, mask=in_c, other=0.0)
    tl.store(bound_ptr + channel, bound, mask=in_c)


@triton.jit
def apply_kernel(
    g_ptr,
    x_ptr,
    res_ptr,
    w_ptr,
    b_ptr,
    mean_ptr,
    var_ptr,
    rw_ptr,
    rb_ptr,
    rmean_ptr,
    rvar_ptr,
    sums_ptr,
    total_ptr,
    conv_scale_ptr,
    bound_ptr,
    divisor_ptr,
    gx_ptr,
    turned_ptr,
    gr_ptr,
    B,
    C,
    S,
    count,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALL_C: tl.constexpr,
):
    """`norm_lif`'s second backward pass with batch statistics: the gradient at x in e4m3, as it is and turned.

    What is rounded is ``gx * conv_scale * divisor``; the divisor is the largest power of two that keeps the largest
    bound of all channels within 448. Program 0 stores it for those who multiply with these gradients.
    """
    pixel, image, channel, at, inside = _places(B, C, S, BLOCK_B, BLOCK_C)
    frame = tl.cast(B, tl.int64) * S * C
    every = tl.arange(0, ALL_C)
    bounds = tl.load(bound_ptr + every, mask=every < C, other=0.0)
    # Of numbers that are not negative the bits are in the same order; NaN's are the largest.
    largest = tl.max(bounds.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    divisor = power_scale(largest)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(divisor_ptr, divisor)
    scale, shift, mean, rstd = norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS)
    values = tl.load(total_ptr).to(tl.float32) if HAS_TOTAL else tl.cast(count, tl.float32)
    k1, k2 = input_gradient(sums_ptr, 1, channel, C, values, scale, mean, rstd, True)
    if NORMED:
        r_scale, _, r_mean, r_rstd = norm_affine(channel, C, rw_ptr, rb_ptr, rmean_ptr, rvar_ptr, R_EPS)
        r_k1, r_k2 = input_gradient(sums_ptr, 2, channel, C, values, r_scale, r_mean, r_rstd, True)
    factor = (tl.load(conv_scale_ptr + channel, mask=channel < C, other=0.0) * divisor)[None, :]
    xs = ()
    gs = ()
    for t in tl.static_range(T):
        xs += (tl.load(x_ptr + at + t * frame, mask=inside, other=0.0).to(tl.float32),)
        gs += (tl.load(g_ptr + at + t * frame, mask=inside, other=0.0).to(tl.float32),)
    if NORMED:
        for t in tl.static_range(T):
            residual = tl.load(res_ptr + at + t * frame, mask=inside, other=0.0).to(tl.float32)
            gr = r_scale * gs[t] + r_k1 * residual + r_k2
            tl.store(gr_ptr + at + t * frame, gr.to(gr_ptr.dtype.element_ty), mask=inside)
    us = ()
    if RECOMPUTE:  # g is the gradient at the spikes
        v = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for t in tl.static_range(T):
            u = DECAY * v + (xs[t] * scale + shift)
            us += (u,)
            v = reset(u, THRESHOLD, SOFT)
    gv = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
    for t in tl.static_range(T - 1, -1, -1):
        gu = gs[t]
        if RECOMPUTE:
            gu = membrane_grad(us[t], gs[t], gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
            gv = DECAY * gu
        code = e4m3_code((scale * gu + k1 * xs[t] + k2) * factor)
        tl.store(gx_ptr + at + t * frame, code, mask=inside)
        words |= code.to(tl.int32) << (t % 4 * 8)
        if t % 4 == 0:
            _store_turned(turned_ptr, words, pixel, image, channel, t // 4, B, C, WORDS)
            words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
