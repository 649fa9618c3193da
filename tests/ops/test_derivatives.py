"""Second derivatives, `torch.func` and forward mode: those of the reference, or an error, and never 0 or None."""

from __future__ import annotations

import contextlib
import threading

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import gac_kernels
import timm_gac  # noqa: F401
from gac_kernels import CIFAR, IMAGENET, LIFSpec, ResidualNorm, use_backend
from gac_kernels.reference import neuron, smooth_step

STEPS, SHAPE = 3, (6, 2, 3, 2)  # T*B, C, H, W
SPECS = {
    "triangle": CIFAR,
    "mask": IMAGENET,
    "soft": LIFSpec(surrogate="atan", reset="soft"),
    "soft mask": LIFSpec(surrogate="rectangle", reset="soft"),
}


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Tensors are made where the kernels run: on a GPU where there is one."""
    with device:
        yield


def vector(start: float) -> Tensor:
    return torch.tensor([start, start + 0.4])


def statistics() -> tuple[Tensor, Tensor]:
    return vector(-0.1), vector(0.8)


# Each takes the set of functions, a spec and tensors that require gradients, of the shapes after it.
CASES = {
    "lif": (lambda f, spec, x: f("lif")(x.unflatten(0, (STEPS, -1)), spec), [SHAPE]),
    "lif with state": (
        lambda f, spec, x, v: f("lif")(x.unflatten(0, (STEPS, -1)), spec, v, return_state=True),
        [SHAPE, (2, 2, 3, 2)],
    ),
    "norm_lif": (
        lambda f, spec, x, r, w, b: f("norm_lif")(
            x, *(s.to(x) for s in statistics()), STEPS, spec, weight=w, bias=b, residual=r
        ),
        [SHAPE, SHAPE, (2,), (2,)],
    ),
    "norm_lif with its current": (
        lambda f, spec, x, r, w, b: f("norm_lif")(
            x, *(s.to(x) for s in statistics()), STEPS, spec, weight=w, bias=b, residual=r, return_membrane=True
        ),
        [SHAPE, SHAPE, (2,), (2,)],
    ),
    "norm_lif in training": (
        lambda f, spec, x, r, w, b, rw, rb: f("norm_lif")(
            x,
            *gac_kernels.batch_stats(x),
            STEPS,
            spec,
            weight=w,
            bias=b,
            residual=r,
            batch_stats=True,
            return_membrane=True,
            residual_norm=ResidualNorm(*gac_kernels.batch_stats(r), rw, rb),
        ),
        [SHAPE, SHAPE, (2,), (2,), (2,), (2,)],
    ),
    "gac_encode": (lambda f, spec, x, n, m: f("gac_encode")(x, n, m, spec), [SHAPE, SHAPE, (6, 4)]),
    "gac_fire": (lambda f, spec, x, n, m: f("gac_fire")(x, n, m, spec), [SHAPE, SHAPE, (6, 4)]),
    "pad_frames": (lambda f, spec, x: f("pad_frames")(x, 1, 2, True).square(), [SHAPE]),
    "pool_frames": (lambda f, spec, x: tuple(y.square() for y in f("pool_frames")(x)), [SHAPE]),
    "firing_rate": (lambda f, spec, x: f("firing_rate")(x, STEPS).square(), [SHAPE]),
}


def ops(name: str):
    return getattr(gac_kernels, name)


def references(name: str):
    return getattr(gac_kernels, f"{name}_reference")


def inputs(shapes, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).add(0.3).requires_grad_() for shape in shapes]


def weighted_sum(outputs) -> Tensor:
    """Of outputs and their squares, so that the gradient at a spike depends on it."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((y * (1 + y) * torch.linspace(0.2, 1.0, y.numel()).to(y).view(y.shape)).sum() for y in outputs)


