"""Triton kernels of `lif` with decay and threshold as tensors, one a channel; a layer with one of each is one channel.

They walk tiles of rows by channels, as the batch-norm kernels do, so that a channel's values are loaded once a program
and their gradients stay in registers until it ends. Each program leaves one partial sum a channel, added up in a fixed
order afterwards: no atomics, so the same bits every time. Programs that follow each other take neighbouring channels:
those that run at the same time then touch one stretch of memory.

A decay that is learned is no power of two, so the product with it rounds. They are launched without fused
multiply-adds, which would round once where the reference rounds twice: of 134 million neurons a step about one then
lands on the other side of a threshold or of a rectangle's edge. Where rounding decides nothing the code asks for one.
"""

from __future__ import annotations

from ..common.neuron_step import learned_grads, learned_values, reset, within
from ..common.tiles import tile_offsets
from ..common.triton import tl, triton


@triton.jit
def _places(tile, channel, rows, C, S, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """As `tile_offsets`, but a tile of contiguous memory has BLOCK_S pixels of each of BLOCK_R / BLOCK_S samples.

    Then no thread divides by S, for which a 64-bit division an element was spent.
    """
    if CHANNELS_LAST:
        at, inside = tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R)
    else:
        tile = tl.cast(tile, tl.int64)
        parts = tl.cdiv(S, BLOCK_S)
        one = tl.arange(0, BLOCK_R)
        sample = tile // parts * (BLOCK_R // BLOCK_S)
        pixel = tile % parts * BLOCK_S + one
        inside = pixel < S
        if BLOCK_S < BLOCK_R:
            sample += one // BLOCK_S
            pixel = tile % parts * BLOCK_S + one % BLOCK_S
            inside = (pixel < S) & (sample < rows // S)
        at = (sample * C * S + pixel)[:, None] + tl.cast(channel, tl.int64)[None, :] * S
        inside = inside[:, None]
    return at, inside


@triton.jit
def learned_fwd_kernel(
    x_ptr,
    v0_ptr,
    values_ptr,
    s_ptr,
    v_last_ptr,
    rows,
    C,
    S,
    frame,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RETURN_STATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spikes and, where asked for, the last membrane, of one tile at all steps; frame is the elements of a step."""
    frame = tl.cast(frame, tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    decay, threshold = learned_values(values_ptr, channel, C)
    decay, threshold = decay[None, :], threshold[None, :]
    tile = tl.program_id(0) // blocks
    if REVERSE:
        tile = tl.num_programs(0) // blocks - 1 - tile
    at, inside = _places(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R, BLOCK_S)
    v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if HAS_STATE:
        v = tl.load(v0_ptr + at, mask=inside, other=0.0)
    for first in range(0, T, STEPS):
        xs = ()  # loads first: a store between them would keep the compiler from overlapping them
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + at + (first + k) * frame, mask=here, other=0.0),)
        for k in tl.static_range(STEPS):
            t = first + k
            here = within(inside, t, T, STEPS)
            u = decay * v + xs[k].to(tl.float32)
            fired = tl.where(u > threshold, 1.0, 0.0)
            tl.store(s_ptr + at + t * frame, fired.to(s_ptr.dtype.element_ty), mask=here)
            after = reset(u, threshold, SOFT)
            v = tl.where(here, after, v) if T % STEPS != 0 else after  # what is never there is never stored
    if RETURN_STATE:
        tl.store(v_last_ptr + at, v, mask=inside)


@triton.jit
def learned_bwd_kernel(
    gs_ptr,
    gv_ptr,
    x_ptr,
    v0_ptr,
    values_ptr,
    gx_ptr,
    gv0_ptr,
    partial_ptr,
    scratch_ptr,
    rows,
    C,
    S,
    frame,
    tiles,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_GV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients at x and at the initial membrane, and a program's share of those at decays and thresholds."""
    frame = tl.cast(frame, tl.int64)
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    blocks = tl.cdiv(C, BLOCK_C)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    decay, threshold = learned_values(values_ptr, channel, C)
    decay, threshold = decay[None, :], threshold[None, :]
    sum_decay = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_threshold = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for nth in tl.range(program, tiles, programs, num_stages=STAGES):
        tile = tiles - 1 - nth if REVERSE else nth
        at, inside = _places(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R, BLOCK_S)
        v0 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if HAS_STATE:
            v0 = tl.load(v0_ptr + at, mask=inside, other=0.0)
        if CHUNKS > 1:  # first sweep: the membrane at the start of each chunk
            v = v0
            for chunk in range(CHUNKS):
                tl.store(scratch_ptr + at + chunk * frame, v, mask=inside)
                for k in tl.static_range(STEPS):
                    t = chunk * STEPS + k
                    here = within(inside, t, T, STEPS)
                    x = tl.load(x_ptr + at + t * frame, mask=here, other=0.0).to(tl.float32)
                    v = reset(decay * v + x, threshold, SOFT)
            tl.debug_barrier()
        gv = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if HAS_GV:
            gv = tl.load(gv_ptr + at, mask=inside, other=0.0)
        for back in range(CHUNKS):
            first = (CHUNKS - 1 - back) * STEPS
            xs = ()
            gs = ()
            for k in tl.static_range(STEPS):
                here = within(inside, first + k, T, STEPS)
                xs += (tl.load(x_ptr + at + (first + k) * frame, mask=here, other=0.0),)
                gs += (tl.load(gs_ptr + at + (first + k) * frame, mask=here, other=0.0),)
            v = v0
            if CHUNKS > 1:
                v = tl.load(scratch_ptr + at + (CHUNKS - 1 - back) * frame, mask=inside, other=0.0)
            vs = ()  # membranes before each step, which decay
            us = ()
            for k in tl.static_range(STEPS):
                u = decay * v + xs[k].to(tl.float32)
                vs += (v,)
                us += (u,)
                v = reset(u, threshold, SOFT)
            for k in tl.static_range(STEPS - 1, -1, -1):
                t = first + k
                here = within(inside, t, T, STEPS)
                gu, negated = learned_grads(us[k], gs[k].to(tl.float32), gv, threshold, SURROGATE, WIDTH, DETACH, SOFT)
                tl.store(gx_ptr + at + t * frame, gu.to(gx_ptr.dtype.element_ty), mask=here)
                before = decay * gu
                if T % STEPS != 0:  # else what is not there has an input and gradients of 0, which add nothing
                    gu = tl.where(here, gu, 0.0)
                    negated = tl.where(here, negated, 0.0)
                    before = tl.where(here, before, gv)
                sum_decay = tl.fma(gu, vs[k], sum_decay)
                sum_threshold -= negated
                gv = before
        if HAS_STATE:
            tl.store(gv0_ptr + at, gv, mask=inside)
    to = partial_ptr + program * 2 * C + channel
    tl.store(to, tl.sum(sum_decay, 0), mask=channel < C)
    tl.store(to + C, tl.sum(sum_threshold, 0), mask=channel < C)
