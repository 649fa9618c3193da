"""Neurons of the field beside the leaky integrate-and-fire one, each defined once: `gac_kernels.registry.Neuron`.

With u = decay * v + x the membrane before the reset, and g the surrogate:

| name | spikes s | derivative ds/du | state after the step |
|---|---|---|---|
| ternary | -1, 0 or 1: the sign of u where abs(u) > threshold | g(u - threshold) + g(-u - threshold) | v |
| integer | 0 to 4: how many of threshold, 2 threshold, ... u exceeds | the sum of g at each of these | v |
| adaptive | 1 where u > h, h = threshold * (1 + 1.8 b) | g(u - h) | v, and b = 0.9 b + 0.1 s |

A hard reset clears the membrane v of a neuron that fired, whatever the sign or level; a soft one subtracts
``threshold * s``. Where the spec detaches the reset, s has no gradient in either, nor in b. Other constants or numbers
of levels: ``register_neuron(dataclasses.replace(INTEGER, name="integer8", constants=(8,)))``.

Sources: ternary, Guo et al., AAAI 2024 (arXiv 2312.06372); integer, Luo et al., ECCV 2024 (arXiv 2407.20708), who round
where this counts thresholds; adaptive, Bellec et al., NeurIPS 2018 (arXiv 1803.09574), with the rise of the threshold
in units of the threshold.
"""

from __future__ import annotations

from torch import Tensor

from ..common.neuron_step import surrogate_grad
from ..common.triton import tl, triton
from ..registry import Neuron, State, Step, register_neuron


def _ternary(x: Tensor, state: State, n: Step) -> tuple[Tensor, State]:
    u = n.decay * state[0] + x
    above, below = n.spike(u - n.threshold), n.spike(-u - n.threshold)
    s = above - below
    return s, (u - n.threshold * n.held(s) if n.soft_reset else u * (1.0 - n.held(above) - n.held(below)),)


@triton.jit
def _ternary_kernel(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, CONSTANTS: tl.constexpr):
    u = DECAY * state[0] + x
    s = tl.where(u > THRESHOLD, 1.0, 0.0) - tl.where(-u > THRESHOLD, 1.0, 0.0)
    if SOFT:
        v = u - THRESHOLD * s
    else:
        v = tl.where(tl.abs(u) > THRESHOLD, 0.0, u)
    return s, (v,)


@triton.jit
def _ternary_grad(
    x,
    state,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    u = DECAY * state[0] + x
    above = surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH)
    below = surrogate_grad(-u - THRESHOLD, SURROGATE, WIDTH)  # of -u: the derivative at u is its negative
    gv = gstate[0]
    gu = gs * (above + below)
    if SOFT:
        gu += gv
        if not DETACH:
            gu -= gv * THRESHOLD * (above + below)
    else:
        gu += tl.where(tl.abs(u) > THRESHOLD, 0.0, gv)
        if not DETACH:
            gu -= gv * u * (above - below)
    return gu, (DECAY * gu,)


TERNARY = register_neuron(Neuron("ternary", _ternary, _ternary_kernel, _ternary_grad, spikes="ternary"))


def _integer(x: Tensor, state: State, n: Step) -> tuple[Tensor, State]:
    u = n.decay * state[0] + x
    fired = n.spike(u - n.threshold)
    s = fired
    for level in range(2, int(n.constants[0]) + 1):
        s = s + n.spike(u - level * n.threshold)
    return s, (u - n.threshold * n.held(s) if n.soft_reset else u * (1.0 - n.held(fired)),)


@triton.jit
def _integer_kernel(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, CONSTANTS: tl.constexpr):
    LEVELS: tl.constexpr = CONSTANTS[0]
    u = DECAY * state[0] + x
    s = tl.where(u > THRESHOLD, 1.0, 0.0)
    for level in tl.static_range(2, LEVELS + 1):
        s += tl.where(u > level * THRESHOLD, 1.0, 0.0)
    if SOFT:
        v = u - THRESHOLD * s
    else:
        v = tl.where(u > THRESHOLD, 0.0, u)
    return s, (v,)


@triton.jit
def _integer_grad(
    x,
    state,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    LEVELS: tl.constexpr = CONSTANTS[0]
    u = DECAY * state[0] + x
    first = surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH)
    slope = first
    for level in tl.static_range(2, LEVELS + 1):
        slope += surrogate_grad(u - level * THRESHOLD, SURROGATE, WIDTH)
    gv = gstate[0]
    gu = gs * slope
    if SOFT:
        gu += gv
        if not DETACH:
            gu -= gv * THRESHOLD * slope
    else:
        gu += tl.where(u > THRESHOLD, 0.0, gv)
        if not DETACH:
            gu -= gv * u * first
    return gu, (DECAY * gu,)


INTEGER = register_neuron(Neuron("integer", _integer, _integer_kernel, _integer_grad, spikes="levels", constants=(4,)))


def _adaptive(x: Tensor, state: State, n: Step) -> tuple[Tensor, State]:
    v, b = state
    kept, rise = n.constants
    u = n.decay * v + x
    s = n.spike(u - n.threshold * (1.0 + rise * b))
    r = n.held(s)
    return s, (u - n.threshold * r if n.soft_reset else u * (1.0 - r), kept * b + (1.0 - kept) * r)


@triton.jit
def _adaptive_kernel(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, CONSTANTS: tl.constexpr):
    KEPT: tl.constexpr = CONSTANTS[0]
    RISE: tl.constexpr = CONSTANTS[1]
    u = DECAY * state[0] + x
    b = state[1]
    s = tl.where(u > THRESHOLD * (1.0 + RISE * b), 1.0, 0.0)
    if SOFT:
        v = u - THRESHOLD * s
    else:
        v = u * (1.0 - s)
    return s, (v, KEPT * b + (1.0 - KEPT) * s)


@triton.jit
def _adaptive_grad(
    x,
    state,
    gs,
    gstate,
    THRESHOLD,
    DECAY,
    SURROGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    DETACH: tl.constexpr,
    SOFT: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    KEPT: tl.constexpr = CONSTANTS[0]
    RISE: tl.constexpr = CONSTANTS[1]
    u = DECAY * state[0] + x
    d = u - THRESHOLD * (1.0 + RISE * state[1])
    gv = gstate[0]
    gb = gstate[1]
    at_spike = gs
    if not DETACH:
        at_spike = gs + gb * (1.0 - KEPT) - gv * (THRESHOLD if SOFT else u)
    through = at_spike * surrogate_grad(d, SURROGATE, WIDTH)
    gu = through + (gv if SOFT else tl.where(d > 0.0, 0.0, gv))
    return gu, (DECAY * gu, KEPT * gb - THRESHOLD * RISE * through)


ADAPTIVE = register_neuron(
    Neuron("adaptive", _adaptive, _adaptive_kernel, _adaptive_grad, states=2, constants=(0.9, 1.8))
)
