"""Triton kernels of batch norm and neuron between convolutions in 8 bits: they write bytes, as they are and turned.

A program has one pixel of BLOCK_B images at all steps, BLOCK_C channels of it: of these a turned tensor
(`weight_gradient.turned_size`) has whole words side by side. Reads and writes of channels-last tensors are then pieces
of BLOCK_C channels. Neighbouring programs have other images of the same pixel, then the next pixel; with PIXELS_FIRST
the other way around.

Spikes are 0 and 1 for the forward pass, which multiplies integers, and in turned tensors 0 and 1.0 in e4m3.
"""

from __future__ import annotations

from ..common.neuron_step import membrane_grad, reset
from ..common.tiles import norm_affine, sum_partials
from ..common.triton import tl, triton
from .rounding import e4m3_code, e4m3_pair, power_scale

_ONE = tl.constexpr(0x38)  # 1.0 in e4m3


@triton.jit
def _places(B, C, S, PIXELS_FIRST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixel, images and channels of this program; offsets in one step's (B, S, C) frame, and their mask."""
    if PIXELS_FIRST:
        pixel = tl.program_id(0) % S
        first = tl.program_id(0) // S * BLOCK_B
    else:
        groups = tl.cdiv(B, BLOCK_B)
        pixel = tl.program_id(0) // groups
        first = tl.program_id(0) % groups * BLOCK_B
    image = first + tl.arange(0, BLOCK_B)
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
def _factor(factors_ptr, row: tl.constexpr, channel, C):
    """A row of factors (rows, C), [1, BLOCK_C]."""
    return tl.load(factors_ptr + row * C + channel, mask=channel < C, other=0.0)[None, :]


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
    PIXELS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spikes of a floating dtype as bytes."""
    pixel, image, channel, at, inside = _places(B, C, S, PIXELS_FIRST, BLOCK_B, BLOCK_C)
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
    affine_ptr,
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
    PIXELS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`norm_lif`'s forward pass with spikes as bytes, turned bytes and, where full_ptr is given, in its dtype.

    Pointers that are None: no scale and shift yet, no residual, no norm of it, no membrane to keep, no bytes.
    """
    pixel, image, channel, at, inside = _places(B, C, S, PIXELS_FIRST, BLOCK_B, BLOCK_C)
    frame = tl.cast(B, tl.int64) * S * C
    if affine_ptr is not None:
        scale = _factor(affine_ptr, 0, channel, C)
        shift = _factor(affine_ptr, 1, channel, C)
    else:
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
def _store_norm_grads(channel, C, w_ptr, gw_ptr, gb_ptr, sum_a, sum_b, rstd):
    """Gradients of a norm's weight and bias, where there are such."""
    if gw_ptr is not None:
        tl.store(gw_ptr + channel, (sum_b * rstd).to(gw_ptr.dtype.element_ty), mask=channel < C)
    if gb_ptr is not None:
        tl.store(gb_ptr + channel, sum_a.to(gb_ptr.dtype.element_ty), mask=channel < C)


@triton.jit
def _rstd_and_scale(channel, C, w_ptr, var_ptr, EPS: tl.constexpr):
    """1 / standard deviation and, times the weight, a norm's scale: [BLOCK_C] each, as of `norm_affine`."""
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=channel < C, other=1.0).to(tl.float32) + EPS)
    scale = rstd
    if w_ptr is not None:
        scale = rstd * tl.load(w_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    return rstd, scale


@triton.jit
def finish_kernel(
    partial_ptr,
    w_ptr,
    b_ptr,
    mean_ptr,
    var_ptr,
    rw_ptr,
    rmean_ptr,
    rvar_ptr,
    conv_scale_ptr,
    total_ptr,
    sums_ptr,
    gw_ptr,
    gb_ptr,
    grw_ptr,
    grb_ptr,
    bound_ptr,
    factors_ptr,
    programs,
    C,
    count,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    NORMED: tl.constexpr,
    SUMS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `apply_kernel` needs of each channel, from the partial sums of `reduce_kernel`, added up in a fixed order.

    FIRST leaves the sums, and the gradients of weights and biases; LAST takes sums, over all processes where there are
    several, and leaves the factors (8, C) and a bound. Both at once hand nothing over in memory.

    ``gx = scale * (ga - sum_a / n) + k1 * (x - mean)`` is at most the sum of its parts' magnitudes, the largest of ga
    and of x - mean being the last two rows of the partial sums: times the convolution's scale that is the bound.

    The factors are ``scale, shift`` of the norm; those of ga, of x and of 1 in ``gx * conv_scale``; and those of ga, of
    the residual and of 1 in the residual's gradient.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < C
    rstd, scale = _rstd_and_scale(channel, C, w_ptr, var_ptr, EPS)
    r_rstd = rstd
    r_scale = scale
    if NORMED:
        r_rstd, r_scale = _rstd_and_scale(channel, C, rw_ptr, rvar_ptr, R_EPS)
    if FIRST:
        sum_a, sum_b, sum_c = sum_partials(partial_ptr, channel, programs, C, SUMS, BLOCK_P, BLOCK_C)
        _store_norm_grads(channel, C, w_ptr, gw_ptr, gb_ptr, sum_a, sum_b, rstd)
        if NORMED:
            _store_norm_grads(channel, C, rw_ptr, grw_ptr, grb_ptr, sum_a, sum_c, r_rstd)
        if not LAST:
            tl.store(sums_ptr + channel, sum_a, mask=in_c)
            tl.store(sums_ptr + C + channel, sum_b, mask=in_c)
            tl.store(sums_ptr + 2 * C + channel, sum_c, mask=in_c)
    else:
        sum_a = tl.load(sums_ptr + channel, mask=in_c, other=0.0)
        sum_b = tl.load(sums_ptr + C + channel, mask=in_c, other=0.0)
        sum_c = tl.load(sums_ptr + 2 * C + channel, mask=in_c, other=0.0)
    if LAST:
        of_gradient = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        of_input = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, programs, BLOCK_P):
            program = first + tl.arange(0, BLOCK_P)
            inside = (program[:, None] < programs) & in_c[None, :]
            at = partial_ptr + (program[:, None] * SUMS + SUMS - 2) * C + channel[None, :]
            of_gradient = tl.maximum(of_gradient, tl.load(at, mask=inside, other=0.0))
            of_input = tl.maximum(of_input, tl.load(at + C, mask=inside, other=0.0))
        values = tl.cast(count, tl.float32)
        if total_ptr is not None:
            values = tl.load(total_ptr).to(tl.float32)
        mean = tl.load(mean_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        shift = -mean * scale
        if b_ptr is not None:
            shift += tl.load(b_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
        k1 = -scale * rstd * rstd * (sum_b / values)
        k2 = -scale * (sum_a / values)
        conv_scale = tl.load(conv_scale_ptr + channel, mask=in_c, other=0.0)
        bound = tl.abs(scale) * tl.max(of_gradient, 0) + tl.abs(k1) * tl.max(of_input, 0) + tl.abs(k2)
        tl.store(bound_ptr + channel, bound * conv_scale, mask=in_c)
        to = factors_ptr + channel
        tl.store(to, scale, mask=in_c)
        tl.store(to + C, shift, mask=in_c)
        tl.store(to + 2 * C, scale * conv_scale, mask=in_c)
        tl.store(to + 3 * C, k1 * conv_scale, mask=in_c)
        tl.store(to + 4 * C, (k2 - k1 * mean) * conv_scale, mask=in_c)
        if NORMED:
            r_mean = tl.load(rmean_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
            r_k1 = -r_scale * r_rstd * r_rstd * (sum_c / values)
            tl.store(to + 5 * C, r_scale, mask=in_c)
            tl.store(to + 6 * C, r_k1, mask=in_c)
            tl.store(to + 7 * C, -r_scale * (sum_a / values) - r_k1 * r_mean, mask=in_c)


@triton.jit
def apply_kernel(
    g_ptr,
    x_ptr,
    res_ptr,
    factors_ptr,
    bound_ptr,
    divisor_ptr,
    gx_ptr,
    turned_ptr,
    gr_ptr,
    B,
    C,
    S,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    NORMED: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALL_C: tl.constexpr,
):
    """`norm_lif`'s second backward pass with batch statistics: the gradient at x in e4m3, as it is and turned.

    What is rounded is ``gx * conv_scale * divisor``; the divisor is the largest power of two that keeps the largest
    bound of all channels within 448. Program 0 stores it for those who multiply with these gradients.

    It has time for some 40 instructions an element while memory moves its 6 bytes: what depends on the channel alone
    is `finish_kernel`'s.
    """
    pixel, image, channel, at, inside = _places(B, C, S, PIXELS_FIRST, BLOCK_B, BLOCK_C)
    frame = tl.cast(B, tl.int64) * S * C
    xs = ()  # all large loads are on their way before anything waits
    gs = ()
    rs = ()
    for t in tl.static_range(T):
        xs += (tl.load(x_ptr + at + t * frame, mask=inside, other=0.0),)
        gs += (tl.load(g_ptr + at + t * frame, mask=inside, other=0.0),)
        if NORMED:
            rs += (tl.load(res_ptr + at + t * frame, mask=inside, other=0.0),)
    every = tl.arange(0, ALL_C)
    bounds = tl.load(bound_ptr + every, mask=every < C, other=0.0)
    # Of numbers that are not negative the bits are in the same order; NaN's are the largest.
    largest = tl.max(bounds.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    divisor = power_scale(largest)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(divisor_ptr, divisor)
    if NORMED:
        of_g = _factor(factors_ptr, 5, channel, C)
        of_r = _factor(factors_ptr, 6, channel, C)
        of_one = _factor(factors_ptr, 7, channel, C)
        for t in tl.static_range(T):
            gr = of_g * gs[t].to(tl.float32) + of_r * rs[t].to(tl.float32) + of_one
            tl.store(gr_ptr + at + t * frame, gr.to(gr_ptr.dtype.element_ty), mask=inside)
    us = ()
    if RECOMPUTE:  # g is the gradient at the spikes
        scale = _factor(factors_ptr, 0, channel, C)
        shift = _factor(factors_ptr, 1, channel, C)
        v = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for t in tl.static_range(T):
            u = DECAY * v + (xs[t].to(tl.float32) * scale + shift)
            us += (u,)
            v = reset(u, THRESHOLD, SOFT)
    of_g = _factor(factors_ptr, 2, channel, C) * divisor
    of_x = _factor(factors_ptr, 3, channel, C) * divisor
    of_one = _factor(factors_ptr, 4, channel, C) * divisor
    gv = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    later = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
    for t in tl.static_range(T - 1, -1, -1):
        gu = gs[t].to(tl.float32)
        if RECOMPUTE:
            gu = membrane_grad(us[t], gu, gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
            gv = DECAY * gu
        gx = of_g * gu + (of_x * xs[t].to(tl.float32) + of_one)
        tl.store(gx_ptr + at + t * frame, e4m3_code(gx), mask=inside)
        if t % 2 == 1:
            later = gx
        else:
            words |= e4m3_pair(gx, later) << (t % 4 * 8)
            later = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        if t % 4 == 0:
            _store_turned(turned_ptr, words, pixel, image, channel, t // 4, B, C, WORDS)
            words = tl.zeros((BLOCK_B, BLOCK_C), tl.int32)
