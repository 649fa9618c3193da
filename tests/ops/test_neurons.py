"""Registered neurons and surrogates: traces by hand, the matrix of `gac_kernels.testing`, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from gac_kernels import (
    LIFSpec,
    Neuron,
    Surrogate,
    compile_ahead,
    lif,
    lif_reference,
    norm_lif,
    register_neuron,
    register_surrogate,
    surrogate_grad,
    testing,
    use_backend,
)
from gac_kernels.common.triton import HAS_TRITON, tl, triton
from gac_kernels.registry import Step, kernel_constants, names_of, neuron_of, number_of
from gac_kernels.spec import SURROGATES

NEURONS = ("ternary", "integer", "adaptive")


@triton.jit
def _exponential_kernel(d, WIDTH: tl.constexpr):
    return tl.exp(-tl.where(d > 0.0, 2.0 * d, -d) / WIDTH) * (2.0 / 3.0 / WIDTH)


# Not an even function, so that a sign lost on the way shows.
EXPONENTIAL = Surrogate(
    name="test_exponential",
    derivative=lambda d, width: torch.exp(-torch.where(d > 0, 2 * d, -d) / width) * (2 / 3 / width),
    kernel=_exponential_kernel,
    integral=lambda d, width: torch.where(
        d > 0, 1 - torch.exp(-2 * d.clamp(min=0) / width) / 3, torch.exp(d.clamp(max=0) / width) * (2 / 3)
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_surrogate(EXPONENTIAL, replace=True)


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def _spec(neuron: str, **fields) -> LIFSpec:
    return LIFSpec(neuron=neuron, **dict(threshold=0.7, decay=0.6, surrogate="atan") | fields)


def _trace(neuron: str, currents: list[float], **fields) -> list[float]:
    spikes = lif(torch.tensor(currents)[:, None], LIFSpec(neuron=neuron, **fields))
    return spikes[:, 0].tolist()


def test_traces_by_hand():
    """Threshold 1, decay 0.5."""
    # u: 0.8, -1.4*, -0.6, 0.7, 1.35*; reset to 0 behind each spike
    assert _trace("ternary", [0.8, -1.8, -0.6, 1.0, 1.0]) == [0, -1, 0, 0, 1]
    # soft: u -1.5* -> -0.5, -1.25* -> -0.25, 0.875, 1.4375*
    assert _trace("ternary", [-1.5, -1.0, 1.0, 1.0], reset="soft") == [-1, -1, 0, 1]
    # u: 0.9, 2.95** -> 0, 9.0 at the most of 4; soft: 2.5** -> 0.5, 1.25* -> 0.25, 3.125***
    assert _trace("integer", [0.9, 2.5, 9.0, 1.0]) == [0, 2, 4, 0]
    assert _trace("integer", [2.5, 1.0, 3.0], reset="soft") == [2, 1, 3]
    # b: 0, 0.1, 0.19, 0.171; thresholds 1, 1.18, 1.342, 1.3078
    assert _trace("adaptive", [1.1, 1.2, 1.3, 0.7]) == [1, 1, 0, 1]


def test_adaptive_states():
    """Membrane and the threshold's rise, which go on from call to call."""
    spec = LIFSpec(neuron="adaptive")
    x = torch.randn(7, 2, 3) + 0.5
    whole, last = lif(x, spec, return_state=True)
    first, state = lif(x[:3], spec, return_state=True)
    second, end = lif(x[3:], spec, state, return_state=True)
    assert last.shape == (2, 2, 3)
    assert torch.equal(whole, torch.cat([first, second])) and torch.equal(last, end)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("case", testing.CASES)
def test_matches_reference(neuron, case, device, poisoned):
    for spec in testing.variants(_spec(neuron)):
        if spec.detach_reset and "chunks" in case:
            continue  # the interpreter is slow, and steps are the same function in chunks
        testing.check_case(case, spec, device)


@pytest.mark.parametrize("case", testing.CASES)
def test_own_surrogate(case, device, poisoned):
    """Of the neuron that is built in, and of a registered one."""
    testing.check_case(case, _spec("lif", surrogate=EXPONENTIAL.name), device)
    testing.check_case(case, _spec("ternary", surrogate=EXPONENTIAL.name, reset="soft"), device)


