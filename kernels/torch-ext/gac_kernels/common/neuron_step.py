"""One neuron step, forward and backward, shared by every Triton kernel that contains the neuron.

The formulas and their source stand in `LIFSpec`. Ids of the surrogates index ``spec.SURROGATES``. A threshold is a
constant, or a tensor that broadcasts over the membrane where it is learned.
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
    else:  # sigmoid
        p = tl.sigmoid(d * (4.0 / WIDTH))
        g = (4.0 / WIDTH) * p * (1.0 - p)
    return g


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
    sg = surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH)
    through = gs if DETACH else gs - gv * (THRESHOLD if SOFT else u)
    g = -(through * sg)
    if SOFT:
        g -= gv - gv * keep
    return g
