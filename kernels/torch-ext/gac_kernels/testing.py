"""The tests of this package's own neurons, for one's own: `check_neuron`, or its parts in a parametrised test.

Each operator that trains a neuron is compared with its reference, forward and at the gradient of every input, with both
resets, with and without the spike in the reset detached: in plain PyTorch and, on a GPU or where TRITON_INTERPRET=1 was
set before the first import, in Triton. The smooth twin's gradient is compared with differences of its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import resolve_backend, use_backend
from .common.triton import HAS_TRITON, INTERPRETED
from .encoder.gac import gac_encode, gated_lif
from .encoder.gac_fire import gac_fire
from .neuron.lif import lif
from .norm.batch_stats import batch_stats
from .norm.norm_lif import norm_lif
from .reference import (
    gac_encode_reference,
    gac_fire_reference,
    gated_lif_reference,
    lif_reference,
    norm_lif_reference,
    smooth_step,
    state_dtype,
    surrogate_derivative,
)
from .registry import states_by
from .spec import RESETS, LIFSpec

# Largest ||out - ref|| / ||ref||: both compute in float32 and round once to the dtype.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Largest part of spikes that may differ: where an order of operations decides on which side of a threshold one is.
FLIPS = 2e-3


class Case(NamedTuple):
    """One operator with inputs.

    Attributes:
        op: The operator, of the inputs.
        reference: Its definition.
        inputs: Tensors, each of which gets a gradient.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[Tensor]


def variants(spec: LIFSpec) -> list[LIFSpec]:
    """The spec with both resets, with and without a gradient through the spike in the reset."""
    return [dataclasses.replace(spec, reset=reset, detach_reset=detach) for reset in RESETS for detach in (False, True)]


