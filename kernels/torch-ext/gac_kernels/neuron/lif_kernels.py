"""Triton kernels of `lif`, forward and backward, the latter from the input or from the bit mask."""

from __future__ import annotations

from ..common.neuron_step import (
    fire,
    kept_of,
    load_state,
    resting,
    retreat,
    settle,
    settle_grad,
    state_where,
    store_state,
    within,
)
from ..common.triton import tl, triton


@triton.jit
def _offsets(M, inner, T: tl.constexpr, BLOCK: tl.constexpr, TIME_OUTER: tl.constexpr):
    """Offsets of a block of neurons in state tensors [M] and in sequences [outer, T, inner], and their mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    neuron = start + tl.arange(0, BLOCK)
    inside = neuron < M
    if TIME_OUTER:
        sequence = neuron
    else:
        sequence = (neuron // inner) * (inner * T) + neuron % inner
    return neuron, sequence, inside


@triton.jit
def lif_fwd_kernel(
    x_ptr,
    v0_ptr,
    s_ptr,
    v_last_ptr,
    mask_ptr,
    M,
    inner,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KEEP_MASK: tl.constexpr,
    RETURN_STATE: tl.constexpr,
    TIME_OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
):
    """Spikes and, where asked for, two bits a step (of a LIF) and the last states, of BLOCK neurons at all steps."""
    inner = tl.cast(inner, tl.int64)
    neuron, sequence, inside = _offsets(M, inner, T, BLOCK, TIME_OUTER)
    state = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    if HAS_STATE:
        state = load_state(v0_ptr + neuron, inside, M, STATES)
    if KEEP_MASK:
        bits = tl.zeros((BLOCK,), tl.int64 if T > 16 else tl.int32)
    for first in range(0, T, STEPS):
        xs = ()  # loads first: a store between them would keep the compiler from overlapping them
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
        for k in tl.static_range(STEPS):
            t = first + k
            here = within(inside, t, T, STEPS)
            s, pending = fire(xs[k], state, THRESHOLD, DECAY, SOFT, STEP, CONSTANTS)
            tl.store(s_ptr + sequence + t * inner, s.to(s_ptr.dtype.element_ty), mask=here)
            if KEEP_MASK:
                near = tl.abs(pending[0] - THRESHOLD) < WIDTH
                code = (pending[0] > THRESHOLD).to(tl.int32) + 2 * near.to(tl.int32)
                bits = (bits | (code.to(bits.dtype) << (2 * t))).to(bits.dtype)
            state = state_where(here, settle(pending, THRESHOLD, SOFT, STEP), state, STATES)
    if KEEP_MASK:
        tl.store(mask_ptr + neuron, bits.to(mask_ptr.dtype.element_ty), mask=inside)
    if RETURN_STATE:
        store_state(v_last_ptr + neuron, state, inside, M, STATES)


@triton.jit
def lif_bwd_kernel(
    gs_ptr,
    gv_ptr,
    x_ptr,
    v0_ptr,
    gx_ptr,
    gv0_ptr,
    scratch_ptr,
    M,
    inner,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_GV: tl.constexpr,
    TIME_OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr = None,
    STEP_GRAD: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
):
    """Gradients at x and at the initial states; states are recomputed from x."""
    inner = tl.cast(inner, tl.int64)
    neuron, sequence, inside = _offsets(M, inner, T, BLOCK, TIME_OUTER)
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    start = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    if HAS_STATE:
        start = load_state(v0_ptr + neuron, inside, M, STATES)
    if CHUNKS > 1:  # first sweep: the states at the start of each chunk
        state = start
        for chunk in range(CHUNKS):
            store_state(scratch_ptr + tl.cast(chunk, tl.int64) * STATES * M + neuron, state, inside, M, STATES)
            for k in tl.static_range(STEPS):
                t = chunk * STEPS + k
                x = tl.load(x_ptr + sequence + t * inner, mask=within(inside, t, T, STEPS), other=0.0).to(tl.float32)
                _s, pending = fire(x, state, THRESHOLD, DECAY, SOFT, STEP, CONSTANTS)
                state = settle(pending, THRESHOLD, SOFT, STEP)
        tl.debug_barrier()
    gstate = resting(tl.zeros((BLOCK,), tl.float32), STATES)
    if HAS_GV:
        gstate = load_state(gv_ptr + neuron, inside, M, STATES)
    for back in range(CHUNKS):
        chunk = CHUNKS - 1 - back
        first = chunk * STEPS
        xs = ()
        gs = ()
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
            gs += (tl.load(gs_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
        state = start
        if CHUNKS > 1:
            state = load_state(scratch_ptr + tl.cast(chunk, tl.int64) * STATES * M + neuron, inside, M, STATES)
        steps = ()
        for k in tl.static_range(STEPS):
            _s, pending = fire(xs[k], state, THRESHOLD, DECAY, SOFT, STEP, CONSTANTS)
            steps += (kept_of(xs[k], state, pending, STEP),)
            state = settle(pending, THRESHOLD, SOFT, STEP)
        for k in tl.static_range(STEPS - 1, -1, -1):
            t = first + k
            here = within(inside, t, T, STEPS)
            gx, pending = retreat(
                steps[k],
                gs[k].to(tl.float32),
                gstate,
                THRESHOLD,
                DECAY,
                SURROGATE,
                WIDTH,
                DETACH,
                SOFT,
                STEP_GRAD,
                CONSTANTS,
            )
            tl.store(gx_ptr + sequence + t * inner, gx.to(gx_ptr.dtype.element_ty), mask=here)
            gstate = state_where(here, settle_grad(pending, DECAY, STEP_GRAD), gstate, STATES)
    if HAS_STATE:
        store_state(gv0_ptr + neuron, gstate, inside, M, STATES)


@triton.jit
def lif_bwd_mask_kernel(
    gs_ptr,
    gv_ptr,
    mask_ptr,
    gx_ptr,
    gv0_ptr,
    M,
    inner,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    DECAY: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_GV: tl.constexpr,
    TIME_OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same from the two bits a step that forward kept: whether it fired, and was near the threshold."""
    inner = tl.cast(inner, tl.int64)
    neuron, sequence, inside = _offsets(M, inner, T, BLOCK, TIME_OUTER)
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    bits = tl.load(mask_ptr + neuron, mask=inside, other=0).to(tl.int64 if T > 16 else tl.int32)
    gv = tl.zeros((BLOCK,), tl.float32)
    if HAS_GV:
        gv = tl.load(gv_ptr + neuron, mask=inside, other=0.0)
    for back in range(CHUNKS):
        first = (CHUNKS - 1 - back) * STEPS
        gs = ()
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            gs += (tl.load(gs_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
        for k in tl.static_range(STEPS - 1, -1, -1):
            t = first + k
            code = (bits >> (2 * t)).to(tl.int32)
            sg = tl.where((code & 2) != 0, 1.0 / (2.0 * WIDTH), 0.0)
            if SOFT:
                dv = 1.0 if DETACH else 1.0 - THRESHOLD * sg
            else:
                dv = tl.where((code & 1) != 0, 0.0, 1.0)
            gu = gs[k].to(tl.float32) * sg + gv * dv
            tl.store(gx_ptr + sequence + t * inner, gu.to(gx_ptr.dtype.element_ty), mask=within(inside, t, T, STEPS))
            gv = tl.where(within(inside, t, T, STEPS), DECAY * gu, gv)
    if HAS_STATE:
        tl.store(gv0_ptr + neuron, gv, mask=inside)
