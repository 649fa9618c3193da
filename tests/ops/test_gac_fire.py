"""gac_fire against the two ops one after the other, to the bit, and against its reference: forward, every gradient."""

from __future__ import annotations

import functools

import pytest
import torch

from compare import assert_close, assert_matches, gate_inputs, twins
from gac_kernels import (
    CIFAR,
    IMAGENET,
    LIFSpec,
    gac_encode,
    gac_fire,
    gac_fire_reference,
    gated_lif,
    integer_lif,
    lif,
    lif_reference,
    use_backend,
)

DIALECTS = {"cifar": CIFAR, "imagenet": IMAGENET}
SPECS = {**DIALECTS, "soft": LIFSpec(threshold=0.6, reset="soft"), "sigmoid": LIFSpec(surrogate="sigmoid")}


inputs = functools.partial(gate_inputs, scale=2.0)  # both neurons fire


def composed(stem, spatial, temporal, spec=CIFAR):
    gated = (gac_encode if stem.dim() == 4 else gated_lif)(stem, spatial, temporal, spec)
    return gated, lif(gated, spec)


def grads_of(op, args, weights):
    """Gradients at all inputs of the weighted sum of those outputs that have a weight."""
    pairs = [(out, weight) for out, weight in zip(op(*args), weights, strict=True) if weight is not None]
    return torch.autograd.grad([out for out, _ in pairs], args, [weight for _, weight in pairs])


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
def test_smooth_twin_passes_gradcheck(static):
    args = [x.double().requires_grad_() for x in inputs((2, 2, 1, 2), 3, torch.float64, "cpu", static)]
    assert torch.autograd.gradcheck(lambda *a: gac_fire_reference(*a, smooth=True), args, atol=1e-6)


# All dtypes in each dialect, and both dialects at each number of steps; behind 8 steps the op is the two ops.
WIDE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
STEPS_AND_DTYPES = {
    "cifar": [(1, HALF), (2, WIDE), (4, WIDE), (4, HALF), (4, BRAIN), (6, BRAIN), (8, WIDE), (9, WIDE)],
    "imagenet": [(1, WIDE), (2, BRAIN), (4, WIDE), (6, HALF), (8, WIDE), (8, HALF), (8, BRAIN), (9, BRAIN)],
}


@pytest.mark.parametrize(
    ("spec", "num_steps", "dtype"),
    [
        pytest.param(DIALECTS[name], *case, id=f"{name}-{case[0]}-{case[1]}")
        for name, cases in STEPS_AND_DTYPES.items()
        for case in cases
    ],
)
def test_is_the_two_ops(backend, spec, num_steps, dtype, device, poisoned):
    args = inputs((3, 5, 7, 9), num_steps, dtype, device)
    gated, spikes = gac_fire(*args, spec)
    assert (gated.dtype, spikes.dtype) == (dtype, dtype)
    for label, out, ref in zip(("gated", "spikes"), (gated, spikes), composed(*args, spec), strict=True):
        assert torch.equal(out, ref), f"{label}: {(out != ref).sum()} of {ref.numel()} differ"
    assert spikes.any() or (spec is CIFAR and num_steps < 4)  # a gate is below 1, CIFAR's threshold
    in_one_pass = backend == "triton" and num_steps <= 8
    assert_gradients(spec, args, without_rounding_backward(gated) if in_one_pass else composed)


def without_rounding_backward(stored):
    """The references, with the gated frames that the op stored as what the second neuron sees in the forward pass."""

    def op(stem, spatial, temporal, spec):
        gated = gac_fire_reference(stem, spatial, temporal, spec)[0]
        return gated, lif_reference(stored.float() + (gated - gated.detach()), spec)

    return op


def assert_gradients(spec, args, reference):
    """Gradients of both outputs are the reference's, which computes in float32 where it is not made of ops."""
    weights = [torch.randn(args[2].shape[1], *args[0].shape, device=args[0].device).to(args[0].dtype) for _ in range(2)]
    mine, theirs = twins(args)
    got = grads_of(lambda *a: gac_fire(*a, spec), mine, weights)
    if reference is not composed:
        theirs, weights = twins([a.float() for a in args])[0], [w.float() for w in weights]
    want = grads_of(lambda *a: reference(*a, spec), theirs, weights)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"gradient {i}", a, b.to(a.dtype))


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
@pytest.mark.parametrize(
    ("num_steps", "spec"),
    [
        *(pytest.param(3, spec, id=f"3-{name}") for name, spec in SPECS.items()),
        pytest.param(10, SPECS["soft"], id="10-soft"),  # the two ops, whose own tests have the other specs
    ],
)
def test_every_spec(backend, spec, static, num_steps, device, poisoned):
    args = inputs((2, 3, 5, 4), num_steps, torch.float32, device, static)
    assert gac_fire(*args, spec)[1].any()
    assert_matches(lambda *a: gac_fire(*a, spec), lambda *a: gac_fire_reference(*a, spec), args)
    assert_matches(lambda *a: gac_fire(*a, spec), lambda *a: composed(*a, spec), args, exact=True)


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_float64(spec, static, device):
    args = [a.double() for a in inputs((2, 3, 5, 4), 4, torch.float64, device, static)]
    assert_matches(lambda *a: gac_fire(*a, spec), lambda *a: gac_fire_reference(*a, spec), args)


