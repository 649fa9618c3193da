"""Triton kernel of `norm_lif` forward, which reads the output of the convolution once.

Those of its backward pass are in `norm_lif_backward_kernels`.

With NORMED the residual is normalised too, by statistics of its own (the batch norm of a shortcut): its output then
never exists in memory.

With REVERSE a kernel walks its tiles from the last to the first. A kernel that reads what another has just written
finds in the L2 cache what was written last, so the two are to walk in opposite directions.

Where ``values_ptr`` is no None, decay and threshold are tensors, one of each a channel, in the place of the constants.
Where STEP is no None, it is the step of a registered neuron, and there are no such values.
"""

from __future__ import annotations

from ..common.neuron_step import fire, learned_values, resting, settle, state_where, within
from ..common.tiles import norm_affine, tile_offsets
from ..common.triton import tl, triton


@triton.jit
def forward_kernel(
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
    s_ptr,
    y_ptr,
    bits_ptr,
    values_ptr,
    rows,
    C,
    S,
    frame,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    EPS: tl.constexpr,
    R_EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECAY: tl.constexpr,
    SOFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    KEEP: tl.constexpr,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr = None,
    STATES: tl.constexpr = 1,
    CONSTANTS: tl.constexpr = None,
):
    """Spikes, with KEEP the current and with PACK the spikes' bits, of one tile at all steps; frame is B*C*H*W."""
    frame = tl.cast(frame, tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift, _, _ = norm_affine(channel, C, w_ptr, b_ptr, mean_ptr, var_ptr, EPS)
    if NORMED:
        r_scale, r_shift, _, _ = norm_affine(channel, C, rw_ptr, rb_ptr, rmean_ptr, rvar_ptr, R_EPS)
        shift += r_shift
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
    at, inside = tile_offsets(tile, channel, rows, C, S, CHANNELS_LAST, BLOCK_R)
    if values_ptr is not None:
        decay, threshold = learned_values(values_ptr, channel, C)
        decay, threshold = decay[None, :], threshold[None, :]
    else:
        decay: tl.constexpr = DECAY
        threshold: tl.constexpr = THRESHOLD
    state = resting(tl.zeros((BLOCK_R, BLOCK_C), tl.float32), STATES)
    for first in range(0, T, STEPS):
        xs = ()  # loads first: a store between them would keep the compiler from overlapping them
        rs = ()
        for k in tl.static_range(STEPS):
            here = within(inside, first + k, T, STEPS)
            xs += (tl.load(x_ptr + at + (first + k) * frame, mask=here, other=0.0),)
            if RESIDUAL:
                rs += (tl.load(res_ptr + at + (first + k) * frame, mask=here, other=0.0),)
        bits = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
        for k in tl.static_range(STEPS):
            t = first + k
            here = within(inside, t, T, STEPS)
            a = xs[k].to(tl.float32) * scale + shift
            if NORMED:
                a += rs[k].to(tl.float32) * r_scale
            elif RESIDUAL:
                a += rs[k].to(tl.float32)
            if KEEP:  # the neuron sees what is stored, so that backward, which reads it, recomputes the same
                stored = a.to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + at + t * frame, stored, mask=here)
                a = stored.to(tl.float32)
            s, pending = fire(a, state, threshold, decay, SOFT, STEP, CONSTANTS)
            tl.store(s_ptr + at + t * frame, s.to(s_ptr.dtype.element_ty), mask=here)
            if PACK:
                if STEP is None:
                    fired = pending[0] > threshold
                else:
                    fired = s > 0.5
                bits |= tl.where(here & fired, 1 << k, 0)
            state = state_where(here, settle(pending, threshold, SOFT, STEP), state, STATES)
        if PACK:  # a byte holds a chunk of up to eight steps
            tl.store(bits_ptr + at + (first // STEPS) * frame, bits.to(tl.uint8), mask=inside)
