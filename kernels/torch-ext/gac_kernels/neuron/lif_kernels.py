"""Triton kernels of `lif`, forward and backward, the latter from the input or from the bit mask."""

from __future__ import annotations

from ..common.neuron_step import membrane_grad, reset, within
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
):
    """Spikes and, where asked for, two bits a step and the last membrane, of BLOCK neurons at all steps."""
    inner = tl.cast(inner, tl.int64)
    neuron, sequence, inside = _offsets(M, inner, T, BLOCK, TIME_OUTER)
    v = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        v = tl.load(v0_ptr + neuron, mask=inside, other=0.0)
    if KEEP_MASK:
        bits = tl.zeros((BLOCK,), tl.int64 if T > 16 else tl.int32)
    for first in range(0, T, STEPS):
        xs = ()  # loads first: a store between them would keep the compiler from overlapping them
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
        for k in tl.static_range(STEPS):
            t = first + k
            u = DECAY * v + xs[k].to(tl.float32)
            fired = u > THRESHOLD
            here = within(inside, t, T, STEPS)
            tl.store(s_ptr + sequence + t * inner, tl.where(fired, 1.0, 0.0).to(s_ptr.dtype.element_ty), mask=here)
            if KEEP_MASK:
                near = tl.abs(u - THRESHOLD) < WIDTH
                code = fired.to(tl.int32) + 2 * near.to(tl.int32)
                bits = (bits | (code.to(bits.dtype) << (2 * t))).to(bits.dtype)
            v = tl.where(within(inside, t, T, STEPS), reset(u, THRESHOLD, SOFT), v)
    if KEEP_MASK:
        tl.store(mask_ptr + neuron, bits.to(mask_ptr.dtype.element_ty), mask=inside)
    if RETURN_STATE:
        tl.store(v_last_ptr + neuron, v, mask=inside)


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
):
    """Gradients at x and at the initial membrane; membranes are recomputed from x."""
    inner = tl.cast(inner, tl.int64)
    neuron, sequence, inside = _offsets(M, inner, T, BLOCK, TIME_OUTER)
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    v0 = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        v0 = tl.load(v0_ptr + neuron, mask=inside, other=0.0)
    if CHUNKS > 1:  # first sweep: the membrane at the start of each chunk
        v = v0
        for chunk in range(CHUNKS):
            tl.store(scratch_ptr + tl.cast(chunk, tl.int64) * M + neuron, v, mask=inside)
            for k in tl.static_range(STEPS):
                t = chunk * STEPS + k
                x = tl.load(x_ptr + sequence + t * inner, mask=within(inside, t, T, STEPS), other=0.0).to(tl.float32)
                v = reset(DECAY * v + x, THRESHOLD, SOFT)
        tl.debug_barrier()
    gv = tl.zeros((BLOCK,), tl.float32)
    if HAS_GV:
        gv = tl.load(gv_ptr + neuron, mask=inside, other=0.0)
    for back in range(CHUNKS):
        chunk = CHUNKS - 1 - back
        first = chunk * STEPS
        xs = ()
        gs = ()
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
            gs += (tl.load(gs_ptr + sequence + (first + k) * inner, mask=here, other=0.0),)
        v = v0
        if CHUNKS > 1:
            v = tl.load(scratch_ptr + tl.cast(chunk, tl.int64) * M + neuron, mask=inside, other=0.0)
        us = ()
        for k in tl.static_range(STEPS):
            u = DECAY * v + xs[k].to(tl.float32)
            us += (u,)
            v = reset(u, THRESHOLD, SOFT)
        for k in tl.static_range(STEPS - 1, -1, -1):
            t = first + k
            gu = membrane_grad(us[k], gs[k].to(tl.float32), gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
            tl.store(gx_ptr + sequence + t * inner, gu.to(gx_ptr.dtype.element_ty), mask=within(inside, t, T, STEPS))
            gv = tl.where(within(inside, t, T, STEPS), DECAY * gu, gv)
    if HAS_STATE:
        tl.store(gv0_ptr + neuron, gv, mask=inside)


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
