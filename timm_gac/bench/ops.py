"""Cases of the kernel benchmark: inputs, byte counts, the check before any timing, and baselines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gac_kernels import CIFAR, IMAGENET, LIFSpec, gac_encode, gated_lif, lif
from gac_kernels.reference import gac_encode_reference, gated_lif_reference, lif_reference

from ..runtime.dtypes import DTYPES

Op = Callable[..., Any]
Tensors = Sequence[torch.Tensor]
SPECS = {"cifar": CIFAR, "imagenet": IMAGENET}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINES = ("reference", "compiled", "spikingjelly")
# Largest norm(got - expected) / norm(expected) against the float32 reference on the same values. In bfloat16 only the
# result is rounded (2**-9). `reduced` gradients sum a whole frame of terms that mostly cancel.
TOLERANCES = {
    torch.float32: {"elementwise": 1e-5, "reduced": 1e-4},
    torch.bfloat16: {"elementwise": 1e-2, "reduced": 1e-2},
}
CHECKED = [name for name, dtype in DTYPES.items() if dtype in TOLERANCES]


@dataclass(frozen=True)
class Case:
    """One combination to check and time; the fields are columns of the CSV."""

    op: str
    spec: str
    dtype: str
    memory_format: str
    num_steps: int


@dataclass(frozen=True)
class BenchOp:
    """One op to benchmark.

    Args:
        run: The op, called as ``run(*inputs, spec)``.
        reference: Its definition in plain PyTorch, called the same way.
        inputs: Names of its tensor inputs; `INPUT_SHAPES` has their shapes.
        binary: Whether the output is spikes, which must equal the reference's exactly.
        packs_mask: Whether the backward pass needs only a mask of 2 bits per neuron and step, for a rectangular
            surrogate with a detached reset.
    """

    run: Op
    reference: Op
    inputs: tuple[str, ...]
    binary: bool = False
    packs_mask: bool = False


INPUT_SHAPES: dict[str, Callable[[int, int, tuple[int, ...]], tuple[int, ...]]] = {
    "x": lambda steps, batch, frame: (steps, batch, *frame),
    "stem": lambda steps, batch, frame: (batch, *frame),
    "spatial": lambda steps, batch, frame: (batch, *frame),
    "spatial_steps": lambda steps, batch, frame: (steps, batch, *frame),
    "temporal": lambda steps, batch, frame: (batch, steps),
    "decay": lambda steps, batch, frame: (frame[0],),
    "threshold": lambda steps, batch, frame: (frame[0],),
}
_REDUCED = ("temporal", "decay", "threshold")  # whose gradients are sums over places


def _learned(op: Callable[..., Any]) -> Op:
    """A neuron with a decay and a threshold of each channel, called as ``run(x, decay, threshold, spec)``."""
    return lambda x, decay, threshold, spec: op(x, spec, decay=decay, threshold=threshold)


OPS = {
    "lif": BenchOp(lif, lif_reference, ("x",), binary=True, packs_mask=True),
    "lif_learned": BenchOp(_learned(lif), _learned(lif_reference), ("x", "decay", "threshold"), binary=True),
    "gac_encode": BenchOp(gac_encode, gac_encode_reference, ("stem", "spatial", "temporal")),
    "gated_lif": BenchOp(gated_lif, gated_lif_reference, ("x", "spatial_steps", "temporal")),
}


def make_inputs(
    op: BenchOp, case: Case, batch: int, frame: tuple[int, int, int], device: torch.device
) -> list[torch.Tensor]:
    """Fresh standard-normal inputs that require gradients, in the case's dtype and memory format.

    Decays and thresholds lie around those of the neuron.
    """
    inputs = []
    for name in op.inputs:
        shape = INPUT_SHAPES[name](case.num_steps, batch, frame)
        tensor = torch.randn(shape, device=device, dtype=DTYPES[case.dtype])
        if len(shape) >= 4:  # frames; a 5-D tensor counts as channels-last if each of its frames is
            frames = tensor.flatten(0, -4).contiguous(memory_format=MEMORY_FORMATS[case.memory_format])
            tensor = frames.unflatten(0, shape[:-3])
        if name in ("decay", "threshold"):
            around = getattr(SPECS[case.spec], name)
            tensor = (around * (1.0 + 0.2 * tensor.clamp(-3.0, 3.0))).to(tensor.dtype)
        inputs.append(tensor.requires_grad_())
    return inputs


def mask_bytes(op: BenchOp, spec: LIFSpec, num_steps: int, neurons: int) -> int | None:
    """Bytes of the packed surrogate mask, 2 bits a step; None if the backward pass reads the input instead."""
    if not (op.packs_mask and spec.surrogate == "rectangle" and spec.detach_reset and num_steps <= 32):
        return None
    return next(size for size in (1, 2, 4, 8) if num_steps <= 4 * size) * neurons


def count_bytes(inputs: Tensors, output: torch.Tensor, mask: int | None) -> tuple[int, int]:
    """Fewest bytes that an op must move, forward and forward+backward.

    The forward pass reads the inputs and writes the output. The backward pass reads the inputs again (it recomputes the
    membrane) and the output's gradient, and writes the inputs' gradients: for ``lif`` 2 and 5 passes over x. With a
    packed mask, the forward pass writes it and the backward pass reads it instead of the inputs. Baselines get the same
    count, so that fractions compare times.
    """
    read = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    written = output.numel() * output.element_size()
    forward = read + written
    saved = read if mask is None else 2 * mask
    return forward, forward + saved + written + read


def check_case(op: BenchOp, case: Case, inputs: Tensors) -> str:
    """Compare an op's output and gradients with its reference; return "" if they agree, else the reason.

    The reference runs in float32 on the same values, so that bfloat16 differs by its rounding only.
    """
    spec = SPECS[case.spec]
    expected_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = op.reference(*expected_inputs, spec)
    grad = torch.randn_like(expected).to(DTYPES[case.dtype])
    expected_grads = torch.autograd.grad(expected, expected_inputs, grad.float())
    expected = expected.detach()
    _poison_free_memory(inputs, expected)
    output = op.run(*inputs, spec)
    grads = torch.autograd.grad(output, inputs, grad)
    failures = []
    flips = ((output.detach() != 0) != (expected != 0)).sum().item()
    if flips:
        failures.append(f"{flips} spikes differ")
    elif op.binary and not torch.equal(output.detach().float(), expected):
        failures.append("spikes are not 0 or 1")
    pairs = [("output", output.detach(), expected)]
    pairs += zip((f"grad of {name}" for name in op.inputs), grads, expected_grads, strict=True)
    reduced = [f"grad of {name}" for name in _REDUCED]
    for name, got, right in pairs:
        tolerance = TOLERANCES[got.dtype]["reduced" if name in reduced else "elementwise"]
        error = relative_error(got, right)
        if not error <= tolerance:  # a NaN must not pass
            failures.append(f"{name}: relative error {error:.2e} > {tolerance:.0e}")
    return "; ".join(failures)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(got - expected) / norm(expected); infinite if the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    norm = torch.linalg.vector_norm
    got = got.to(torch.promote_types(got.dtype, expected.dtype))
    return (norm(got - expected) / norm(expected).clamp_min(1e-30)).item()


def _poison_free_memory(inputs: Tensors, output: torch.Tensor) -> None:
    """Fill blocks of the op's sizes with NaN and free them, so that elements the op does not write are NaN."""
    blocks = [torch.full_like(tensor, float("nan"), dtype=inputs[0].dtype) for tensor in (*inputs, output, output)]
    del blocks


