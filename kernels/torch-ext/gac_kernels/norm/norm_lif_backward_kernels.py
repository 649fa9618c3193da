"""Triton kernels of `norm_lif` backward: two passes around the batch norm's two sums.

They keep no membrane potential: it is recomputed in registers, from the stored current where the network wants that
anyway and else from the convolution's output. The first pass leaves the sums ``A = sum(ga)`` and
``B = sum(ga * (x - mean))`` of the gradient ga at the neuron's input current, the second writes the gradient at x,
``k0 * ga + k1 * x + k2`` with one k0, k1, k2 a channel.

With NORMED the residual is normalised too, and its gradient needs one more sum, ``sum(ga * (residual - its mean))``.
REVERSE, ``values_ptr`` and STEP are as in `norm_lif_kernels`.
"""

from __future__ import annotations

from ..common.neuron_step import (
    fire,
    kept_of,
    learned_grads,
    learned_values,
    load_state,
    resting,
    retreat,
    settle,
    settle_grad,
    state_where,
    store_state,
    within,
)
from ..common.tiles import norm_affine, sum_partials, tile_offsets
from ..common.triton import tl, triton


@triton.jit
def _current(x, source, scale, shift, r_scale, RESIDUAL: tl.constexpr, NORMED: tl.constexpr, KEEP: tl.constexpr):
    """Input current of the neuron: as stored (KEEP), or recomputed, plus the residual; shift has both norms' shifts."""
    if KEEP:
        a = source.to(tl.float32)
    else:
        a = x.to(tl.float32) * scale + shift
        if NORMED:
            a += source.to(tl.float32) * r_scale
        elif RESIDUAL:
            a += source.to(tl.float32)
    return a


