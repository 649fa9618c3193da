"""Neurons of SpikingJelly and snnTorch as specs here, and back, where the two compute the same spikes.

What does not map is refused by its name. Thresholds: SpikingJelly fires at ``>=``, we and snnTorch at ``>``, so its
threshold and the next float32 number below stand for each other.

Source: spikingjelly 2.0.0, `activation_based.neuron`; snntorch 1.0.0, `snntorch.Leaky`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_kernels import LIFSpec

# Name of a surrogate there: its name here, its parameter, and width * parameter.
_SPIKINGJELLY = {
    "ATan": ("atan", "alpha", 2.0),
    "Sigmoid": ("sigmoid", "alpha", 4.0),
    "PiecewiseQuadratic": ("triangle", "alpha", 1.0),
    "Rect": ("rectangle", "alpha", 0.5),
}
_SNNTORCH = {"atan": ("atan", "alpha", 2.0), "sigmoid": ("sigmoid", "slope", 4.0)}


class Converted(NamedTuple):
    """A neuron from elsewhere: its spec, and the parameters of which its decay and threshold come where they learn."""

    spec: LIFSpec
    decay: torch.nn.Parameter | None = None
    threshold: torch.nn.Parameter | None = None


def _refuse(expected: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"expected {expected}, got {got}: {remedy}")


def from_spikingjelly(node: Any) -> Converted:
    """The spec of an ``IFNode``, ``LIFNode`` or ``ParametricLIFNode`` in multi-step mode.

    With ``decay_input=True`` the input is divided by tau there. Here that goes into threshold and width, which are
    multiplied by tau: exact for a tau that is a power of two.

    Raises:
        ValueError: It is another module, or something of it does not map; the message names it.
    """
    kind = type(node).__name__ if type(node).__module__.startswith("spikingjelly.") else None
    if kind not in ("IFNode", "LIFNode", "ParametricLIFNode"):
        raise _refuse(
            "SpikingJelly's IFNode, LIFNode or ParametricLIFNode", type(node).__name__, "others have no counterpart"
        )
    if node.step_mode != "m":
        raise _refuse(
            "step_mode='m'", repr(node.step_mode), "a LIF takes all steps in one call, set it with set_step_mode"
        )
    if getattr(node, "store_v_seq", False):
        raise _refuse("store_v_seq=False", "True", "a LIF returns spikes alone, see timm_gac.inference.record")
    if node.v_reset not in (0.0, None):
        raise _refuse("v_reset 0.0 or None", node.v_reset, "a LIF resets to 0 or by its threshold")
    decay = {
        "IFNode": lambda: 1.0,
        "LIFNode": lambda: 1.0 - 1.0 / float(node.tau),
        "ParametricLIFNode": lambda: 1.0 - float(node.w.detach().sigmoid()),
    }[kind]()
    gain = 1.0
    if kind != "IFNode" and node.decay_input:
        if kind == "ParametricLIFNode":
            raise _refuse("decay_input=False of a ParametricLIFNode", "True", "its input's gain would be learned too")
        gain = float(node.tau)
        if math.frexp(gain)[0] != 0.5:
            raise _refuse(
                "a tau that is a power of two with decay_input=True",
                f"{gain:g}",
                "set decay_input=False and divide the input by tau",
            )
    surrogate, width = _surrogate(node.surrogate_function, _SPIKINGJELLY, type(node.surrogate_function).__name__)
    if not node.surrogate_function.spiking:
        raise _refuse("surrogate_function.spiking=True", "False", "call set_spiking_mode(True)")
    spec = LIFSpec(
        threshold=_next(float(node.v_threshold) * gain, 0.0),
        decay=decay,
        surrogate=surrogate,
        width=width * gain,
        detach_reset=bool(node.detach_reset),
        reset="soft" if node.v_reset is None else "hard",
    )
    return Converted(spec, decay=node.w if kind == "ParametricLIFNode" else None)


def to_spikingjelly(spec: LIFSpec) -> Any:
    """A multi-step ``LIFNode``, or ``IFNode`` for a decay of 1, that computes a spec.

    Raises:
        ImportError: SpikingJelly is not installed.
        ValueError: The decay is 0, for which SpikingJelly has no tau.
    """
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError as error:
        raise ImportError(f"expected SpikingJelly, got none ({error}): pip install 'timm-gac[spikingjelly]'") from error
    if spec.decay == 0.0:
        raise _refuse("a decay above 0", "0", "SpikingJelly's tau is above 1")
    spec.refuse_others("a SpikingJelly LIFNode")
    if all(row[0] != spec.surrogate for row in _SPIKINGJELLY.values()):
        raise _refuse(
            "a surrogate that SpikingJelly has", repr(spec.surrogate), "hand the node a surrogate_function of yours"
        )
    name, (_, _, product) = next((n, row) for n, row in _SPIKINGJELLY.items() if row[0] == spec.surrogate)
    shared: dict[str, Any] = dict(
        v_threshold=_next(spec.threshold, math.inf),
        v_reset=None if spec.soft_reset else 0.0,
        surrogate_function=getattr(surrogate, name)(product / spec.width),
        detach_reset=spec.detach_reset,
        step_mode="m",
    )
    if spec.decay == 1.0:
        return neuron.IFNode(**shared)
    return neuron.LIFNode(tau=1.0 / (1.0 - spec.decay), decay_input=False, **shared)


def from_snntorch(cell: Any) -> Converted:
    """The spec of a ``Leaky`` with ``reset_mechanism="zero"``.

    Its reset is detached where ``reset_delay=True``. A LIF takes all steps in one call, in the place of the loop.

    Raises:
        ValueError: It is another module, or something of it does not map; the message names it.
    """
    if not type(cell).__module__.startswith("snntorch.") or type(cell).__name__ != "Leaky":
        raise _refuse("snnTorch's Leaky", type(cell).__name__, "others have no counterpart")
    if cell.reset_mechanism != "zero":
        raise _refuse(
            "reset_mechanism='zero'", repr(cell.reset_mechanism), "others reset at another moment, or not at all"
        )
    for name, value, plain in (
        ("inhibition", cell.inhibition, False),
        ("state_quant", cell.state_quant, False),
        ("output", cell.output, False),
        ("surrogate_disable", cell.surrogate_disable, False),
        ("graded_spikes_factor", float(cell.graded_spikes_factor), 1.0),
    ):
        if value not in (plain, None):
            raise _refuse(f"{name}={plain}", value, "a LIF has nothing like it")
    numbers = {}
    for name in ("beta", "threshold"):
        value = getattr(cell, name)
        if value.numel() != 1:
            raise _refuse(
                f"one {name} a layer", f"{value.numel()}", "snnTorch's lies along the last axis, ours along axis 2"
            )
        numbers[name] = float(value.detach())
    grad = cell.spike_grad
    closure = (
        dict(zip(grad.__code__.co_freevars, grad.__closure__ or (), strict=False)) if hasattr(grad, "__code__") else {}
    )
    name = getattr(grad, "__qualname__", type(grad).__name__).partition(".")[0]
    found = type("Surrogate", (), {key: kept.cell_contents for key, kept in closure.items()})
    surrogate, width = _surrogate(found, _SNNTORCH, name)
    spec = LIFSpec(
        threshold=numbers["threshold"],
        decay=min(max(numbers["beta"], 0.0), 1.0),
        surrogate=surrogate,
        width=width,
        detach_reset=bool(cell.reset_delay),
    )
    learned = (value if isinstance(value, torch.nn.Parameter) else None for value in (cell.beta, cell.threshold))
    return Converted(spec, *learned)


def _surrogate(found: Any, table: dict[str, tuple[str, str, float]], name: str) -> tuple[str, float]:
    """Name and width of a surrogate here."""
    if name not in table:
        raise _refuse(f"a surrogate out of {', '.join(table)}", name, "others have no counterpart")
    own, parameter, product = table[name]
    value = getattr(found, parameter)
    number = float(value.detach() if isinstance(value, Tensor) else value)
    return own, product / number if number else math.inf  # which a LIFSpec refuses


def _next(value: float, towards: float) -> float:
    """The float32 number next to ``value``."""
    options: dict[str, Any] = dict(dtype=torch.float32, device="cpu")  # whatever the defaults are
    return torch.nextafter(torch.tensor(value, **options), torch.tensor(towards, **options)).item()