@pytest.mark.parametrize("neuron", ("lif", *NEURONS))
def test_smooth_twin_passes_gradcheck(neuron):
    for surrogate in ("sigmoid", EXPONENTIAL.name):
        for reset in ("hard", "soft"):
            testing.check_smooth_twin(_spec(neuron, surrogate=surrogate, reset=reset))


@pytest.mark.parametrize("surrogate", (*SURROGATES, EXPONENTIAL.name))
def test_derivative_and_integral_agree(surrogate):
    for width in (0.3, 1.0):
        testing.check_surrogate(LIFSpec(surrogate=surrogate, width=width))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neuron", NEURONS)
def test_dtypes(neuron, dtype, device):
    for case in ("lif", "norm_lif", "gac_encode"):
        testing.check_case(case, _spec(neuron), device, dtype)


@pytest.mark.parametrize("neuron", NEURONS)
def test_opcheck(backend, neuron, device):
    testing.check_operator(_spec(neuron), device)


@pytest.fixture(scope="module")
def example():
    """The neuron and surrogate of examples/own_neuron.py."""
    path = Path(__file__).parents[2] / "examples" / "own_neuron.py"
    spec = importlib.util.spec_from_file_location("own_neuron", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return LIFSpec(neuron="synaptic", surrogate="exponential")


@pytest.mark.parametrize("case", ["lif_in_chunks", "norm_lif", "gated_lif_in_chunks", "gac_fire"])
def test_the_example(case, example, device):
    testing.check_case(case, example, device)
    testing.check_case(case, dataclasses.replace(example, reset="soft", detach_reset=True), device)


def test_learned_values_bits_and_integers_are_refused(device):
    x = torch.randn(4, 3, 2, 2, device=device)
    one = torch.ones(3, device=device)
    for neuron in NEURONS:
        with pytest.raises(ValueError, match=f"expected neuron 'lif' for learned decay and threshold, got '{neuron}'"):
            lif(x, LIFSpec(neuron=neuron), decay=torch.full((1,), 0.5, device=device))
        with pytest.raises(ValueError, match=f"in one operator, got '{neuron}'"):
            _ = LIFSpec(neuron=neuron).forward_arguments
    for neuron in ("ternary", "integer"):
        with pytest.raises(ValueError, match=f"spikes 0 or 1 for packed bits, got those of neuron '{neuron}'"):
            norm_lif(x, one, one, 2, LIFSpec(neuron=neuron), return_bits=True)
    spikes, bits = norm_lif(x, one, one, 2, LIFSpec(neuron="adaptive"), return_bits=True)
    expected, same = norm_lif(x, one, one, 2, LIFSpec(neuron="adaptive"), return_bits=True)
    assert torch.equal(spikes, expected) and torch.equal(bits, same) and bits.numel() == x.numel() // 2


def test_check_finds_a_wrong_derivative(device):
    """The kit fails where the kernel's derivative, or that of the surrogate's kernel, is another."""
    if "triton" not in testing.backends(device):
        pytest.skip("needs Triton")

    wrong = dataclasses.replace(
        EXPONENTIAL, name="test_wrong", derivative=lambda d, width: (d.abs() < width).to(d.dtype)
    )
    register_surrogate(wrong, replace=True)
    with pytest.raises(AssertionError, match=r"lif in triton.*gradient 0: relative error"):
        testing.check_case("lif", LIFSpec(surrogate="test_wrong"), device)
    with pytest.raises(AssertionError, match="derivative and integral differ"):
        testing.check_surrogate(LIFSpec(surrogate="test_wrong"))


@pytest.mark.parametrize(
    ("returned", "states", "message"),
    [
        (lambda x, s: (s, x), 1, r"states=1, got \(Tensor, a Tensor\): return s, \(v,\)"),
        (lambda x, s: (s, (x, x)), 1, r"states=1, got \(Tensor, \(Tensor, Tensor\)\)"),
        (lambda x, s: (s, (x,)), 2, r"states=2, got \(Tensor, \(Tensor,\)\): return s, a tuple of 2"),
        (lambda x, s: ((x,), s), 1, r"states=1, got \(tuple, a Tensor\)"),
        (lambda x, s: s, 1, r"states=1, got a Tensor"),
        (lambda x, s: (s, (0.5,)), 1, "tensors of the input's shape .*, got float"),
        (lambda x, s: (s.sum(), (x,)), 1, r"tensors of the input's shape .*, got \(\)"),
    ],
)
def test_what_a_step_may_return(returned, states, message, device):
    """A state that is no tuple was taken apart along its first axis, and spread over the others."""
    own = Neuron("test_returns", lambda x, _, n: returned(x, n.spike(x)), _leak_kernel, _leak_grad, states=states)
    register_neuron(own, replace=True)
    for function in (lif, lif_reference):
        with use_backend("eager"), pytest.raises(ValueError, match=message):
            function(torch.randn(3, 2, 4, device=device), LIFSpec(neuron="test_returns"))


def test_spikes_are_those_declared():
    testing.check_spikes(LIFSpec(neuron="ternary"))
    testing.check_spikes(LIFSpec(neuron="integer"))
    register_neuron(dataclasses.replace(neuron_of("ternary"), name="test_lying", spikes="binary"), replace=True)
    with pytest.raises(AssertionError, match=r"spikes='binary' declares .*, got \[-1.0, 0.0, 1.0\]"):
        testing.check_spikes(LIFSpec(neuron="test_lying"))


def test_cases_fire_with_the_default_spec(device):
    """A neuron behind gates too: the check of a good neuron must not fail by chance."""
    with use_backend("eager"):
        for seed in range(10):
            torch.manual_seed(seed)
            for spec in (LIFSpec(), *(LIFSpec(neuron=name) for name in NEURONS)):
                for name in ("gac_fire", "gac_fire_varying"):
                    case = testing.CASES[name](spec, device, torch.float32)
                    assert case.reference(*case.inputs)[-1].any(), (name, spec.neuron, seed)


def test_check_says_where_the_definition_itself_is_not_finite(device):
    """A step that grows beyond all numbers is no fault of an operator."""

    def grows(x, state, n):
        spikes, (v,) = _leak(x, state, n)
        return spikes, (v * 1e30,)

    growing = Neuron("test_growing", grows, _leak_kernel, _leak_grad)
    register_neuron(growing, replace=True)
    with pytest.raises(AssertionError, match=r"as the definition in PyTorch computes it.*not finite"):
        testing.check_case("lif", LIFSpec(neuron="test_growing"), device)


def _leak(x, state, n: Step):
    u = n.decay * state[0] + x
    s = n.spike(u - n.threshold)
    return s, (u * (1.0 - n.held(s)),)


@triton.jit
def _leak_kernel(x, state, THRESHOLD, DECAY, SOFT: tl.constexpr, CONSTANTS: tl.constexpr):
    u = DECAY * state[0] + x
    s = tl.where(u > THRESHOLD, 1.0, 0.0)
    return s, (u * (1.0 - s),)


@triton.jit
def _leak_grad(
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
    at_spike = gs if DETACH else gs - gstate[0] * u
    keep = tl.where(u > THRESHOLD, 0.0, 1.0)
    gu = at_spike * surrogate_grad(u - THRESHOLD, SURROGATE, WIDTH) + gstate[0] * keep
    return gu, (DECAY * gu,)


def test_the_built_in_neuron_registered_as_ones_own(device):
    """It has the same spikes and gradients."""
    register_neuron(Neuron("test_leak", _leak, _leak_kernel, _leak_grad), replace=True)
    for backend in testing.backends(device):
        with use_backend(backend):
            x = torch.randn(11, 3, 5, device=device, requires_grad=True)
            own, built_in = lif(x, LIFSpec(neuron="test_leak")), lif(x)
            assert torch.equal(own, built_in)
            grad = torch.randn_like(x)
            (got,), (want,) = (torch.autograd.grad(out, x, grad) for out in (own, built_in))
            torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled_ahead(device):
    spec = _spec("ternary", surrogate=EXPONENTIAL.name, decay=0.625)
    x = torch.randn(5, 33, device=device)
    assert torch.equal(compile_ahead(lambda: lif(x, spec)), lif_reference(x, spec))


def test_registration():
    number = number_of("ternary", "atan")
    assert number > 2**32 and names_of(number) == ("ternary", "atan")
    assert number_of("lif", "sigmoid") == 3 and LIFSpec(surrogate="sigmoid").surrogate_id == 3
    assert number == LIFSpec(neuron="ternary", surrogate="atan").surrogate_id
    assert kernel_constants(3, backward=False) == {} and kernel_constants(3, backward=True) == dict(SURROGATE=3)
    eight = dataclasses.replace(neuron_of("integer"), name="test_integer8", constants=(8,))
    register_neuron(eight, replace=True)
    assert _trace("test_integer8", [6.5]) == [6] and _trace("integer", [6.5]) == [4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIFSpec(neuron="unheard"), "expected a neuron out of .*'ternary'.*import the module"),
        (lambda: LIFSpec(surrogate="unheard"), "expected a surrogate out of .*import the module"),
        (lambda: register_neuron("ternary"), "expected a Neuron"),
        (lambda: register_surrogate(dataclasses.replace(EXPONENTIAL, name="atan")), "'atan', which is taken"),
        (lambda: register_surrogate(EXPONENTIAL), "replace it with replace=True"),
        (lambda: register_surrogate(dataclasses.replace(EXPONENTIAL, name="A b")), "lower-case letters"),
        (
            lambda: register_surrogate(dataclasses.replace(EXPONENTIAL, name="x", kernel=None)),
            "kernel of the surrogate",
        ),
        (lambda: register_surrogate(dataclasses.replace(EXPONENTIAL, name="x", integral=3)), "integral of the surr"),
        pytest.param(
            lambda: register_neuron(dataclasses.replace(neuron_of("ternary"), name="x", kernel_grad=_leak)),
            "kernel_grad of the neuron 'x'.*put @triton.jit",
            marks=needs_triton,
        ),
        pytest.param(
            lambda: register_surrogate(dataclasses.replace(EXPONENTIAL, name="x", kernel=EXPONENTIAL.derivative)),
            "kernel of the surrogate 'x'.*put @triton.jit",
            marks=needs_triton,
        ),
        (lambda: register_neuron(dataclasses.replace(neuron_of("ternary"), name="lif")), "choose another"),
        (lambda: register_neuron(dataclasses.replace(neuron_of("ternary"), name="x", states=0)), "states of a"),
        (
            lambda: register_neuron(dataclasses.replace(neuron_of("ternary"), name="x", constants=(None,))),
            "constants of a neuron",
        ),
        (lambda: lif(torch.ones(2, 3), LIFSpec(neuron="adaptive"), torch.ones(3)), r"state of shape \(2, 3\)"),
        (lambda: names_of(12345), "import the module that registers them"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_second_derivatives_and_torch_func():
    """They come from the definition in PyTorch."""
    spec = _spec("ternary", reset="soft")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def squared(function):
        (grad,) = torch.autograd.grad(function(x, spec).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(squared(lif), squared(lif_reference))
    _, tangent = torch.func.jvp(lambda x: lif(x, spec), (x.detach(),), (torch.ones_like(x),))
    expected = torch.autograd.grad(lif_reference(x, spec), x, torch.eye(3).new_ones(4, 3).double())[0]
    assert tangent.shape == expected.shape and bool(tangent.abs().sum() > 0)


def test_compiles_in_one_graph(device):
    for neuron in NEURONS:
        spec = _spec(neuron)

        def step(x, spec=spec):
            return (lif(x * 1.5, spec) * x).sum()

        x = torch.randn(4, 3, 5, device=device, requires_grad=True)
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if x.is_cuda else "aot_eager")
        (got,) = torch.autograd.grad(compiled(x), x)
        (want,) = torch.autograd.grad(step(x), x)
        torch.testing.assert_close(got, want)
