"""Triton kernels of `gac_fire`: encoder and second neuron, forward and backward."""

from __future__ import annotations

from ..common.neuron_step import membrane_grad_by, reset, reset_by
from ..common.triton import tl, triton
from .gated_lif_kernels import gate_of


@triton.jit
def fire_fwd_kernel(
    x_ptr,
    n_ptr,
    m_ptr,
    y_ptr,
    s_ptr,
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
        u = DECAY * v + x
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)
        y = tl.where(u > THRESHOLD, gate_of(m, n), 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at_y + t * y_step, y, mask=inside)
        v = reset(u, THRESHOLD, SOFT)
        z = DECAY * w + y.to(tl.float32)  # of what was stored, so that spikes are those of the two ops to the bit
        tl.store(s_ptr + at_y + t * y_step, tl.where(z > THRESHOLD, 1.0, 0.0).to(s_ptr.dtype.element_ty), mask=inside)
        w = reset(z, THRESHOLD, SOFT)


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
    """Gradients at x and at the scores n, and for each program and step a partial sum of that at m."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // tiles
    i = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
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
    for t in tl.static_range(T):
        u = DECAY * v + xs[t]
        g = gate_of(tl.load(m_ptr + sample * T + t).to(tl.float32), ns[t])
        z = DECAY * w + tl.where(u > THRESHOLD, g, 0.0).to(gs_ptr.dtype.element_ty).to(tl.float32)
        us += (u,)
        zs += (z,)
        gates += (g,)
        v = reset_by(u, tl.where(u > THRESHOLD, 0.0, 1.0), THRESHOLD, SOFT)
        w = reset_by(z, tl.where(z > THRESHOLD, 0.0, 1.0), THRESHOLD, SOFT)
    gv = tl.zeros((BLOCK,), tl.float32)
    gw = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(T - 1, -1, -1):
        keep_z = tl.where(zs[t] > THRESHOLD, 0.0, 1.0)
        gy = membrane_grad_by(zs[t], keep_z, gss[t].to(tl.float32), gw, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
        gw = DECAY * gy
        if HAS_GY:
            gy += gys[t].to(tl.float32)
        keep = tl.where(us[t] > THRESHOLD, 0.0, 1.0)
        through = gy * gates[t]  # at the first neuron's spike
        score = through - through * gates[t]  # at the score m * n, where the neuron fired
        score -= score * keep
        gu = membrane_grad_by(us[t], keep, through, gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
        gv = DECAY * gu
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