def make_baseline(name: str, op_name: str, spec: LIFSpec, inputs: Tensors) -> Op | None:
    """A baseline with the op's inputs as its arguments, or None if it is not installed.

    Args:
        name: ``reference`` (eager), ``compiled`` (the reference under torch.compile) or ``spikingjelly``.
        op_name: The op that it computes.
        spec: The neuron.
        inputs: Inputs as it will get; SpikingJelly's initial state is made from them, outside of the timed call.
    """
    reference = OPS[op_name].reference
    if name == "reference":
        return lambda *tensors: reference(*tensors, spec)
    if name == "compiled":
        # All compiled variants share the reference's code object; after 8 of them Dynamo would fall back to eager.
        torch._dynamo.reset()
        return torch.compile(lambda *tensors: reference(*tensors, spec), fullgraph=True, dynamic=False)
    if op_name == "lif_learned" or importlib.util.find_spec("spikingjelly") is None:  # its PLIF has one decay a layer
        return None
    frame = inputs[0] if op_name == "gac_encode" else inputs[0][0]
    fire, state = spikingjelly_neuron(spec), torch.zeros_like(frame, dtype=torch.float32, requires_grad=False)
    if op_name == "lif":
        return lambda x: fire(x, state)

    def gated(x: torch.Tensor, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
        steps = temporal.t()[:, :, None, None, None]  # (T, B, 1, 1, 1)
        x = x.expand(temporal.shape[1], *x.shape) if op_name == "gac_encode" else x
        return torch.sigmoid(steps * spatial) * fire(x, state)

    return gated


def spikingjelly_neuron(spec: LIFSpec) -> Op:
    """SpikingJelly's functional multi-step LIF: input (T, ...) and initial state (...) to spikes (T, ...)."""
    from spikingjelly.activation_based import functional

    settings = (1 / (1 - spec.decay), False, *_spikingjelly_settings(spec))

    def neuron(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return functional.lif_multi_step(x, state, *settings)[0]

    return neuron


def spikingjelly_parametric_neuron(spec: LIFSpec) -> Op:
    """What its ``ParametricLIFNode`` calls: input (T, ...), initial state (...) and w () to spikes (T, ...).

    The decay is ``1 - sigmoid(w)``. SpikingJelly takes the first of its CUDA, Triton and PyTorch implementations that
    works.
    """
    from spikingjelly.activation_based import functional

    settings = (False, *_spikingjelly_settings(spec))

    def neuron(x: torch.Tensor, state: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.plif_multi_step(x, state, w, *settings)[0]

    return neuron


def _spikingjelly_settings(spec: LIFSpec) -> tuple[Any, ...]:
    """Threshold, reset, surrogate, whether the reset is detached, and that no membrane is kept."""
    from spikingjelly.activation_based import surrogate

    triangle = spec.surrogate == "triangle"
    # Its alpha is 1 / width for the triangle and 1 / (2 * width) for the rectangle.
    shape = surrogate.PiecewiseQuadratic(alpha=1 / spec.width) if triangle else surrogate.Rect(alpha=0.5 / spec.width)
    return spec.threshold, 0.0, shape, spec.detach_reset, False
