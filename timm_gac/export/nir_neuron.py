"""Neurons as NIR describes them, in both directions.

NIR has differential equations, such as ``tau dv/dt = (v_leak - v) + r x`` of its LIF. A forward Euler step of length dt
is this package's neuron: the decay is ``1 - dt/tau``, and an input counts ``r dt/tau`` times. Both fire where the
membrane is above the threshold (strictly) and then reset it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gac_kernels import LIFSpec
from gac_kernels.spec import SURROGATES

DT = 1e-4  # seconds; snnTorch reads no other, and it is the default of SpikingJelly
NEURONS = ("CubaLIF", "IF", "LIF")

_CLOSE = 1e-6  # relative; other frameworks keep time constants in float32
_SURROGATE = {"surrogate": "surrogate", "surrogate_width": "width", "detach_reset": "detach_reset"}


def neuron_node(name: str, spec: LIFSpec, shape: tuple[int, ...]) -> Any:
    """A layer of neurons as ``nir.LIF``, or as ``nir.IF`` where nothing decays; its metadata holds the surrogate.

    Args:
        name: Of the layer, for the error message.
        spec: What the neurons compute.
        shape: Of one sample, ``(C, H, W)``: NIR has each constant once a neuron.

    Raises:
        ValueError: The reset is soft, the neuron not ``lif`` or the surrogate one's own.
    """
    import nir

    if not spec.is_lif:
        raise ValueError(
            f"expected neuron 'lif' for a NIR file, got {spec.neuron!r} in {name}: NIR knows none such, export to "
            "ONNX or a .pt2 file"
        )
    if spec.surrogate not in SURROGATES:
        raise ValueError(
            f"expected a surrogate out of {SURROGATES} for NIR, got {spec.surrogate!r} in {name}: readers would not "
            "know it, export to ONNX or a .pt2 file"
        )

    if spec.soft_reset:
        raise ValueError(
            f"expected neurons with a hard reset, got a soft one in {name}: NIR knows none; train with "
            "LIFSpec(reset='hard'), or export to ONNX"
        )

    def constant(value: float) -> np.ndarray:  # float64: in float32 tau/dt would not be exactly 2
        return np.full(shape, value, dtype=np.float64)

    metadata = {key: getattr(spec, field) for key, field in _SURROGATE.items()}
    threshold, zero = constant(spec.threshold), constant(0.0)
    if spec.decay == 1.0:
        return nir.IF(r=constant(1.0 / DT), v_threshold=threshold, v_reset=zero, metadata=metadata)
    tau = DT / (1.0 - spec.decay)
    return nir.LIF(
        tau=constant(tau),
        r=constant(tau / DT),
        v_leak=zero,
        v_threshold=threshold,
        v_reset=zero,
        metadata=metadata,
    )


def neuron_spec(name: str, node: Any, dt: float) -> LIFSpec:
    """What the neurons of a node compute, as a spec.

    A factor of the input becomes one of the threshold, since ``g x`` reaches it where ``x`` reaches ``threshold / g``.
    The surrogate is that of the node's metadata if this package wrote it, else the default.

    Args:
        name: Of the node, for error messages.
        node: ``nir.LIF``, ``nir.IF``, or ``nir.CubaLIF`` whose synapse forgets within a step.
        dt: Length of a time step, in the unit of the node's time constants.

    Raises:
        ValueError: The neurons differ among themselves, rest or reset elsewhere than at 0, or are slower or faster than
            this package's can be.
    """
    kind = type(node).__name__
    for field in ("v_leak", "v_reset"):
        value = _single(name, node, field) if hasattr(node, field) else 0.0
        if value != 0.0:
            raise ValueError(
                f"expected {field} = 0 in {name!r}, got {value:g}: shift the membrane, its threshold and biases so "
                "that it rests at 0"
            )
    decay, gain = 1.0, dt * _single(name, node, "r")
    if kind == "CubaLIF":
        tau_syn = _single(name, node, "tau_syn")
        if not math.isclose(tau_syn, dt, rel_tol=_CLOSE):
            raise ValueError(
                f"expected tau_syn = dt = {dt:g} in {name!r}, where a synapse forgets within a step, got {tau_syn:g}: "
                "neurons here have no synaptic current; give the dt that the file was written for, or train with LIF"
            )
        gain *= _single(name, node, "w_in")
    if kind in ("LIF", "CubaLIF"):
        tau = _single(name, node, "tau" if kind == "LIF" else "tau_mem")
        if not tau >= dt * (1.0 - _CLOSE):
            raise ValueError(
                f"expected a time constant of at least dt = {dt:g} in {name!r}, got {tau:g}: give the dt that the file "
                "was written for, read_nir(path, dt=...)"
            )
        decay, gain = max(0.0, 1.0 - dt / tau), gain / tau
    if not (math.isfinite(gain) and gain > 0.0):
        raise ValueError(
            f"expected a resistance above 0 in {name!r}, got an input factor of {gain:g}: write its sign into the "
            "weights before it"
        )
    threshold = _single(name, node, "v_threshold")
    return LIFSpec(
        threshold=threshold if math.isclose(gain, 1.0, rel_tol=_CLOSE) else threshold / gain,
        decay=decay,
        **_surrogate(node.metadata),
    )


def _surrogate(metadata: dict[str, Any]) -> dict[str, Any]:
    if not set(_SURROGATE) <= set(metadata):
        return {}
    return {field: metadata[key] for key, field in _SURROGATE.items()}


def _single(name: str, node: Any, field: str) -> float:
    values = np.unique(np.asarray(getattr(node, field), dtype=np.float64))
    if values.size != 1:
        raise ValueError(
            f"expected one {field} for all neurons of {name!r}, got {values.size} different ones from {values[0]:g} to "
            f"{values[-1]:g}: neurons of a layer share their constants here; run the file in snnTorch or SpikingJelly"
            if values.size
            else f"expected {field} of {name!r}, got none: write the file anew"
        )
    return float(values[0])