def second(functions, case, spec, tensors: list[Tensor]) -> list[Tensor]:
    """First derivatives, and those of the sum of their squares."""
    first = torch.autograd.grad(weighted_sum(case(functions, spec, *tensors)), tensors, create_graph=True)
    again = torch.autograd.grad(
        sum(g.square().sum() for g in first), tensors, allow_unused=True, materialize_grads=True
    )
    return [*first, *again]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(backend, name, spec) -> None:
    case, shapes = CASES[name]
    dtype = torch.float64 if backend == "eager" else torch.float32
    tensors = inputs(shapes, dtype)
    actual, expected = second(ops, case, spec, tensors), second(references, case, spec, tensors)
    assert any(g.any() for g in expected[len(tensors) :])
    for a, b in zip(actual, expected, strict=True):
        # Second derivatives in float32 of values of several hundred differed by 3e-4 on an H200.
        tolerance = 1e-9 if dtype == torch.float64 else 5e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_one_tensor_as_two_inputs() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def case(functions, spec, x):
        return functions("norm_lif")(x, *(s.to(x) for s in statistics()), STEPS, spec, residual=x)

    for a, b in zip(second(ops, case, CIFAR, [x]), second(references, case, CIFAR, [x]), strict=True):
        torch.testing.assert_close(a, b)


def test_packed_convolution_refuses_a_second_derivative() -> None:
    """Its bits do not lead back to the spikes; the first derivative, with create_graph too, is conv2d's."""
    spikes, weight = (torch.randn(s).gt(0).float().requires_grad_() for s in ((4, 2, 3, 3), (3, 2, 2, 2)))
    bits = gac_kernels.pack_spikes(spikes, 2)
    first = torch.autograd.grad(
        gac_kernels.packed_conv2d(spikes, bits, weight, 2).square().sum(), (spikes, weight), create_graph=True
    )
    plain = torch.autograd.grad(torch.conv2d(spikes, weight).square().sum(), (spikes, weight))
    for a, b in zip(first, plain, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"expected one derivative .* set_spike_packing\(False\)"):
        first[1].sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(backend, name) -> None:
    case, shapes = CASES[name]
    tensors = [x.detach() for x in inputs(shapes, torch.float32)]
    tangents = [torch.randn_like(x) for x in tensors]
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(weighted_sum(case(ops, CIFAR, *leaves)), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    _, product = jvp(lambda *x: weighted_sum(case(ops, CIFAR, *x)), tuple(tensors), tuple(tangents))
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(weighted_sum(case(ops, CIFAR, *duals))).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


def test_inference_ops_refuse_forward_mode_and_have_no_gradient() -> None:
    x, weight = torch.randn(4, 2, 3, 3), torch.randn(3, 2, 3, 3)
    spikes, scale = (x > 0).to(torch.int8), torch.ones(3)
    calls = {
        "conv_lif": lambda r: gac_kernels.conv_lif(x, weight, scale, 2, residual=r),
        "spike_conv": lambda r: gac_kernels.spike_conv(spikes, weight.to(torch.int8), scale, scale, 2, residual=r),
        "integer_lif": lambda r: gac_kernels.integer_lif(r, 2),
    }
    residual = torch.randn(4, 3, 3, 3)
    for name, call in calls.items():
        assert not call(residual.clone().requires_grad_()).requires_grad
        with pytest.raises(NotImplementedError, match=f"expected {name} outside of forward-mode"):
            jvp(call, (residual,), (residual,))


@pytest.mark.parametrize("name", CASES)
def test_func_transforms(backend, name) -> None:
    """Gradients, both Jacobians and gradients per sample, of a sum, as autograd has them."""
    case, shapes = CASES[name]
    tensors = [x.detach() for x in inputs(shapes, torch.float32)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(weighted_sum(case(ops, CIFAR, *leaves)), leaves)
    places = tuple(range(len(tensors)))

    def cost(*x: Tensor) -> Tensor:
        return weighted_sum(case(ops, CIFAR, *x))

    stacked = [torch.stack((x, x)) for x in tensors]
    found = [grad(cost, places)(*tensors), jacrev(cost, places)(*tensors)]
    if name == "norm_lif in training":
        with pytest.raises(NotImplementedError, match=r"expected batch_stats outside of torch\.func\.vmap"):
            vmap(grad(cost, places))(*stacked)
    else:
        found += [[g[1] for g in vmap(grad(cost, places))(*stacked)]]
    for gradients in found:
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hessian_of_a_neuron() -> None:
    x = torch.randn(4, 3, dtype=torch.float64) + 0.5
    functions = [lambda x, f=f: weighted_sum(f(x, CIFAR)) for f in (gac_kernels.lif, gac_kernels.lif_reference)]
    expected = torch.autograd.functional.hessian(functions[1], x)
    assert expected.any()
    for actual in (hessian(functions[0])(x), torch.autograd.functional.hessian(functions[0], x)):
        torch.testing.assert_close(actual, expected)


@pytest.fixture
def network():
    """A network with running statistics of its own, in eval mode."""
    model = timm.create_model("test_gac_msresnet", num_classes=5).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, 3, 16, 16))
    return model.eval()


