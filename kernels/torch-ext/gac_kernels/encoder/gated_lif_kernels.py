"""Triton kernels of `gac_encode` and `gated_lif`; with STATIC the current is one frame for all steps.

Where ``values_ptr`` is no None, decay and threshold are tensors, one of each a channel, in the place of the constants;
the channel of place i of a sample's memory is ``i // c_stride % C``. Their gradients are summed over time here and
leave once a place, so that sums over places have a fixed order. Where STEP is no None, it is the step of a registered
neuron, and there are no such values.
"""

from __future__ import annotations

from ..common.neuron_step import (
    fire,
    gated,
    keep_of,
    kept_of,
    learned_values,
    load_state,
    resting,
    retreat_by,
    settle,
    settle_by,
    settle_grad,
    state_where,
    store_state,
    threshold_grad,
    times_spikes,
    within,
)
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
    STEP: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
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
    state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    for t in range(T):
        if not STATIC:
            x = tl.load(x_ptr + tl.cast(t, tl.int64) * x_step, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(n_ptr + tl.cast(t, tl.int64) * x_step, mask=inside, other=0.0).to(tl.float32)
        s, pending = fire(x, state, threshold, decay, SOFT, STEP, CONSTANTS)
        m = tl.load(m_ptr + sample * T + t).to(tl.float32)
        y = gated(s, pending, gate_of(m, n), threshold, STEP)
        tl.store(y_ptr + tl.cast(t, tl.int64) * y_step, y.to(y_ptr.dtype.element_ty), mask=inside)
        state = settle(pending, threshold, SOFT, STEP)


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
    STEP: tl.constexpr = None,
    STEP_GRAD: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
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
        scratch = (pid * TILES + tile) * (CHUNKS * STATES * BLOCK) + tl.arange(0, BLOCK)
        if CHUNKS > 1:  # first sweep: the states at the start of each chunk, [pid, tile, chunk, STATES, BLOCK]
            state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
            for chunk in range(CHUNKS):
                store_state(scratch_ptr + scratch + chunk * (STATES * BLOCK), state, None, BLOCK, STATES)
                for k in tl.static_range(STEPS):
                    t = tl.cast(chunk * STEPS + k, tl.int64)
                    if not STATIC:
                        here = within(inside, t, T, STEPS)
                        x = tl.load(x_ptr + at_x + t * x_step, mask=here, other=0.0).to(tl.float32)
                    _s, pending = fire(x, state, threshold, decay, SOFT, STEP, CONSTANTS)
                    state = settle(pending, threshold, SOFT, STEP)
            tl.debug_barrier()
        gstate = resting(tl.zeros((BLOCK,), tl.float32), STATES)
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
            state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
            if CHUNKS > 1:
                state = load_state(scratch_ptr + scratch + (CHUNKS - 1 - back) * (STATES * BLOCK), None, BLOCK, STATES)
            steps = ()
            vs = ()  # membranes before each step
            keeps = ()
            for k in tl.static_range(STEPS):
                if values_ptr is not None:
                    vs += (state[0],)
                s, pending = fire(xs[k], state, threshold, decay, SOFT, STEP, CONSTANTS)
                keep = keep_of(s, pending, threshold, STEP)
                steps += (kept_of(xs[k], state, pending, STEP),)
                keeps += (keep,)
                state = settle_by(pending, keep, threshold, SOFT, STEP)
            sums = ()
            for k in tl.static_range(STEPS - 1, -1, -1):
                t = first + k
                here = within(inside, t, T, STEPS)
                m = tl.load(m_ptr + sample * T + t, mask=t < T, other=0.0).to(tl.float32)
                gate = gate_of(m, ns[k])
                gs = gys[k].to(tl.float32) * gate
                gz = gs - gs * gate  # at the score m * n, where the neuron fired
                gz = times_spikes(gz, keeps[k], STEP)
                gu, pending = retreat_by(
                    steps[k],
                    keeps[k],
                    gs,
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
                if T % STEPS != 0:
                    gu = tl.where(here, gu, 0.0)
                if values_ptr is not None:
                    g_decay += gu * vs[k]
                    u = steps[k][0]
                    gh = threshold_grad(u, keeps[k], gs, gstate[0], threshold, SURROGATE, WIDTH, DETACH, SOFT)
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
                before = settle_grad(pending, decay, STEP_GRAD)
                if T % STEPS != 0:
                    gstate = state_where(here, before, gstate, STATES)
                else:
                    gstate = before
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
