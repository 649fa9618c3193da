"""lif: hand-computed traces, the reference's own gradient, and both implementations against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from compare import assert_matches
from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif, lif_reference, use_backend
from gac_kernels.spec import SURROGATES

BACKENDS = ["eager", "triton"]
DIALECTS = {"cifar": CIFAR, "imagenet": IMAGENET}
SPECS = [
    LIFSpec(threshold=1.0, decay=0.5, surrogate=s, width=w, detach_reset=d, reset=r)
    for (s, w), d, r in itertools.product(
        [("triangle", 1.0), ("rectangle", 0.5), ("atan", 1.0), ("sigmoid", 1.0)], (False, True), ("hard", "soft")
    )
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def test_reference_traces_by_hand():
    """u = 0.5 v + x, fires above 1 (strictly), resets to 0; the same input under a soft reset."""
    x = torch.tensor([0.8, 0.8, 0.8, 1.0, 0.5, 3.0, 0.0])
    # u: 0.8, 1.2*, 0.8, 1.4*, 0.5, 3.25*, 0
    assert lif_reference(x[:, None])[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 0]
    # soft: u 0.8, 1.2* -> .2, .9, 1.45* -> .45, .725, 3.3625* -> 2.3625, 1.18125*
    soft, last = lif_reference(x[:, None], LIFSpec(reset="soft"), return_state=True)
    assert soft[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert last.item() == pytest.approx(0.18125, abs=1e-6)
    # exactly at the threshold there is no spike
    assert lif_reference(torch.tensor([[1.0], [0.5], [0.75]]))[:, 0].tolist() == [0, 0, 1]


def test_reference_gradient_by_hand():
    """Two steps, triangle, no spike: ds1/dx1 = sigma'(u1), ds2/dx1 = sigma'(u2) * decay * (1 - u1 * sigma'(u1))."""
    x = torch.tensor([[0.5], [0.5]], dtype=torch.float64, requires_grad=True)
    s = lif_reference(x)  # u1 = 0.5, slope 0.5; u2 = 0.75, slope 0.75
    (g,) = torch.autograd.grad(s[1].sum(), x)
    assert g[:, 0].tolist() == pytest.approx([0.75 * 0.5 * (1 - 0.5 * 0.5), 0.75])
    (g,) = torch.autograd.grad(lif_reference(x, LIFSpec(detach_reset=True))[1].sum(), x)
    assert g[:, 0].tolist() == pytest.approx([0.75 * 0.5, 0.75])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_smooth_twin_passes_gradcheck(surrogate, reset):
    spec = LIFSpec(surrogate=surrogate, reset=reset, width=0.7)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: lif_reference(x, spec, v, True, smooth=True), (x, state), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6, 9, 19])
@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_dialects_match_reference(backend, spec, num_steps, dtype, device, poisoned):
    x = torch.randn(num_steps, 3, 37, dtype=dtype, device=device)
    assert_matches(lambda x: lif(x, spec), lambda x: lif_reference(x, spec), [x], exact=True)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.surrogate}-{s.reset}-{'detached' if s.detach_reset else ''}")
@pytest.mark.parametrize("num_steps", [4, 11])
def test_every_spec_with_state(backend, spec, num_steps, device, poisoned):
    inputs = [torch.randn(num_steps, 5, 7, device=device), torch.randn(5, 7, device=device)]
    assert_matches(
        lambda x, v: lif(x, spec, v, return_state=True), lambda x, v: lif_reference(x, spec, v, True), inputs
    )


def test_float64_keeps_its_precision(device):
    x = torch.randn(5, 11, dtype=torch.float64, device=device)
    assert_matches(lambda x: lif(x), lambda x: lif_reference(x), [x], exact=True)