def _current(spec: LIFSpec, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An input current under which neurons fire and rest."""
    return (torch.randn(shape, device=device) * 1.5 * spec.threshold).to(dtype)


def _lif(num_steps: int) -> Callable[..., Case]:
    def case(spec: LIFSpec, device: torch.device, dtype: torch.dtype) -> Case:
        states = states_by(spec.surrogate_id)
        x = _current(spec, num_steps, 5, 7, device=device, dtype=dtype)
        shape = (5, 7) if states == 1 else (states, 5, 7)
        state = torch.rand(shape, device=device, dtype=state_dtype(dtype)) * 0.5 * spec.threshold
        return Case(
            lambda x, state: lif(x, spec, state, return_state=True)[::-1],
            lambda x, state: lif_reference(x, spec, state, return_state=True)[::-1],
            [x, state],
        )

    return case


def _norm(num_steps: int, residual: bool) -> Callable[..., Case]:
    def case(spec: LIFSpec, device: torch.device, dtype: torch.dtype) -> Case:
        shape = (num_steps * 2, 5, 3, 2)
        x, other = (_current(spec, *shape, device=device, dtype=dtype) for _ in range(2))
        if residual:
            x, other = (each.contiguous(memory_format=torch.channels_last) for each in (x, other))
        wide = state_dtype(dtype)
        weight = (torch.rand(5, device=device, dtype=wide) + 0.5) * spec.threshold
        bias = torch.randn(5, device=device, dtype=wide) * spec.threshold

        def run(op: Callable[..., Any]) -> Callable[..., Any]:
            def of(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
                mean, var = batch_stats(x.detach())
                return op(
                    x,
                    mean,
                    var,
                    num_steps,
                    spec,
                    weight=weight,
                    bias=bias,
                    residual=residual,
                    batch_stats=True,
                    return_membrane=residual is not None,
                )

            return of

        return Case(run(norm_lif), run(norm_lif_reference), [x, weight, bias, *([other] if residual else [])])

    return case


def _encoder(
    op: Callable[..., Any], reference: Callable[..., Any], num_steps: int, static: bool
) -> Callable[..., Case]:
    def case(spec: LIFSpec, device: torch.device, dtype: torch.dtype) -> Case:
        shape = (2, 3, 3, 2) if static else (num_steps, 2, 3, 3, 2)
        x = _current(spec, *shape, device=device, dtype=dtype)
        # Above 0 in the mean: a neuron behind gates, which are below 1, has to reach its threshold too.
        scores = [(torch.randn(size, device=device) + 1.5).to(dtype) for size in (shape, (2, num_steps))]
        return Case(lambda *inputs: op(*inputs, spec), lambda *inputs: reference(*inputs, spec), [x, *scores])

    return case


CASES: dict[str, Callable[[LIFSpec, torch.device, torch.dtype], Case]] = {
    "lif": _lif(4),
    "lif_in_chunks": _lif(11),  # beyond what registers hold at once
    "norm_lif": _norm(3, residual=False),
    "norm_lif_in_chunks": _norm(10, residual=True),
    "gac_encode": _encoder(gac_encode, gac_encode_reference, 3, static=True),
    "gated_lif_in_chunks": _encoder(gated_lif, gated_lif_reference, 10, static=False),
    "gac_fire": _encoder(gac_fire, gac_fire_reference, 3, static=True),
    "gac_fire_varying": _encoder(gac_fire, gac_fire_reference, 4, static=False),
}


def backends(device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """The implementations that run on a device: plain PyTorch, and Triton where it can."""
    with_triton = HAS_TRITON and dtype != torch.float64 and (device.type == "cuda" or INTERPRETED)
    return ["eager", "triton"] if with_triton else ["eager"]


def check_case(name: str, spec: LIFSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
    """Compare an operator with its reference, in each implementation that runs here.

    Args:
        name: A key of ``CASES``.
        spec: With the neuron and surrogate to be checked.
        device: Where to run.
        dtype: Of the input; float32 if None.

    Raises:
        AssertionError: A value or gradient differs by more than ``TOLERANCES`` allow, or no neuron fired.
    """
    device, dtype = torch.device(device), dtype or torch.float32
    case = CASES[name](spec, device, dtype)
    with use_backend("eager"):
        expected, grads = _outputs(case.reference, case.inputs)
        towards = [torch.randn_like(out) for out in expected]
        wanted = torch.autograd.grad(expected, grads, towards)
    values = [value.detach() for value in (*expected, *wanted)]
    assert all(bool(value.isfinite().all()) for value in values), (
        f"{name} as the definition in PyTorch computes it, {spec}: outputs or gradients are not finite, so this tells "
        "nothing: bound what grows, such as an exponential, or scale the constants"
    )
    assert bool((expected[-1] != 0).any()), f"{name}: no neuron fired, so this tells nothing: scale the threshold"
    for backend in backends(device, dtype):
        with use_backend(backend):
            assert resolve_backend(device, dtype) == backend
            actual, inputs = _outputs(case.op, case.inputs)
            found = torch.autograd.grad(actual, inputs, towards)
        flips = _flips(actual[-1].detach(), expected[-1].detach())
        label = f"{name} in {backend}, {spec}"
        if dtype.itemsize >= 4:
            assert flips <= FLIPS, f"{label}: {flips:.1%} of the spikes differ"
        named = {f"output {i}": pair for i, pair in enumerate(zip(actual, expected, strict=True))}
        named |= {f"gradient {i}": pair for i, pair in enumerate(zip(found, wanted, strict=True))}
        for what, (out, ref) in named.items():
            assert out.shape == ref.shape and out.dtype == ref.dtype, f"{label}, {what}: {out.shape}, {out.dtype}"
            out, ref = out.detach().double(), ref.detach().double()
            error = float((out - ref).norm() / ref.norm().clamp(min=1e-12))
            allowed = TOLERANCES[dtype] + 4.0 * flips**0.5  # what a spike more or less changes
            assert error <= allowed, f"{label}, {what}: relative error {error:.2g} over {allowed:.2g}"


def _flips(spikes: Tensor, expected: Tensor) -> float:
    """Part of the spikes that differ by more than rounding: gated ones are real numbers."""
    differs = (spikes - expected).abs() > 0.25
    return float((differs | (spikes.sign() != expected.sign())).double().mean())


def _outputs(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What a function returns of copies of the inputs that need a gradient, and these."""
    leaves = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
    outputs = function(*leaves)
    return outputs if isinstance(outputs, tuple) else (outputs,), leaves


def check_surrogate(spec: LIFSpec) -> None:
    """Compare a surrogate's derivative with that of its integral, in float64.

    Raises:
        AssertionError: They differ, or the integral does not rise from 0 to 1.
        ValueError: The surrogate has no integral.
    """
    d = (torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64) * spec.width + 1e-4).requires_grad_()  # beside its edges
    rise = smooth_step(d, spec.surrogate, spec.width)
    (slope,) = torch.autograd.grad(rise.sum(), d)
    error = float((slope - surrogate_derivative(d.detach(), spec.surrogate, spec.width)).abs().max())
    assert error <= 1e-9, f"{spec.surrogate}: derivative and integral differ by {error:.2g} in their slope"
    ends = rise.detach()[[0, -1]].tolist()
    assert ends[0] < 0.1 and ends[1] > 0.9, f"{spec.surrogate}: the integral goes from {ends[0]:.2g} to {ends[1]:.2g}"


