"""Triton kernels of `gac_encode` and `gated_lif`; with STATIC the current is one frame for all steps.

Where ``values_ptr`` is no None, decay and threshold are tensors, one of each a channel, in the place of the constants;
the channel of place i of a sample's memory is ``i // c_stride % C``. Their gradients are summed over time here and
leave once a place, so that sums over places have a fixed order.
"""

from __future__ import annotations

from ..common.neuron_step import learned_values, membrane_grad_by, reset, reset_by, threshold_grad, within
from ..common.triton import tl, triton


@triton.jit
def gate_of(m, n):
    """sigmoid(m * n) in two special-function operations: 1 / (1 + e) as rsqrt squared, which spares a division.

    From T = 4 in bfloat16 on the backward kernel is bound by instructions, not memory. A full division takes six. The
    reset multiplies by a 0/1 mask: 23 instructions per element and step, against 26 for compare and select.
    """
    r = tl.rsqrt(1.0 + tl.exp2((m * -1.4426950408889634) * n))
    return r * r


@triton.jit
def gated_fwd_kernel(
    x_ptr,
    n_ptr,
    m_ptr,
    y_ptr,
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
    """Gated spikes y; a program takes BLOCK places of one sample at all steps."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // tiles
    i = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if values_ptr is not None:
        decay, threshold = learned_values(values_ptr, (i // c_stride) % C, C)
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
    x_ptr += sample * x_sample + i
    n_ptr += sample * x_sample + i
    y_ptr += sample * y_sample + i
    if STATIC:
        x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(n_ptr, mask=inside, other=0.0).to(tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    for t in range(T):
        if not STATIC:
            x = tl.load(x_ptr + tl.cast(t, tl.int64) * x_step, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + tl.cast(t, tl.int64) * x_step, mask=inside, other=0.0).to(tl.float32)
        u = decay * v + x
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)
        y = tl.where(u > threshold, gate_of(m, n), 0.0)
        tl.store(y_ptr + tl.cast(t, tl.int64) * y_step, y.to(y_ptr.dtype.element_ty), mask=inside)
        v = reset(u, threshold, SOFT)


@triton.jit
def gated_bwd_kernel(
    gy_ptr,
    x_ptr,
    n_ptr,
    m_ptr,
    gx_ptr,
    gn_ptr,
    gm_ptr,
    scratch_ptr,
    values_ptr,
    gvalues_ptr,
    c_stride,
    C,
    size,
    groups,
    x_step,
    x_sample,
    y_step,
    y_sample,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    STATIC: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gradients at x, at the scores n and, for each place, at its values; a program's share of that at m a step."""
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // groups
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    if values_ptr is None:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
    gms = ()  # sums for the temporal gradient, last step first: one vector a step, reduced once after all tiles
    for _ in tl.static_range(STEPS):
        gms += (tl.zeros((BLOCK,), tl.float32),)
    for tile in range(TILES):
        i = ((pid % groups) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        at_x = sample * x_sample + i
        at_y = sample * y_sample + i
        if values_ptr is not None:
            decay, threshold = learned_values(values_ptr, (i // c_stride) % C, C)
            g_decay = tl.zeros((BLOCK,), tl.float32)
            g_threshold = tl.zeros((BLOCK,), tl.float32)
        if STATIC:
            x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
            gx = tl.zeros((BLOCK,), tl.float32)
            gn = tl.zeros((BLOCK,), tl.float32)
        scratch = (pid * TILES + tile) * (CHUNKS * BLOCK) + tl.arange(0, BLOCK)
        if CHUNKS > 1:  # first sweep: the membrane at the start of each chunk, [pid, tile, chunk, BLOCK]
            v = tl.zeros((BLOCK,), tl.float32)
            for chunk in range(CHUNKS):
                tl.store(scratch_ptr + scratch + chunk * BLOCK, v)
                for k in tl.static_range(STEPS):
                    t = tl.cast(chunk * STEPS + k, tl.int64)
                    if not STATIC:
                        here = within(inside, t, T, STEPS)
                        x = tl.load(x_ptr + at_x + t * x_step, mask=here, other=0.0).to(tl.float32)
                    v = reset(decay * v + x, threshold, SOFT)
            tl.debug_barrier()
        gv = tl.zeros((BLOCK,), tl.float32)
        for back in range(CHUNKS):
            first = tl.cast((CHUNKS - 1 - back) * STEPS, tl.int64)
            gys = ()
            xs = ()
            ns = ()
            for k in tl.static_range(STEPS):
                here = within(inside, first + k, T, STEPS)
                gys += (tl.load(gy_ptr + at_y + (first + k) * y_step, mask=here, other=0.0),)
                if STATIC:
                    xs += (x,)
                    ns += (n,)
                else:
                    xs += (tl.load(x_ptr + at_x + (first + k) * x_step, mask=here, other=0.0).to(tl.float32),)
                    ns += (tl.load(n_ptr + at_x + (first + k) * x_step, mask=here, other=0.0).to(tl.float32),)
            v = tl.zeros((BLOCK,), tl.float32)
            if CHUNKS > 1:
                v = tl.load(scratch_ptr + scratch + (CHUNKS - 1 - back) * BLOCK)
            us = ()
            vs = ()  # membranes before each step
            keeps = ()
            for k in tl.static_range(STEPS):
                if values_ptr is not None:
                    vs += (v,)
                u = decay * v + xs[k]
                keep = tl.where(u > threshold, 0.0, 1.0)
                us += (u,)
                keeps += (keep,)
                v = reset_by(u, keep, threshold, SOFT)
            sums = ()
            for k in tl.static_range(STEPS - 1, -1, -1):
                t = first + k
                here = within(inside, t, T, STEPS)
                m = tl.load(m_ptr + sample * T + t, mask=t < T, other=0.0).to(tl.float32)
                gate = gate_of(m, ns[k])
                gs = gys[k].to(tl.float32) * gate
                gz = gs - gs * gate  # at the score m * n, where the neuron fired
                gz -= gz * keeps[k]
                gu = membrane_grad_by(us[k], keeps[k], gs, gv, threshold, SURROGATE, WIDTH, DETACH, SOFT)
                if T % STEPS != 0:
                    gu = tl.where(here, gu, 0.0)
                if values_ptr is not None:
                    g_decay += gu * vs[k]
                    gh = threshold_grad(us[k], keeps[k], gs, gv, threshold, SURROGATE, WIDTH, DETACH, SOFT)
                    g_threshold += tl.where(here, gh, 0.0)
                if CHUNKS > 1:
                    tl.store(gm_ptr + pid * T + t, tl.sum(gz * ns[k], 0), mask=t < T)
                else:
                    sums += (gms[STEPS - 1 - k] + gz * ns[k],)
                if STATIC:
                    gn += gz * m
                    gx += gu
                else:
                    tl.store(gn_ptr + at_x + t * x_step, (gz * m).to(gn_ptr.dtype.element_ty), mask=here)
                    tl.store(gx_ptr + at_x + t * x_step, gu.to(gx_ptr.dtype.element_ty), mask=here)
                if T % STEPS != 0:
                    gv = tl.where(here, decay * gu, gv)
                else:
                    gv = decay * gu
            if CHUNKS == 1:
                gms = sums
        if values_ptr is not None:
            tl.store(gvalues_ptr + sample * size + i, g_decay, mask=inside)
            tl.store(gvalues_ptr + tl.cast(y_step, tl.int64) + sample * size + i, g_threshold, mask=inside)
        if STATIC:
            tl.store(gx_ptr + at_x, gx.to(gx_ptr.dtype.element_ty), mask=inside)
            tl.store(gn_ptr + at_x, gn.to(gn_ptr.dtype.element_ty), mask=inside)
    if CHUNKS == 1:
        for k in tl.static_range(STEPS):
            tl.store(gm_ptr + pid * T + k, tl.sum(gms[STEPS - 1 - k], 0))