LAYOUTS = {
    "channels_last": lambda: torch.randn(8, 5, 3, 4).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
    "batch_major": lambda: torch.randn(2, 4, 5, 3, 4).transpose(0, 1),
    "time_innermost": lambda: torch.randn(2, 5, 3, 4).permute(3, 0, 1, 2),
    "strided": lambda: torch.randn(4, 2, 5, 6)[..., ::2],
    "expanded": lambda: torch.randn(1, 2, 5, 3).expand(4, 2, 5, 3),
    "offset": lambda: torch.randn(6, 2, 5, 3)[1:5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", DIALECTS.values(), ids=DIALECTS.keys())
def test_layouts(backend, layout, spec, device, poisoned):
    """Any memory format gives the same numbers; dense ones keep their strides, state included."""
    x = LAYOUTS[layout]().to(device)
    spikes, last = lif(x, spec, return_state=True)
    expected, expected_last = lif_reference(x.contiguous(), spec, return_state=True)
    assert torch.equal(spikes, expected) and torch.equal(last, expected_last)
    if layout not in ("strided", "expanded"):
        assert spikes.stride() == x.stride()
    state = torch.randn(x.shape[1:], device=device)
    leaf = x.detach().requires_grad_()
    grad = torch.randn(*reversed(x.shape), device=device).permute(*reversed(range(x.dim())))  # yet another layout
    (got,) = torch.autograd.grad(lif(leaf, spec, state), leaf, grad)
    (want,) = torch.autograd.grad(lif_reference(leaf, spec, state), leaf, grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_expanded_gradient(backend, device, poisoned):
    """sum() hands an expanded, zero-stride gradient to backward."""
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(lif(x).sum(), x)
    (want,) = torch.autograd.grad(lif_reference(x).sum(), x)
    torch.testing.assert_close(got, want)


def test_state_continues_a_sequence(backend, device):
    x = torch.randn(7, 33, device=device)
    first, state = lif(x[:3], return_state=True)
    assert torch.equal(torch.cat([first, lif(x[3:], state=state)]), lif(x))


def test_backends_mix(device):
    """A forward pass of one implementation can be followed by the backward pass of the other."""
    for spec in DIALECTS.values():
        x = torch.randn(4, 9, device=device, requires_grad=True)
        with use_backend("triton"):
            spikes = lif(x, spec)
        with use_backend("eager"):
            (mixed,) = torch.autograd.grad(spikes.sum(), x)
        (want,) = torch.autograd.grad(lif_reference(x, spec).sum(), x)
        torch.testing.assert_close(mixed, want)


@pytest.mark.parametrize("shape", [(4, 0), (3, 2, 0, 5)])
def test_zero_size(backend, shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    spikes = lif(x)
    spikes.sum().backward()
    assert spikes.shape == x.grad.shape == shape


def test_saves_no_more_than_promised(device):
    """x itself for the triangle; two bits a neuron-step for the rectangle with a detached reset."""
    saved: list[torch.Tensor] = []
    x = torch.randn(4, 100, device=device, requires_grad=True)
    for spec, bytes_per_step in ((CIFAR, 4.0), (IMAGENET, 0.25)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            lif(x, spec)
        assert sum(t.numel() * t.element_size() for t in saved) == bytes_per_step * x.numel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lif(torch.ones(3, 2, dtype=torch.int64)), "expected x in one of"),
        (lambda: lif(torch.tensor(1.0)), "at least 1 axes"),
        (lambda: lif(torch.ones(0, 2)), "at least one time step"),
        (lambda: lif([1.0]), "expected x to be a tensor"),
        (lambda: lif(torch.ones(3, 2), spec="cifar"), "expected spec to be a LIFSpec"),
        (lambda: lif(torch.ones(3, 2), state=torch.ones(3)), r"expected state of shape \(2,\)"),
        (lambda: lif(torch.ones(3, 2), state=torch.ones(2, dtype=torch.int64)), "expected state in torch.float32"),
        (lambda: lif(torch.ones(3, 2), state=torch.ones(2, device="meta")), "expected state on cpu"),
        (lambda: LIFSpec(surrogate="step"), "expected a surrogate out of"),
        (lambda: LIFSpec(decay=1.5), "expected a decay in"),
        (lambda: LIFSpec(threshold=0.0), "expected a finite threshold"),
        (lambda: LIFSpec(width=float("nan")), "expected a finite surrogate width"),
        (lambda: LIFSpec(reset="none"), "expected a reset out of"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck(backend, device):
    for spec, return_state in itertools.product(DIALECTS.values(), (False, True)):
        x = torch.randn(3, 2, 5, device=device, requires_grad=True)
        state = torch.randn(2, 5, device=device, requires_grad=True) if return_state else None
        args = (x, state, *spec.op_arguments, True, return_state)
        torch.library.opcheck(torch.ops.gac_kernels.lif.default, args)


def test_compiles_in_one_graph(device):
    for spec in DIALECTS.values():

        def step(x, spec=spec):
            return (lif(x * 1.5, spec) * x).sum()

        x = torch.randn(4, 3, 5, device=device, requires_grad=True)
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if x.is_cuda else "aot_eager")
        (got,) = torch.autograd.grad(compiled(x), x)
        (want,) = torch.autograd.grad(step(x), x)
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40e9, reason="needs 20 GB free")
def test_more_than_two_to_the_31_elements():
    """Offsets past 2**31: the tail of a 4.5 GB sequence equals the same tail computed alone."""
    num_steps, neurons = 4, 2**29 + 1000
    x = torch.randn(num_steps, neurons, device="cuda", dtype=torch.bfloat16)
    for spec in DIALECTS.values():
        leaf = x.requires_grad_()
        spikes = lif(leaf, spec)
        tail = x[:, -2000:].detach().clone().requires_grad_()
        assert torch.equal(spikes[:, -2000:], lif_reference(tail, spec))
        grad = torch.randn_like(tail)
        full = torch.zeros_like(x)
        full[:, -2000:] = grad
        (got,) = torch.autograd.grad(spikes, leaf, full)
        (want,) = torch.autograd.grad(lif_reference(tail, spec), tail, grad)
        torch.testing.assert_close(got[:, -2000:], want, rtol=1e-2, atol=1e-3)
        del spikes, full, got