@pytest.mark.parametrize("used", ["gated", "spikes", "both"])
@pytest.mark.parametrize("num_steps", [4, 9])
@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_gradients_of_one_output_or_both(backend, spec, num_steps, used, device, poisoned):
    args = inputs((2, 3, 5, 4), num_steps, torch.float32, device)
    weights = [torch.randn(num_steps, *args[0].shape, device=device) for _ in range(2)]
    weights = [w if used in (name, "both") else None for name, w in zip(("gated", "spikes"), weights, strict=True)]
    mine, wide = twins(args)[0], twins([a.double() for a in args])[0]
    exact = grads_of(
        lambda *a: gac_fire_reference(*a, spec), wide, [None if w is None else w.double() for w in weights]
    )
    for i, (got, want) in enumerate(zip(grads_of(lambda *a: gac_fire(*a, spec), mine, weights), exact, strict=True)):
        assert want.any()
        assert_close(f"gradient {i}", got, want.float())


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("integer", [False, True], ids=["real", "integer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, integer, device, poisoned):
    """Layouts may differ between the inputs and the incoming gradients; both outputs lie as the stem does."""
    stem, spatial, temporal = inputs((3, 4, 5, 6), 4, torch.float32, device)
    args = [LAYOUTS[layout](stem), spatial, temporal.t().contiguous().t()]
    gated, spikes = gac_fire(*args, IMAGENET, torch.int8 if integer else None)
    expected = composed(*args, IMAGENET)
    assert torch.equal(gated, expected[0]) and torch.equal(spikes.float(), expected[1])
    assert gated.stride() == spikes.stride() and gated.stride()[0] == stem.numel()
    if layout == "channels_last":
        assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert spikes.flatten(0, 1).data_ptr() == spikes.data_ptr() and gated.flatten(0, 1).data_ptr() == gated.data_ptr()
    if not integer:
        assert_matches(gac_fire, composed, args, exact=True)
        leaf = args[0].detach().requires_grad_()
        (got,) = torch.autograd.grad(sum(out.sum() for out in gac_fire(leaf, *args[1:])), leaf)
        (want,) = torch.autograd.grad(sum(out.sum() for out in gac_fire_reference(leaf, *args[1:])), leaf)
        assert_close("gradient under expanded gradients", got, want)


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
@pytest.mark.parametrize("num_steps", [4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_integer_spikes(dtype, num_steps, static, device, poisoned):
    args = inputs((2, 5, 3, 4), num_steps, dtype, device, static)
    for name in ("eager",) if dtype == torch.float64 else ("eager", "triton"):
        with use_backend(name):
            gated, spikes = gac_fire(*args, IMAGENET, spikes_dtype=torch.int8)
            assert torch.equal(gated, composed(*args, IMAGENET)[0])
            expected = integer_lif(gated.flatten(0, 1), num_steps, IMAGENET)
            assert spikes.dtype == torch.int8 and torch.equal(spikes.flatten(0, 1), expected) and expected.any()


def test_integer_spikes_carry_no_gradient(backend, device):
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 4), 4, torch.float32, device)]
    gated, spikes = gac_fire(*args, spikes_dtype=torch.int8)
    assert gated.requires_grad and not spikes.requires_grad
    got, want = (torch.autograd.grad(out.sum(), args) for out in (gated, gac_encode(*args)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_backward_on_another_backend_than_forward(spec, device):
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 4), 4, torch.float32, device)]
    weights = [torch.randn(4, *args[0].shape, device=device) for _ in range(2)]
    expected = grads_of(lambda *a: gac_fire_reference(*a, spec), args, weights)
    for first, second in (("triton", "eager"), ("eager", "triton")):
        with use_backend(first):
            outputs = gac_fire(*args, spec)
        with use_backend(second):
            for i, (got, want) in enumerate(zip(torch.autograd.grad(outputs, args, weights), expected, strict=True)):
                assert_close(f"gradient {i}", got, want)


def test_gradients_are_deterministic(backend, device):
    args = [a.requires_grad_() for a in inputs((2, 8, 16, 16), 4, torch.float32, device)]
    weights = [torch.randn(4, 2, 8, 16, 16, device=device) for _ in range(2)]
    first, second = (grads_of(gac_fire, args, weights) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_zero_size(backend, shape, device):
    args = [a.requires_grad_() for a in inputs(shape, 4, torch.float32, device)]
    gated, spikes = gac_fire(*args)
    (gated.sum() + spikes.sum()).backward()
    assert gated.shape == spikes.shape == (4, *shape) and all(a.grad.shape == a.shape for a in args)
    assert not args[2].grad.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 4)), r"expected stem with 4 or 5 axes"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5), torch.ones(2, 4)), "expected spatial of shape"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(3, 4)), "expected temporal of shape"),
        ((*[torch.ones(5, 2, 3, 4, 4)] * 2, torch.ones(2, 4)), r"expected temporal of shape \(2, 5\)"),
        ((*[torch.ones(2, 3, 4, 4)] * 2, torch.ones(2, 4), CIFAR, torch.int32), "expected spikes_dtype None"),
        ((*[torch.ones(2, 3, 4, 4)] * 2, torch.ones(2, 4), CIFAR, torch.bfloat16), "like stem"),
        ((*[torch.ones(2, 3, 4, 4)] * 2, torch.ones(2, 4), "cifar"), "expected spec to be a LIFSpec"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        gac_fire(*args)


@pytest.mark.parametrize(("num_steps", "static"), [(3, True), (3, False), (9, True)], ids=str)
def test_opcheck(backend, static, num_steps, device):
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 5), num_steps, torch.float32, device, static)]
    for spec, integer in ((CIFAR, False), (IMAGENET, True)):
        torch.library.opcheck(torch.ops.gac_kernels.gac_fire.default, (*args, integer, *spec.op_arguments))


def test_compiles_in_one_graph(device):
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 5), 3, torch.float32, device)]

    def step(stem, spatial, temporal):
        gated, spikes = gac_fire(stem * 1.5, spatial, temporal)
        return ((gated + spikes) * stem).sum()

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    got, want = torch.autograd.grad(compiled(*args), args), torch.autograd.grad(step(*args), args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
