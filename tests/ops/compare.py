"""How the ops are compared with their references: one table of tolerances, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest ||out - ref|| / ||ref||. Both sides compute in float32 and round once to the dtype, so 16-bit types are
# allowed their own rounding and no more.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN where either has one, absolute where ref is zero."""
    out, ref = out.double(), ref.double()
    norm = ref.norm().item()
    return (out - ref).norm().item() / (norm if norm > 0 else 1.0)


def assert_close(label: str, out: Tensor, ref: Tensor) -> None:
    """Compare shape, dtype and values under the table."""
    assert out.shape == ref.shape and out.dtype == ref.dtype, (label, out.shape, ref.shape, out.dtype, ref.dtype)
    error = relative_error(out, ref)
    assert error <= TOLERANCES[ref.dtype], f"{label}: relative error {error:.3g} over {TOLERANCES[ref.dtype]:.0e}"


def twins(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two sets of leaves with the same values and strides."""
    return tuple([x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs] for _ in "ab")


def assert_matches(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    exact: bool = False,
) -> None:
    """Outputs and the gradient at every input of ``op`` equal the reference's under a random output gradient."""
    mine, theirs = twins(inputs)
    out, ref = op(*mine), reference(*theirs)
    out, ref = (out, ref) if isinstance(out, tuple) else ((out,), (ref,))
    for i, (a, b) in enumerate(zip(out, ref, strict=True)):
        if exact:
            assert a.dtype == b.dtype and torch.equal(a, b), f"output {i}: {(a != b).sum()} of {a.numel()} differ"
        assert_close(f"output {i}", a, b)
    grads = [torch.randn_like(b) for b in ref]
    pairs = zip(torch.autograd.grad(out, mine, grads), torch.autograd.grad(ref, theirs, grads), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert_close(f"gradient {i}", a, b)


def gate_inputs(shape, num_steps, dtype, device, static=True, scale=1.5):
    """Current, spatial scores and temporal scores; by ``scale`` the current is large enough to fire."""
    shape = shape if static else (num_steps, *shape)
    current, spatial = (torch.randn(shape, device=device).mul_(scale).to(dtype) for _ in range(2))
    return [current, spatial, torch.randn(shape[-4], num_steps, device=device).to(dtype)]
