"""batch_stats and norm_lif: both implementations against plain PyTorch, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gac_kernels import CIFAR, IMAGENET, LIFSpec, batch_stats, norm_lif, norm_lif_reference, use_backend

SHAPES = {"wide": (2, 130, 3, 4), "narrow": (3, 5, 4, 3), "one pixel": (4, 8, 1, 1)}  # B, C, H, W
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Case:
    """Inputs of a norm_lif call; ``grads(f)`` gives outputs and gradients of it."""

    def __init__(self, shape, num_steps, dtype, device, memory_format, residual, affine, batch, membrane, spec):
        batch_size, channels, height, width = shape
        size = (num_steps * batch_size, channels, height, width)

        def tensor() -> Tensor:
            return torch.randn(size, device=device).to(dtype).contiguous(memory_format=memory_format)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = tensor().requires_grad_()
        self.residual = tensor().requires_grad_() if residual else None
        self.weight = (torch.rand(channels, device=device, dtype=wide) + 0.5).requires_grad_() if affine else None
        self.bias = torch.randn(channels, device=device, dtype=wide).mul(0.3).requires_grad_() if affine else None
        self.grad_spikes, self.grad_membrane = tensor(), tensor()
        self.num_steps, self.batch, self.membrane, self.spec = num_steps, batch, membrane, spec
        if batch:
            self.stats = batch_stats(self.x)
        else:
            self.stats = (torch.randn(channels, device=device).mul(0.1), torch.rand(channels, device=device) + 0.5)

    def grads(self, function: Callable) -> tuple[list[Tensor], list[Tensor]]:
        out = function(
            self.x,
            *self.stats,
            self.num_steps,
            self.spec,
            weight=self.weight,
            bias=self.bias,
            residual=self.residual,
            batch_stats=self.batch,
            return_membrane=self.membrane,
        )
        outputs = list(out) if self.membrane else [out]
        towards = [self.grad_membrane, self.grad_spikes] if self.membrane else [self.grad_spikes]
        inputs = [t for t in (self.x, self.residual, self.weight, self.bias) if t is not None]
        return outputs, list(torch.autograd.grad(outputs, inputs, towards))

    def check(self, tolerance: float) -> None:
        outputs, grads = self.grads(norm_lif)
        with use_backend("eager"):
            expected, expected_grads = self.grads(norm_lif_reference)
        # A rounding of 16 bits can move a current over the threshold: then what follows differs for that neuron.
        flips = (outputs[-1] != expected[-1]).double().mean().item()
        assert flips <= (0 if tolerance < 1e-3 else 2e-3), f"{flips:.1e} of the spikes differ"
        assert outputs[-1].dtype == self.x.dtype and outputs[-1].stride() == self.x.stride()
        for actual, wanted in zip([*outputs[:-1], *grads], [*expected[:-1], *expected_grads], strict=True):
            assert actual.dtype == wanted.dtype
            error = (actual.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)
            assert error <= tolerance + 4 * flips**0.5, f"relative error {error:.1e}"


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(
    ("spec", "num_steps"),
    [(CIFAR, 1), (CIFAR, 4), (IMAGENET, 4), (IMAGENET, 6), (CIFAR, 10)],
    ids=["cifar-1", "cifar-4", "imagenet-4", "imagenet-6", "cifar-10"],
)
@pytest.mark.parametrize(("residual", "membrane"), [(False, False), (True, False), (True, True), (False, True)])
def test_matches_reference(backend, residual, membrane, spec, num_steps, memory_format, device, poisoned):
    shape = SHAPES["wide" if memory_format is torch.channels_last else "narrow"]
    Case(shape, num_steps, torch.float32, device, memory_format, residual, True, True, membrane, spec).check(2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("affine", "batch"), [(True, False), (False, True), (False, False)])
def test_dtypes_affine_and_frozen_statistics(backend, affine, batch, shape, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 always runs as plain PyTorch")
    spec = LIFSpec(surrogate="atan", reset="soft")
    case = Case(shape, 3, dtype, device, torch.channels_last, True, affine, batch, True, spec)
    case.check(TOLERANCE[dtype] if batch or dtype != torch.float64 else 1e-6)  # the given statistics are float32


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("residual", "membrane", "bias"), [(False, False, True), (True, True, True), (True, False, False)]
)
def test_without_normalisation(backend, residual, membrane, bias, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 always runs as plain PyTorch")
    spec = LIFSpec(surrogate="atan")
    case = Case(SHAPES["wide"], 3, dtype, device, torch.channels_last, residual, bias, False, membrane, spec)
    case.stats, case.weight = (None, None), None
    kept = None if case.residual is None else case.residual.detach().clone()
    case.check(TOLERANCE[dtype])
    assert kept is None or torch.equal(case.residual, kept)


def test_smooth_twin_passes_gradcheck():
    x, residual = (torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    spec = LIFSpec(surrogate="sigmoid", width=0.7)

    def smooth(x, residual, weight, bias):
        return norm_lif_reference(
            x=x,
            mean=x,
            var=x,
            num_steps=2,
            spec=spec,
            weight=weight,
            bias=bias,
            residual=residual,
            batch_stats=True,
            return_membrane=True,
            smooth=True,
        )

    assert torch.autograd.gradcheck(smooth, (x, residual, weight, bias), atol=1e-6)


def test_twice_the_same_bits(backend, device):
    case = Case(SHAPES["wide"], 4, torch.float32, device, torch.channels_last, True, True, True, True, CIFAR)
    first, second = case.grads(norm_lif), case.grads(norm_lif)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(batch_stats(case.x), case.stats, strict=True))


@pytest.mark.parametrize("used", ["spikes", "membrane"])
def test_gradient_through_one_output_only(backend, used, device):
    case = Case(SHAPES["narrow"], 4, torch.float32, device, torch.channels_last, True, True, True, True, CIFAR)

    def grads(function):
        out = function(
            case.x,
            *case.stats,
            4,
            CIFAR,
            weight=case.weight,
            bias=case.bias,
            residual=case.residual,
            batch_stats=True,
            return_membrane=True,
        )[used == "spikes"]
        return torch.autograd.grad(out, (case.x, case.residual, case.weight, case.bias), case.grad_spikes)

    actual = grads(norm_lif)
    with use_backend("eager"):
        expected = grads(norm_lif_reference)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(37, 5, 3, 4), (9, 130, 7, 5), (2, 3, 1, 1)], ids=str)
def test_batch_stats_are_those_of_batch_norm(backend, shape, dtype, memory_format, device, poisoned):
    x = torch.randn(shape, device=device).add(100).to(dtype).contiguous(memory_format=memory_format)
    norm = nn.BatchNorm2d(shape[1], momentum=0.3, device=device)
    running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    batches = norm.num_batches_tracked.clone()
    mean, var = batch_stats(
        x=x,
        running_mean=running_mean,
        running_var=running_var,
        momentum=0.3,
        num_batches=batches,
    )
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    norm(x.float())
    torch.testing.assert_close(running_mean, norm.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(running_var, norm.running_var, rtol=2e-5, atol=1e-6)
    assert torch.equal(batches, norm.num_batches_tracked)


def test_running_statistics_beyond_their_dtype_are_not_taken(backend, device):
    x = torch.randn(8, 3, 4, 4, device=device)
    x[:, 1] *= 1e3  # whose variance float16 does not hold
    x[0, 2] = torch.nan
    before = torch.full((3,), 4e4, dtype=torch.float16, device=device)  # nor the sum of two of these
    running = before.clone(), before.clone()
    batch_stats(x, *running, momentum=0.5)
    for values in running:
        assert values.ne(before).tolist() == [True, False, False]


def test_strided_inputs_are_brought_into_line(backend, device):
    x = torch.randn(4, 5, 8, 6, device=device)[..., ::2, 1:4]
    residual = torch.randn(4, 1, 4, 1, device=device).expand(4, 5, 4, 3)
    mean, var = batch_stats(x)
    spikes = norm_lif(x, mean, var, 2, residual=residual, batch_stats=True)
    torch.testing.assert_close(spikes, norm_lif_reference(x, mean, var, 2, residual=residual, batch_stats=True))


def test_no_samples_is_no_error(backend, device):
    x = torch.randn(0, 3, 2, 2, device=device, requires_grad=True)
    stat, weight = torch.ones(3, device=device), torch.ones(3, device=device, requires_grad=True)
    norm_lif(x, stat, stat, 4, weight=weight, bias=stat).sum().backward()
    assert x.grad.shape == x.shape and weight.grad.eq(0).all()


def test_opcheck(backend, device):
    case = Case(SHAPES["narrow"], 2, torch.float32, device, torch.channels_last, True, True, True, True, CIFAR)
    norm = (case.weight, case.bias, *case.stats, None, 1e-5)
    bias_alone = (None, case.bias, None, None, None, 0.0)
    for residual, of_norm, batch in (
        (case.residual, norm, True),
        (None, norm, False),
        (case.residual, bias_alone, False),
    ):
        args = (case.x, residual, *of_norm, 2, *CIFAR.op_arguments, batch, batch, "")
        torch.library.opcheck(torch.ops.gac_kernels.norm_lif, args)
    running = torch.zeros(5, device=device), torch.ones(5, device=device)
    batches = torch.zeros((), dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.gac_kernels.batch_stats, (case.x.detach(), *running, 0.1, batches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_steps=3), "num_steps"),
        (dict(x=torch.zeros(4, 3)), "axes"),
        (dict(x=torch.zeros(4, 3, 2, 2, dtype=torch.int32)), "convert"),
        (dict(mean=torch.zeros(2)), "mean of shape"),
        (dict(weight=torch.ones(3)), "weight and bias"),
        (dict(var=None), "mean and var both or neither"),
        (dict(mean=None, var=None, weight=torch.ones(3), bias=torch.ones(3)), "or a bias alone"),
        (dict(mean=None, var=None, batch_stats=True), "or a bias alone"),
        (dict(residual=torch.zeros(4, 3, 2, 1)), "residual of shape"),
        (dict(residual=torch.zeros(4, 3, 2, 2, dtype=torch.float64)), "residual of shape"),
        (dict(spec="cifar"), "LIFSpec"),
    ],
)
def test_bad_input_is_a_sentence(change, message):
    arguments = dict(x=torch.zeros(4, 3, 2, 2), mean=torch.zeros(3), var=torch.ones(3), num_steps=2) | change
    with pytest.raises(ValueError, match=message):
        norm_lif(**arguments)


def test_statistics_of_one_value_are_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_stats(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="both or neither"):
        batch_stats(torch.zeros(2, 3, 1, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="one int64 value"):
        batch_stats(torch.zeros(2, 3, 1, 1), num_batches=torch.zeros(()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 30 GiB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    """The last rows of 2**31 + 2**20 elements come out as the same rows alone do."""
    channels, rows = 1024, 2**21 + 1024
    x = torch.zeros(rows, channels, 1, 1, dtype=torch.bfloat16, device=device)
    tail = torch.randn(1024, channels, 1, 1, device=device).bfloat16()
    x[-1024:] = tail
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    x.requires_grad_(), tail.requires_grad_()
    weight, bias = mean.clone().requires_grad_(), var.clone()
    grads = []
    for current in (x, tail):
        spikes = norm_lif(current, mean, var, 1, weight=weight + 1, bias=bias)
        (grad,) = torch.autograd.grad(spikes, current, torch.ones_like(spikes))
        grads.append((spikes[-1024:], grad[-1024:]))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    mean, _ = batch_stats(x)
    torch.testing.assert_close(mean, tail.float().sum((0, 2, 3)) / rows, rtol=1e-3, atol=1e-7)
