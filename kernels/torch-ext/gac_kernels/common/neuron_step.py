"""One neuron step, forward and backward, shared by every Triton kernel that contains the neuron.

The formulas and their source stand in `LIFSpec`. A surrogate is an index in ``spec.SURROGATES``, or a function of one's
own. A threshold is a constant, or a tensor that broadcasts over the membrane where it is learned.

Kernels hold a neuron's states as a tuple of blocks. STEP is None for the leaky integrate-and-fire neuron, whose only
state is the membrane, and else the step of a registered `Neuron`, STEP_GRAD its derivative.
"""

from __future__ import annotations

from .triton import tl, triton


@triton.jit
def within(inside, t, T: tl.constexpr, STEPS: tl.constexpr):
    """Mask of elements that exist at step t, where sequences of T steps are walked in chunks of STEPS."""
    here = inside
    if T % STEPS != 0:
        here = inside & (tl.zeros((1,), tl.int64) + t < T)
    return here


@triton.jit
def learned_values(values_ptr, channel, C):
    """Decay and threshold of channels from values (2, C), float32."""
    inside = channel < C
    decay = tl.load(values_ptr + channel, mask=inside, other=0.5)
    threshold = tl.load(values_ptr + C + channel, mask=inside, other=1.0)
    return decay, threshold


@triton.jit
def surrogate_grad(d, SURROGATE: tl.constexpr, WIDTH: tl.constexpr):
    """Surrogate of ds/du at d = u - threshold, float32."""
    if SURROGATE == 0:  # triangle
        g = tl.maximum(WIDTH - tl.abs(d), 0.0) * (1.0 / (WIDTH * WIDTH))
    elif SURROGATE == 1:  # rectangle
        g = tl.where(tl.abs(d) < WIDTH, 1.0 / (2.0 * WIDTH), 0.0)
    elif SURROGATE == 2:  # atan
        z = d * (3.141592653589793 / WIDTH)
        g = (1.0 / WIDTH) / (1.0 + z * z)
    elif SURROGATE == 3:  # sigmoid
        p = tl.sigmoid(d * (4.0 / WIDTH))
        g = (4.0 / WIDTH) * p * (1.0 - p)
    else:
        g = SURROGATE(d, WIDTH)
    return g


@triton.jit
def resting(v, STATES: tl.constexpr):
    """The states before the first step, zeros like v."""
    state = ()
    for _ in tl.static_range(STATES):
        state += (v,)
    return state


@triton.jit
def state_where(inside, new, old, STATES: tl.constexpr):
    """The new states inside, else the old ones."""
    state = ()
    for k in tl.static_range(STATES):
        state += (tl.where(inside, new[k], old[k]),)
    return state


@triton.jit
def load_state(ptr, inside, frame, STATES: tl.constexpr):
    """States from memory [STATES, frame]; ptr is where the first one lies, and inside None where all are there."""
    state = ()
    for k in tl.static_range(STATES):
        if inside is None:
            state += (tl.load(ptr + k * tl.cast(frame, tl.int64)),)
        else:
            state += (tl.load(ptr + k * tl.cast(frame, tl.int64), mask=inside, other=0.0),)
    return state


@triton.jit
def store_state(ptr, state, inside, frame, STATES: tl.constexpr):
    """States into memory [STATES, frame]."""
    for k in tl.static_range(STATES):
        tl.store(ptr + k * tl.cast(frame, tl.int64), state[k], mask=inside)


@triton.jit
def fire(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, STEP: tl.constexpr, CONSTANTS: tl.constexpr):
    """Spikes of a step, float32, and what `settle` makes the states after it of: of a LIF the membrane before reset.

    In two parts, so that a LIF resets behind its stores: the same instructions in another order.
    """
    if STEP is None:
        u = DECAY * state[0] + x.to(tl.float32)
        s = tl.where(u > THRESHOLD, 1.0, 0.0)
        pending = (u,)
    else:
        s, pending = STEP(x.to(tl.float32), state, THRESHOLD, DECAY, SOFT, CONSTANTS)
    return s, pending


@triton.jit
def settle(pending, THRESHOLD, SOFT: tl.constexpr, STEP: tl.constexpr):
    """The states after a step from what `fire` left."""
    after = pending
    if STEP is None:
        after = (reset(pending[0], THRESHOLD, SOFT),)
    return after


@triton.jit
def kept_of(x, state, pending, STEP: tl.constexpr):
    """What `retreat` needs of a step: of a LIF its membrane before the reset, else its input and the states before."""
    kept = pending
    if STEP is not None:
        kept = (x.to(tl.float32), state)
    return kept