@triton.jit
def reduce_kernel(
    gs_ptr,
    gy_ptr,
    x_ptr,
    source_ptr,
    res_ptr,
    w_ptr,
    b_ptr,
    mean_ptr,
    var_ptr,
    rw_ptr,
    rb_ptr,
    rmean_ptr,
    rvar_ptr,
    ga_ptr,
    partial_ptr,
    scratch_ptr,
    values_ptr,
    rows,
    C,
    S,
    frame,
    tiles,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_GS: tl.constexpr,
    HAS_GY: tl.constexpr,
    WRITE: tl.constexpr,
    SUMS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAXES: tl.constexpr = False,
    STEP: tl.constexpr = None,
    STEP_GRAD: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
):
    """First backward pass: the sums of each channel and, with WRITE, the gradient ga.

    There are SUMS = 2 sums, or 3 with NORMED; with values two more behind them, those of their gradients. With MAXES,
    and no values, the largest magnitudes of ga and of x - mean are in their place.
    """
    frame = tl.cast(frame, tl.int64)
    CHUNKS: tl.constexpr = (T + STEPS - 1) // STEPS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift, mean, _ = norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS)
    r_scale = scale
    r_mean = mean
    if NORMED:
        r_scale, r_shift, r_mean, _ = norm_affine(channel, C, rw_ptr, rb_ptr, rmean_ptr, rvar_ptr, R_EPS)
        shift += r_shift
    if values_ptr is not None:
        decay, threshold = learned_values(values_ptr, channel, C)
        decay, threshold = decay[None, :], threshold[None, :]
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
    sum_a = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_b = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_c = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if values_ptr is not None:
        sum_decay = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        sum_threshold = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if MAXES:
        max_a = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        max_x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for nth in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        tile = tiles - 1 - nth if REVERSE else nth
        at, inside = tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R)
        if CHUNKS > 1:  # first sweep: the states at the start of each chunk
            state = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
            for chunk in range(CHUNKS):
                store_state(scratch_ptr + at + chunk * STATES * frame, state, inside, frame, STATES)
                for k in tl.static_range(STEPS):
                    t = chunk * STEPS + k
                    here = within(inside, t, T, STEPS)
                    x = tl.load(x_ptr + at + t * frame, mask=here, other=0.0)
                    source = x
                    if RESIDUAL or KEEP:
                        source = tl.load(source_ptr + at + t * frame, mask=here, other=0.0)
                    a = _current(x, source, scale, shift, r_scale, RESIDUAL, NORMED, KEEP)
                    _s, pending = fire(a, state, threshold, decay, SOFT, STEP, CONSTANTS)
                    state = settle(pending, threshold, SOFT, STEP)
            tl.debug_barrier()
        gstate = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
        for back in range(CHUNKS):
            first = (CHUNKS - 1 - back) * STEPS
            xs = ()
            sources = ()
            rs = ()
            gs = ()
            gy = ()
            for k in tl.static_range(STEPS):
                here = within(inside, first + k, T, STEPS)
                to = at + (first + k) * frame
                xs += (tl.load(x_ptr + to, mask=here, other=0.0),)
                if HAS_GS:
                    gs += (tl.load(gs_ptr + to, mask=here, other=0.0),)
                if RESIDUAL or KEEP:
                    sources += (tl.load(source_ptr + to, mask=here, other=0.0),)
                else:
                    sources += (xs[k],)
                if NORMED and KEEP:
                    rs += (tl.load(res_ptr + to, mask=here, other=0.0),)
                else:
                    rs += (sources[k],)
                if HAS_GY:
                    gy += (tl.load(gy_ptr + to, mask=here, other=0.0),)
            state = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
            if CHUNKS > 1:
                state = load_state(scratch_ptr + at + (CHUNKS - 1 - back) * STATES * frame, inside, frame, STATES)
            steps = ()
            vs = ()  # membranes before each step
            for k in tl.static_range(STEPS):
                if values_ptr is not None:
                    vs += (state[0],)
                a = _current(xs[k], sources[k], scale, shift, r_scale, RESIDUAL, NORMED, KEEP)
                _s, pending = fire(a, state, threshold, decay, SOFT, STEP, CONSTANTS)
                steps += (kept_of(a, state, pending, STEP),)
                state = settle(pending, threshold, SOFT, STEP)
            for k in tl.static_range(STEPS - 1, -1, -1):
                t = first + k
                here = within(inside, t, T, STEPS)
                at_spike = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
                if HAS_GS:
                    at_spike = gs[k].to(tl.float32)
                if values_ptr is not None:
                    gu, negated = learned_grads(
                        steps[k][0], at_spike, gstate[0], threshold, SURROGATE, WIDTH, DETACH, SOFT
                    )
                    pending = (gu,)
                    at_decay = gu * vs[k]
                    if T % STEPS != 0:  # else gradients of 0 come from what is not there
                        at_decay = tl.where(here, at_decay, 0.0)
                        negated = tl.where(here, negated, 0.0)
                    sum_decay += at_decay
                    sum_threshold -= negated
                else:
                    gu, pending = retreat(
                        steps[k],
                        at_spike,
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
                gstate = state_where(here, settle_grad(pending, decay, STEP_GRAD), gstate, STATES)
                if HAS_GY:
                    gu += gy[k].to(tl.float32)
                if WRITE:
                    tl.store(ga_ptr + at + t * frame, gu.to(ga_ptr.dtype.element_ty), mask=here)
                gu = tl.where(here, gu, 0.0)
                sum_a += gu
                sum_b += gu * (xs[k].to(tl.float32) - mean)
                if MAXES:
                    max_a = tl.maximum(max_a, tl.abs(gu))
                    max_x = tl.maximum(max_x, tl.where(here, tl.abs(xs[k].to(tl.float32) - mean), 0.0))
                if NORMED:
                    sum_c += gu * (rs[k].to(tl.float32) - r_mean)
    to = partial_ptr + tl.program_id(0) * SUMS * C + channel
    tl.store(to, tl.sum(sum_a, 0), mask=channel < C)
    tl.store(to + C, tl.sum(sum_b, 0), mask=channel < C)
    if NORMED:
        tl.store(to + 2 * C, tl.sum(sum_c, 0), mask=channel < C)
    if values_ptr is not None:
        tl.store(to + (SUMS - 2) * C, tl.sum(sum_decay, 0), mask=channel < C)
        tl.store(to + (SUMS - 1) * C, tl.sum(sum_threshold, 0), mask=channel < C)
    if MAXES:
        tl.store(to + (SUMS - 2) * C, tl.max(max_a, 0), mask=channel < C)
        tl.store(to + (SUMS - 1) * C, tl.max(max_x, 0), mask=channel < C)


@triton.jit
def finish_kernel(
    partial_ptr,
    var_ptr,
    rvar_ptr,
    sums_ptr,
    gw_ptr,
    gb_ptr,
    grw_ptr,
    grb_ptr,
    gv_ptr,
    programs,
    C,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over programs, in a fixed order, and the gradients of weights and biases, and of values where there are."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    a, b, c = sum_partials(partial_ptr, channel, programs, C, SUMS, BLOCK_P, BLOCK_C)
    if gv_ptr is not None:  # the last two sums; of an odd number three are summed
        last = partial_ptr + (SUMS - 2 - SUMS % 2) * C
        at_decay, at_threshold, third = sum_partials(last, channel, programs, C, SUMS, BLOCK_P, BLOCK_C)
        if SUMS % 2 == 1:
            at_decay = at_threshold
            at_threshold = third
        tl.store(gv_ptr + channel, at_decay, mask=inside)
        tl.store(gv_ptr + C + channel, at_threshold, mask=inside)
    tl.store(sums_ptr + channel, a, mask=inside)
    tl.store(sums_ptr + C + channel, b, mask=inside)
    if NORMED:
        tl.store(sums_ptr + 2 * C + channel, c, mask=inside)
        if AFFINE:
            r_rstd = 1.0 / tl.sqrt(tl.load(rvar_ptr + channel, mask=inside, other=1.0).to(tl.float32) + R_EPS)
            tl.store(grw_ptr + channel, (c * r_rstd).to(grw_ptr.dtype.element_ty), mask=inside)
            tl.store(grb_ptr + channel, a.to(grb_ptr.dtype.element_ty), mask=inside)
    if AFFINE:
        rstd = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=inside, other=1.0).to(tl.float32) + EPS)
        tl.store(gw_ptr + channel, (b * rstd).to(gw_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(gb_ptr + channel, a.to(gb_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient(sums_ptr, ROW: tl.constexpr, channel, C, values, scale, mean, rstd, BATCH: tl.constexpr):
    """k1 and k2 of a norm's input gradient ``scale * ga + k1 * x + k2``, [1, BLOCK_C]; its second sum is in ROW."""
    k1 = scale * 0.0
    k2 = scale * 0.0
    if BATCH:
        sum_a = tl.load(sums_ptr + channel, mask=channel < C, other=0.0)[None, :]
        sum_b = tl.load(sums_ptr + ROW * C + channel, mask=channel < C, other=0.0)[None, :]
        k1 = -scale * rstd * rstd * (sum_b / values)
        k2 = -scale * (sum_a / values) - k1 * mean
    return k1, k2


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
    gx_ptr,
    gr_ptr,
    values_ptr,
    rows,
    C,
    S,
    frame,
    count,
    T: tl.constexpr,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    NORMED: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr = None,
    STEP_GRAD: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
):
    """Second backward pass: the gradient at x and, with NORMED, that at the residual."""
    frame = tl.cast(frame, tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift, mean, rstd = norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS)
    values = tl.load(total_ptr).to(tl.float32) if HAS_TOTAL else tl.cast(count, tl.float32)
    k1, k2 = _input_gradient(sums_ptr, 1, channel, C, values, scale, mean, rstd, BATCH)
    if NORMED:
        r_scale, _, r_mean, r_rstd = norm_affine(channel, C, rw_ptr, rb_ptr, rmean_ptr, rvar_ptr, R_EPS)
        r_k1, r_k2 = _input_gradient(sums_ptr, 2, channel, C, values, r_scale, r_mean, r_rstd, BATCH)
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
    at, here = tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R)
    if values_ptr is not None:
        decay, threshold = learned_values(values_ptr, channel, C)
        decay, threshold = decay[None, :], threshold[None, :]
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
    if RECOMPUTE:  # g is the gradient at the spikes
        xs = ()
        gs = ()
        for t in tl.static_range(T):
            xs += (tl.load(x_ptr + at + t * frame, mask=here, other=0.0),)
            gs += (tl.load(g_ptr + at + t * frame, mask=here, other=0.0),)
        state = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
        steps = ()
        for t in tl.static_range(T):
            a = xs[t].to(tl.float32) * scale + shift
            _s, pending = fire(a, state, threshold, decay, SOFT, STEP, CONSTANTS)
            steps += (kept_of(a, state, pending, STEP),)
            state = settle(pending, threshold, SOFT, STEP)
        gstate = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
        for t in tl.static_range(T - 1, -1, -1):
            gu, pending = retreat(
                steps[t],
                gs[t].to(tl.float32),
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
            gstate = settle_grad(pending, decay, STEP_GRAD)
            gx = scale * gu + k1 * xs[t].to(tl.float32) + k2
            tl.store(gx_ptr + at + t * frame, gx.to(gx_ptr.dtype.element_ty), mask=here)
    else:  # g is the gradient at the input current
        for t in tl.range(T):
            ga = tl.load(g_ptr + at + t * frame, mask=here, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at + t * frame, mask=here, other=0.0).to(tl.float32)
            gx = scale * ga + k1 * x + k2
            tl.store(gx_ptr + at + t * frame, gx.to(gx_ptr.dtype.element_ty), mask=here)
            if NORMED:
                residual = tl.load(res_ptr + at + t * frame, mask=here, other=0.0).to(tl.float32)
                gr = r_scale * ga + r_k1 * residual + r_k2
                tl.store(gr_ptr + at + t * frame, gr.to(gr_ptr.dtype.element_ty), mask=here)
