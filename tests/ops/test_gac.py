"""gac_encode and gated_lif against their references: forward, every gradient, layouts, refusals."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close, assert_matches, gate_inputs
from gac_kernels import (
    CIFAR,
    IMAGENET,
    LIFSpec,
    gac_encode,
    gac_encode_reference,
    gated_lif,
    gated_lif_reference,
    lif_reference,
)

DIALECTS = {"cifar": CIFAR, "imagenet": IMAGENET}
SPECS = {
    **DIALECTS,
    "soft": LIFSpec(reset="soft"),
    "soft-detached-atan": LIFSpec(reset="soft", detach_reset=True, surrogate="atan"),
    "sigmoid": LIFSpec(surrogate="sigmoid"),
}


def test_reference_is_its_formula():
    """sigmoid(m n) on a hand-made spike train: x = 0.8 fires at every second step."""
    stem, spatial = torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), 2.0)
    temporal = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    y = gac_encode_reference(stem, spatial, temporal)
    gates = torch.sigmoid(torch.tensor([2.0, -2.0, 1.0, 0.0]))
    torch.testing.assert_close(y.flatten(), gates * torch.tensor([0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
def test_smooth_twin_passes_gradcheck(static):
    args = [x.double().requires_grad_() for x in gate_inputs((2, 2, 1, 2), 3, torch.float64, "cpu", static)]
    reference = gac_encode_reference if static else gated_lif_reference
    assert torch.autograd.gradcheck(lambda *a: reference(*a, CIFAR, smooth=True), args, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_steps", [1, 4, 6, 11])
@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_encode_matches_reference(backend, spec, num_steps, dtype, device, poisoned):
    args = gate_inputs((3, 5, 7, 9), num_steps, dtype, device)
    assert_matches(lambda *a: gac_encode(*a, spec), lambda *a: gac_encode_reference(*a, spec), args)


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("num_steps", [3, 10])
def test_every_spec(backend, spec, static, num_steps, device, poisoned):
    op, reference = (gac_encode, gac_encode_reference) if static else (gated_lif, gated_lif_reference)
    args = gate_inputs((2, 3, 5, 4), num_steps, torch.float32, device, static)
    assert_matches(lambda *a: op(*a, spec), lambda *a: reference(*a, spec), args)


def test_float64(device):
    args = gate_inputs((2, 3, 5, 4), 4, torch.float64, device)
    assert_matches(gac_encode, gac_encode_reference, [a.double() for a in args])


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, device, poisoned):
    """Layouts may differ between the inputs and the incoming gradient; the output keeps channels-last."""
    stem, spatial, temporal = gate_inputs((3, 4, 5, 6), 4, torch.float32, device)
    args = [LAYOUTS[layout](stem), spatial, temporal.t().contiguous().t()]
    assert_matches(gac_encode, lambda *a: gac_encode_reference(*a), args)
    y = gac_encode(*args)
    torch.testing.assert_close(y, gac_encode_reference(*args))
    assert y.stride()[0] == stem.numel()
    if layout == "channels_last":
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    leaf = args[0].detach().requires_grad_()
    (got,) = torch.autograd.grad(gac_encode(leaf, *args[1:]).sum(), leaf)
    (want,) = torch.autograd.grad(gac_encode_reference(leaf, *args[1:]).sum(), leaf)
    assert_close("gradient under an expanded gradient", got, want)


def test_gradients_are_deterministic(backend, device):
    args = [a.requires_grad_() for a in gate_inputs((2, 8, 16, 16), 4, torch.float32, device)]
    grad = torch.randn(4, 2, 8, 16, 16, device=device)
    first, second = (torch.autograd.grad(gac_encode(*args), args, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_fires_exactly_where_the_neuron_fires(backend, device):
    stem, spatial, temporal = gate_inputs((2, 3, 8, 8), 6, torch.float32, device)
    spikes = lif_reference(stem.expand(6, *stem.shape))
    assert torch.equal(gac_encode(stem, spatial, temporal) > 0, spikes > 0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_zero_size(backend, shape, device):
    args = [a.requires_grad_() for a in gate_inputs(shape, 4, torch.float32, device)]
    y = gac_encode(*args)
    y.sum().backward()
    assert y.shape == (4, *shape) and all(a.grad.shape == a.shape for a in args)
    assert not args[2].grad.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 4)), r"expected stem with 4 axes"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5), torch.ones(2, 4)), "expected spatial of shape"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4).half(), torch.ones(2, 4)), "expected spatial of shape"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(3, 4)), "expected temporal of shape"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(2, 0)), "with T >= 1"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(2, 4).int()), "temporal to be a floating"),
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, device="meta"), torch.ones(2, 4)), "expected spatial on cpu"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        gac_encode(*args)


def test_varying_input_needs_matching_steps():
    x = torch.ones(4, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"expected temporal of shape \(2, 4\)"):
        gated_lif(x, x, torch.ones(2, 5))


@pytest.mark.parametrize("static", [True, False], ids=["static", "varying"])
def test_opcheck(backend, static, device):
    for spec in DIALECTS.values():
        args = [a.requires_grad_() for a in gate_inputs((2, 3, 4, 5), 3, torch.float32, device, static)]
        torch.library.opcheck(torch.ops.gac_kernels.gated_lif.default, (*args, *spec.op_arguments))


def test_compiles_in_one_graph(device):
    args = [a.requires_grad_() for a in gate_inputs((2, 3, 4, 5), 3, torch.float32, device)]

    def step(stem, spatial, temporal):
        return (gac_encode(stem * 1.5, spatial, temporal) * stem).sum()

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    got, want = torch.autograd.grad(compiled(*args), args), torch.autograd.grad(step(*args), args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