@triton.jit
def retreat(
    kept,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    STEP_GRAD: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """Gradient at a step's input from those at its spikes and at the states after it; `settle_grad` has the rest."""
    if STEP_GRAD is None:
        gx = membrane_grad(kept[0], gs, gstate[0], THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
        pending = (gx,)
    else:
        gx, pending = STEP_GRAD(
            kept[0], kept[1], gs, gstate, THRESHOLD, DECAY, SURROGATE, WIDTH, DETACH, SOFT, CONSTANTS
        )
    return gx, pending


@triton.jit
def settle_grad(pending, DECAY, STEP_GRAD: tl.constexpr):
    """Gradients at the states before a step from what `retreat` left."""
    before = pending
    if STEP_GRAD is None:
        before = (DECAY * pending[0],)
    return before


@triton.jit
def reset(u, THRESHOLD, SOFT: tl.constexpr):
    """Membrane after the reset, float32."""
    if SOFT:
        v = tl.where(u > THRESHOLD, u - THRESHOLD, u)
    else:
        v = tl.where(u > THRESHOLD, 0.0, u)
    return v


@triton.jit
def membrane_grad(
    u,
    gs,
    gv,
    THRESHOLD,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Gradient at the membrane u from the gradients at the spike (gs) and at the membrane after reset (gv)."""
    keep = tl.where(u > THRESHOLD, 0.0, 1.0)
    return membrane_grad_by(u, keep, gs, gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)


@triton.jit
def reset_by(u, keep, THRESHOLD, SOFT: tl.constexpr):
    """Membrane after the reset as a product with keep, which is 0 where the neuron fired and else 1; for finite u."""
    if SOFT:
        v = u - (THRESHOLD - THRESHOLD * keep)
    else:
        v = u * keep
    return v


@triton.jit
def membrane_grad_by(
    u,
    keep,
    gs,
    gv,
    THRESHOLD,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
):
    """`membrane_grad` where it is known already whether the membrane was kept."""
    sg = surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH)
    if SOFT:
        dv = 1.0 if DETACH else 1.0 - THRESHOLD * sg
    else:
        dv = keep if DETACH else keep - u * sg
    return gs * sg + gv * dv


@triton.jit
def gated(s, pending, gate, THRESHOLD, STEP: tl.constexpr):
    """Spikes times a gate, from what `fire` gives."""
    y = s * gate
    if STEP is None:
        y = tl.where(pending[0] > THRESHOLD, gate, 0.0)
    return y


@triton.jit
def keep_of(s, pending, THRESHOLD, STEP: tl.constexpr):
    """Of a LIF the factor that resets its membrane, 0 where it fired and else 1; of a registered neuron its spikes."""
    keep = s
    if STEP is None:
        keep = tl.where(pending[0] > THRESHOLD, 0.0, 1.0)
    return keep


@triton.jit
def settle_by(pending, keep, THRESHOLD, SOFT: tl.constexpr, STEP: tl.constexpr):
    """`settle` by products with what `keep_of` gives."""
    after = pending
    if STEP is None:
        after = (reset_by(pending[0], keep, THRESHOLD, SOFT),)
    return after


@triton.jit
def times_spikes(g, keep, STEP: tl.constexpr):
    """A value times the spikes, from what `keep_of` gives."""
    if STEP is None:
        g -= g * keep
    else:
        g *= keep
    return g


@triton.jit
def retreat_by(
    kept,
    keep,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    STEP_GRAD: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """`retreat` where `keep_of` the step is known already."""
    if STEP_GRAD is None:
        gx = membrane_grad_by(kept[0], keep, gs, gstate[0], THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
        pending = (gx,)
    else:
        gx, pending = STEP_GRAD(
            kept[0], kept[1], gs, gstate, THRESHOLD, DECAY, SURROGATE, WIDTH, DETACH, SOFT, CONSTANTS
        )
    return gx, pending


@triton.jit
def through_spike(
    u,
    gs,
    gv,
    THRESHOLD,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
):
    """What comes to the membrane, and negated to the threshold, through the spike alone."""
    through = gs
    if not DETACH:
        through = gs - gv * (THRESHOLD if SOFT else u)
    return through * surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH)


@triton.jit
def threshold_grad(
    u,
    keep,
    gs,
    gv,
    THRESHOLD,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Gradient at the threshold of one step: through the spike and, with a soft reset, through what is subtracted."""
    g = -through_spike(u, gs, gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
    if SOFT:
        g -= gv - gv * keep
    return g


@triton.jit
def learned_grads(
    u,
    gs,
    gv,
    THRESHOLD,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Gradient of one step at the membrane, as `membrane_grad`, and the negated one at the threshold.

    The latter goes through the spike and, with a soft reset, through what is subtracted. What goes through the spike is
    in both, and is computed once. Negated since Triton spends an instruction on a sign.
    """
    through = through_spike(u, gs, gv, THRESHOLD, SURROGATE, WIDTH, DETACH, SOFT)
    if SOFT:
        gu = gv + through
        negated = through + tl.where(u > THRESHOLD, gv, 0.0)
    else:
        gu = through + tl.where(u > THRESHOLD, 0.0, gv)
        negated = through
    return gu, negated