def test_network_per_sample_gradients(network) -> None:
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    params, buffers = dict(network.named_parameters()), dict(network.named_buffers())

    def cost(params, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (params, buffers), (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    values = {name: value.detach() for name, value in params.items()}
    found = vmap(grad(cost), (None, 0, 0))(values, x, labels)
    for i in range(3):
        expected = torch.autograd.grad(cost(params, x[i], labels[i]), list(params.values()))
        for (name, got), wanted in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(
                got[i], wanted, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
            )


def test_network_training_under_vmap_is_an_error(network) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda image: network.train()(image[None]))(torch.randn(2, 3, 16, 16))


def test_network_with_smooth_neurons_against_differences(network, monkeypatch) -> None:
    """With each step replaced by the integral of its surrogate, a derivative is a quotient of differences."""
    monkeypatch.setattr(neuron._Step, "apply", staticmethod(smooth_step))
    network = network.double()
    x, direction = (torch.randn(2, 3, 16, 16, dtype=torch.float64) for _ in range(2))

    def cost(x: Tensor) -> Tensor:
        return network(x).square().sum()

    def smooth(x: Tensor) -> Tensor:
        return vmap(cost)(x[None])[0]  # under a transform each op is its definition

    step = 1e-6
    expected = (smooth(x + step * direction) - smooth(x - step * direction)) / (2 * step)
    torch.testing.assert_close(jvp(cost, (x,), (direction,))[1], expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((grad(cost)(x) * direction).sum(), expected, rtol=1e-5, atol=1e-8)
    twice = jvp(lambda x: (grad(cost)(x) * direction).sum(), (x,), (direction,))[1]
    slopes = [(grad(cost)(x + sign * step * direction) * direction).sum() for sign in (1, -1)]
    torch.testing.assert_close(twice, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-3, atol=1e-6)


def test_network_gradient_penalty(network) -> None:
    """Double backward through the kernels gives what `torch.func` gives through the definitions."""
    network = network.double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    (actual,) = torch.autograd.grad(first.square().sum(), x)
    expected = grad(lambda x: grad(lambda x: network(x).square().sum())(x).square().sum())(x.detach())
    assert actual.any()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_jacobians_of_a_network(network) -> None:
    x = torch.randn(3, 8, 8)
    reverse, forward = (transform(lambda x: network(x[None])[0])(x) for transform in (jacrev, jacfwd))
    assert reverse.shape == (5, 3, 8, 8) and reverse.any()
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-5)


def test_backends_of_threads_do_not_mix() -> None:
    """Two blocks that overlap in time, in either order of leaving them."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with use_backend("triton"):
            seen.append(gac_kernels.requested_backend())
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with use_backend("eager"):
        thread.start()
        assert entered.wait(30)
        seen.append(gac_kernels.requested_backend())
    seen.append(gac_kernels.requested_backend())
    leave.set()
    thread.join()
    seen.append(gac_kernels.requested_backend())
    assert seen == ["triton", "eager", "auto", "auto"]


def test_backward_takes_the_backend_of_its_forward_pass(monkeypatch) -> None:
    from gac_kernels.neuron import lif as module

    called = []
    resolve = module.resolve_backend
    monkeypatch.setattr(module, "resolve_backend", lambda *a: called.append(resolve(*a)) or called[-1])
    x = torch.randn(2, 3, requires_grad=True)
    with use_backend("triton"):
        y = gac_kernels.lif(x)
    with use_backend("eager"), contextlib.suppress(StopIteration):
        y.sum().backward()
    assert called == ["triton", "triton"]


@pytest.mark.parametrize("view", ["step", "expanded"])
def test_vectors_with_strides(backend, view) -> None:
    def viewed(*values: float) -> Tensor:
        if view == "expanded":
            return torch.tensor(values[:1]).expand(len(values))
        return torch.tensor(values).repeat_interleave(2)[::2]

    x = torch.randn(4, 3, 2, 2)
    a, b = viewed(0.5, 1.0, 2.0), viewed(1.5, 0.25, 0.5)
    norm = ResidualNorm(a, b, b, a)
    for keywords in (dict(weight=a, bias=b), dict(weight=a, bias=b, residual=x.flip(0), residual_norm=norm)):
        assert torch.equal(*(f("norm_lif")(x, a, b, 2, **keywords) for f in (ops, references)))
    weight = torch.randint(-8, 8, (3, 3, 3, 3))
    assert torch.equal(*(f("conv_lif")(x, weight / 8, a, 2) for f in (ops, references)))
    assert torch.equal(
        *(f("spike_conv")((x > 0).to(torch.int8), weight.to(torch.int8), a, b, 2) for f in (ops, references))
    )
    if view == "step":
        running = [[viewed(0.1, 0.2, 0.3), viewed(1.0, 2.0, 3.0)] for _ in range(2)]
        for f, (mean, var) in zip((ops, references), running, strict=True):
            f("batch_stats")(x, mean, var)
        for mine, theirs in zip(*running, strict=True):
            torch.testing.assert_close(mine, theirs)
    else:
        with pytest.raises(ValueError, match="tensor to write into"):
            gac_kernels.batch_stats(x, a, b)


def test_statistics_that_are_not_finite_leave_the_running_ones(backend) -> None:
    x = torch.randn(4, 3, 2, 2)
    x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf")
    running = torch.zeros(3), torch.ones(3)
    mean, var = gac_kernels.batch_stats(x, *running)
    assert not mean[1:].isfinite().any() and not var[1:].isfinite().any()
    assert running[0][0] != 0 and running[0][1:].eq(0).all() and running[1][1:].eq(1).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_pixel_that_is_not_finite_shows_in_the_logits(network, training) -> None:
    x = torch.randn(4, 3, 16, 16)
    clean = network(x)
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 0, 3, 3] = value
        for logits in (network(broken), network.forward_steps(broken)):
            assert logits[1].isnan().all() and logits[[0, 2, 3]].isfinite().all()
    assert torch.equal(network(x), clean)
    with torch.no_grad():
        assert network.train()(broken)[1].isnan().all()
    assert all(v.isfinite().all() for k, v in network.state_dict().items() if "running" in k and "layer" in k)


@pytest.mark.parametrize("field", ["threshold", "decay", "width"])
def test_specs_hold_plain_numbers(field) -> None:
    numpy = pytest.importorskip("numpy")
    for value in (torch.tensor(0.5), numpy.float32(0.5), numpy.array(0.5), 1):
        spec = LIFSpec(**{field: value})
        assert type(getattr(spec, field)) is float and hash(spec) == hash(LIFSpec(**{field: float(value)}))
    for value, message in (
        (torch.nn.Parameter(torch.tensor(0.5)), "specs hold plain numbers"),
        (torch.full((3,), 0.5), "specs hold plain numbers"),
        ("0.5", "specs hold plain numbers"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            LIFSpec(**{field: value})
