"""Triton kernels of `gac_fire`: encoder and second neuron, forward and backward.

Values of channels as in `gated_lif_kernels`: decays and thresholds of the first neuron, then those of the second.
"""

from __future__ import annotations

from ..common.neuron_step import learned_values, membrane_grad_by, reset, reset_by, threshold_grad
from ..common.triton import tl, triton
from .gated_lif_kernels import gate_of


@triton.jit
def fire_fwd_kernel(
    x_ptr,
    n_ptr,
    m_ptr,
    y_ptr,
    s_ptr,
    values_ptr,
    c_stride,
    C,
    size,
    tiles,
    x_step,
    x_sample,
    y_step,
    y_sample,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gated spikes y and spikes s of the second neuron; a program takes BLOCK places of one sample at all steps."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // tiles
    i = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if values_ptr is not None:
        channel = (i // c_stride) % C
        decay, threshold = learned_values(values_ptr, channel, C)
        second_decay, second_threshold = learned_values(values_ptr + 2 * C, channel, C)
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
        second_decay: tl.constexpr = DECAY
        second_threshold: tl.constexpr = THRESHOLD
    at_x = sample * x_sample + i
    at_y = sample * y_sample + i
    x_step = tl.cast(x_step, tl.int64)
    y_step = tl.cast(y_step, tl.int64)
    if STATIC:
        x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(n_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    w = tl.zeros((BLOCK,), tl.float32)  # membrane of the second neuron
    for t in range(T):
        if not STATIC:
            x = tl.load(x_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32)
        u = decay * v + x
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)
        y = tl.where(u > threshold, gate_of(m, n), 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at_y + t * y_step, y, mask=inside)
        v = reset(u, threshold, SOFT)
        z = second_decay * w + y.to(
            tl.float32
        )  # of what was stored, so that spikes are those of the two ops to the bit
        tl.store(
            s_ptr + at_y + t * y_step, tl.where(z > second_threshold, 1.0, 0.0).to(s_ptr.dtype.element_ty), mask=inside
        )
        w = reset(z, second_threshold, SOFT)


@triton.jit
def fire_bwd_kernel(
    gy_ptr,
    gs_ptr,
    x_ptr,
    n_ptr,
    m_ptr,
    gx_ptr,
    gn_ptr,
    gm_ptr,
    values_ptr,
    gvalues_ptr,
    c_stride,
    C,
    size,
    tiles,
    x_step,
    x_sample,
    y_step,
    y_sample,
    T: tl.constexpr,
    STATIC: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_GY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients at x, at the scores n and, for each place, at its values; a program's share of that at m a step."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // tiles
    i = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if values_ptr is not None:
        channel = (i // c_stride) % C
        decay, threshold = learned_values(values_ptr, channel, C)
        second_decay, second_threshold = learned_values(values_ptr + 2 * C, channel, C)
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
        second_decay: tl.constexpr = DECAY
        second_threshold: tl.constexpr = THRESHOLD
    if values_ptr is not None:
        g_decay = tl.zeros((BLOCK,), tl.float32)
        g_threshold = tl.zeros((BLOCK,), tl.float32)
        g_second_decay = tl.zeros((BLOCK,), tl.float32)
        g_second_threshold = tl.zeros((BLOCK,), tl.float32)
    at_x = sample * x_sample + i
    at_y = sample * y_sample + i
    x_step = tl.cast(x_step, tl.int64)
    y_step = tl.cast(y_step, tl.int64)
    if STATIC:
        x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(n_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        gx = tl.zeros((BLOCK,), tl.float32)
        gn = tl.zeros((BLOCK,), tl.float32)
    xs = ()
    ns = ()
    gys = ()
    gss = ()
    for t in tl.static_range(T):
        gss += (tl.load(gs_ptr + at_y + t * y_step, mask=inside, other=0.0),)
        if HAS_GY:
            gys += (tl.load(gy_ptr + at_y + t * y_step, mask=inside, other=0.0),)
        if STATIC:
            xs += (x,)
            ns += (n,)
        else:
            xs += (tl.load(x_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32),)
            ns += (tl.load(n_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32),)
    v = tl.zeros((BLOCK,), tl.float32)
    w = tl.zeros((BLOCK,), tl.float32)
    us = ()  # membranes of the first neuron
    zs = ()  # and of the second
    gates = ()
    vs = ()  # membranes of the first neuron before each step
    ws = ()  # and of the second
    for t in tl.static_range(T):
        if values_ptr is not None:
            vs += (v,)
            ws += (w,)
        u = decay * v + xs[t]
        g = gate_of(tl.load(m_ptr + sample * T + t).to(tl.float32), ns[t])
        z = second_decay * w + tl.where(u > threshold, g, 0.0).to(gs_ptr.dtype.element_ty).to(tl.float32)
        us += (u,)
        zs += (z,)
        gates += (g,)
        v = reset_by(u, tl.where(u > threshold, 0.0, 1.0), threshold, SOFT)
        w = reset_by(z, tl.where(z > second_threshold, 0.0, 1.0), second_threshold, SOFT)
    gv = tl.zeros((BLOCK,), tl.float32)
    gw = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(T - 1, -1, -1):
        keep_z = tl.where(zs[t] > second_threshold, 0.0, 1.0)
        at_z = gss[t].to(tl.float32)
        gy = membrane_grad_by(zs[t], keep_z, at_z, gw, second_threshold, SURROGATE, WIDTH, DETACH, SOFT)
        if values_ptr is not None:
            g_second_decay += gy * ws[t]
            g_second_threshold += threshold_grad(
                zs[t], keep_z, at_z, gw, second_threshold, SURROGATE, WIDTH, DETACH, SOFT
            )
        gw = second_decay * gy
        if HAS_GY:
            gy += gys[t].to(tl.float32)
        keep = tl.where(us[t] > threshold, 0.0, 1.0)
        through = gy * gates[t]  # at the first neuron's spike
        score = through - through * gates[t]  # at the score m * n, where the neuron fired
        score -= score * keep
        gu = membrane_grad_by(us[t], keep, through, gv, threshold, SURROGATE, WIDTH, DETACH, SOFT)
        if values_ptr is not None:
            g_decay += gu * vs[t]
            g_threshold += threshold_grad(us[t], keep, through, gv, threshold, SURROGATE, WIDTH, DETACH, SOFT)
        gv = decay * gu
        tl.store(gm_ptr + pid * T + t, tl.sum(score * ns[t], 0))
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)  # again: kept, it would take 40 registers more at T = 8
        if STATIC:
            gn += score * m
            gx += gu
        else:
            tl.store(gn_ptr + at_x + t * x_step, (score * m).to(gn_ptr.dtype.element_ty), mask=inside)
            tl.store(gx_ptr + at_x + t * x_step, gu.to(gx_ptr.dtype.element_ty), mask=inside)
    if STATIC:
        tl.store(gx_ptr + at_x, gx.to(gx_ptr.dtype.element_ty), mask=inside)
        tl.store(gn_ptr + at_x, gn.to(gn_ptr.dtype.element_ty), mask=inside)
    if values_ptr is not None:
        at = sample * size + i
        row = tl.cast(y_step, tl.int64)
        tl.store(gvalues_ptr + at, g_decay, mask=inside)
        tl.store(gvalues_ptr + row + at, g_threshold, mask=inside)
        tl.store(gvalues_ptr + 2 * row + at, g_second_decay, mask=inside)
        tl.store(gvalues_ptr + 3 * row + at, g_second_threshold, mask=inside)
