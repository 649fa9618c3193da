"""Triton kernels of `gac_fire`: encoder and second neuron, forward and backward.

Values of channels as in `gated_lif_kernels`: decays and thresholds of the first neuron, then those of the second.
"""

from __future__ import annotations

from ..common.neuron_step import (
    fire,
    gated,
    keep_of,
    kept_of,
    learned_values,
    resting,
    retreat_by,
    settle,
    settle_by,
    settle_grad,
    threshold_grad,
    times_spikes,
)
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
    STEP: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
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
    state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    second = resting(tl.zeros((BLOCK,), tl.float32), STATES)  # states of the second neuron
    for t in range(T):
        if not STATIC:
            x = tl.load(x_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + at_x + t * x_step, mask=inside, other=0.0).to(tl.float32)
        s, pending = fire(x, state, threshold, decay, SOFT, STEP, CONSTANTS)
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)
        y = gated(s, pending, gate_of(m, n), threshold, STEP).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at_y + t * y_step, y, mask=inside)
        state = settle(pending, threshold, SOFT, STEP)
        # Of what was stored, so that spikes are those of the two ops to the bit.
        s, pending = fire(y, second, second_threshold, second_decay, SOFT, STEP, CONSTANTS)
        tl.store(s_ptr + at_y + t * y_step, s.to(s_ptr.dtype.element_ty), mask=inside)
        second = settle(pending, second_threshold, SOFT, STEP)


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
    STEP: tl.constexpr = None,
    STEP_GRAD: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
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
    state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    second = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    steps = ()  # of the first neuron
    second_steps = ()  # and of the second
    spikes = ()
    second_spikes = ()
    gates = ()
    vs = ()  # membranes of the first neuron before each step
    ws = ()  # and of the second
    for t in tl.static_range(T):
        if values_ptr is not None:
            vs += (state[0],)
            ws += (second[0],)
        s, pending = fire(xs[t], state, threshold, decay, SOFT, STEP, CONSTANTS)
        g = gate_of(tl.load(m_ptr + sample * T + t).to(tl.float32), ns[t])
        y = gated(s, pending, g, threshold, STEP).to(gs_ptr.dtype.element_ty)
        z, second_pending = fire(y, second, second_threshold, second_decay, SOFT, STEP, CONSTANTS)
        steps += (kept_of(xs[t], state, pending, STEP),)
        second_steps += (kept_of(y, second, second_pending, STEP),)
        spikes += (s,)
        second_spikes += (z,)
        gates += (g,)
        state = settle_by(pending, keep_of(s, pending, threshold, STEP), threshold, SOFT, STEP)
        keep = keep_of(z, second_pending, second_threshold, STEP)
        second = settle_by(second_pending, keep, second_threshold, SOFT, STEP)
    gstate = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    gsecond = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    for t in tl.static_range(T - 1, -1, -1):
        keep_z = keep_of(second_spikes[t], second_steps[t], second_threshold, STEP)
        at_z = gss[t].to(tl.float32)
        gy, pending = retreat_by(
            second_steps[t],
            keep_z,
            at_z,
            gsecond,
            second_threshold,
            second_decay,
            SURROGATE,
            WIDTH,
            DETACH,
            SOFT,
            STEP_GRAD,
            CONSTANTS,
        )
        if values_ptr is not None:
            z = second_steps[t][0]
            g_second_decay += gy * ws[t]
            g_second_threshold += threshold_grad(
                z, keep_z, at_z, gsecond[0], second_threshold, SURROGATE, WIDTH, DETACH, SOFT
            )
        gsecond = settle_grad(pending, second_decay, STEP_GRAD)
        if HAS_GY:
            gy += gys[t].to(tl.float32)
        keep = keep_of(spikes[t], steps[t], threshold, STEP)
        through = gy * gates[t]  # at the first neuron's spike
        score = through - through * gates[t]  # at the score m * n, where the neuron fired
        score = times_spikes(score, keep, STEP)
        gu, pending = retreat_by(
            steps[t],
            keep,
            through,
            gstate,
            threshold,
            decay,
            SURROGATE,
            WIDTH,
            DETACH,
            SOFT,
            STEP_GRAD,
            CONSTANTS,
        )
        if values_ptr is not None:
            u = steps[t][0]
            g_decay += gu * vs[t]
            g_threshold += threshold_grad(u, keep, through, gstate[0], threshold, SURROGATE, WIDTH, DETACH, SOFT)
        gstate = settle_grad(pending, decay, STEP_GRAD)
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