def check_smooth_twin(spec: LIFSpec) -> None:
    """Compare the gradient of the smooth twin, in float64, with differences of its values.

    Raises:
        AssertionError: They differ, so the step is not what autograd differentiates.
        ValueError: The surrogate has no integral.
    """
    states = states_by(spec.surrogate_id)
    x = torch.randn(4, 3, dtype=torch.float64) * spec.threshold
    state = torch.rand((3,) if states == 1 else (states, 3), dtype=torch.float64) * spec.threshold
    passed = torch.autograd.gradcheck(
        lambda x, state: lif_reference(x, spec, state, return_state=True, smooth=True),
        (x.requires_grad_(), state.requires_grad_()),
        atol=1e-6,
        raise_exception=False,
    )
    assert passed, f"{spec}: the smooth twin's gradient differs from differences of its values"


def check_spikes(spec: LIFSpec) -> None:
    """Compare the spikes of a neuron with what it declares: packed bits and estimates of energy rely on that.

    Raises:
        AssertionError: There are others.
    """
    declared = {"binary": (0.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}.get(spec.spikes)
    x = torch.linspace(-4.0, 4.0, 257, dtype=torch.float64).repeat(3, 1) * spec.threshold
    spikes, _ = lif_reference(x, spec, return_state=True)
    found = sorted(set(spikes.flatten().tolist()))
    assert declared is None or {*found} <= {*declared}, (
        f"{spec.neuron}: spikes={spec.spikes!r} declares {declared}, got {found[:8]}: declare 'ternary' or 'levels'"
    )


def check_operator(spec: LIFSpec, device: torch.device | str = "cpu") -> None:
    """`torch.library.opcheck` of ``lif`` with this neuron: shapes for torch.compile, and gradients.

    Raises:
        AssertionError: A check failed, or PyTorch's own exception for it.
    """
    states = states_by(spec.surrogate_id)
    x = torch.randn(3, 2, 5, device=device, requires_grad=True)
    state = torch.rand((2, 5) if states == 1 else (states, 2, 5), device=device, requires_grad=True)
    for start in (None, state):
        torch.library.opcheck(
            torch.ops.gac_kernels.lif.default, (x, start, *spec.op_arguments, True, start is not None)
        )


def check_neuron(spec: LIFSpec, device: torch.device | str = "cpu") -> None:
    """All of these checks for the neuron and the surrogate of a spec.

    Args:
        spec: With the neuron and surrogate to be checked.
        device: Where to run; on a CPU under TRITON_INTERPRET=1 it takes about a minute.

    Raises:
        AssertionError: Something differs from its definition in PyTorch; the message says what.
        ValueError: The surrogate has no integral.
    """
    check_surrogate(spec)
    check_spikes(spec)
    for variant in variants(spec):
        if not variant.detach_reset:  # which the twin's differences do not know
            check_smooth_twin(variant)
        for name in CASES:
            check_case(name, variant, device)
    check_case("lif", spec, device, torch.float64)
    check_case("lif", spec, device, torch.bfloat16)
    check_operator(spec, device)
