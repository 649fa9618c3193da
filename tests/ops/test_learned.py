"""Decay and threshold as tensors: values, gradients and errors against the references, in every op that trains."""

from __future__ import annotations

import pytest
import torch

import gac_kernels
from compare import assert_matches, gate_inputs
from gac_kernels import (
    CIFAR,
    IMAGENET,
    LIFSpec,
    ResidualNorm,
    batch_stats,
    lif,
    lif_reference,
    norm_lif,
    norm_lif_reference,
    use_backend,
)
from gac_kernels.neuron import learned
from gac_kernels.spec import SURROGATES

BACKENDS = ["eager", "triton"]
SPECS = [
    *(
        LIFSpec(surrogate=s, width=0.7, reset=r, detach_reset=d)
        for s, r, d in zip(SURROGATES, ("hard", "soft", "hard", "soft"), (False, False, True, True), strict=True)
    ),
    IMAGENET,
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def values(channels: int, seed: int = 3) -> torch.Tensor:
    """A decay and a threshold of each channel, or one of each: one leaf, since a lone sum can cancel to nothing."""
    both = torch.rand(2, channels, generator=torch.Generator().manual_seed(seed))
    return both * torch.tensor([[0.8], [1.0]]) + torch.tensor([[0.1], [0.4]])


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "batch_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_smooth_twin_passes_gradcheck(surrogate, reset):
    spec = LIFSpec(surrogate=surrogate, reset=reset, width=0.7)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for channels in (1, 3):
        leaves = [v.double().clone().requires_grad_() for v in (x, x[0] + 0.1, values(channels))]
        assert torch.autograd.gradcheck(
            lambda x, v, n: lif_reference(x, spec, v, True, smooth=True, decay=n[0], threshold=n[1]), leaves, atol=1e-6
        )


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.surrogate}-{s.reset}-{s.detach_reset}")
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(("num_steps", "layout"), [(4, "channels_last"), (11, "contiguous"), (3, "batch_major")])
def test_lif(backend, spec, channels, num_steps, layout, device, poisoned):
    x = LAYOUTS[layout](torch.randn(num_steps, 3, 5, 7, 2, device=device) * 1.5)
    inputs = [x, torch.randn(x.shape[1:], device=device), values(channels).to(device)]
    assert_matches(
        lambda x, v, n: lif(x, spec, v, True, decay=n[0], threshold=n[1]),
        lambda x, v, n: lif_reference(x, spec, v, True, decay=n[0], threshold=n[1]),
        inputs,
    )


@pytest.mark.parametrize("frame", [(29, 37), (64, 33), (3, 3)], ids=str)
@pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
def test_tiles_of_contiguous_samples(spec, frame, device, poisoned):
    """Samples that need several tiles, samples of which a tile has several, and both."""
    x = torch.randn(4, 3, 2, *frame, device=device)
    with use_backend("triton"):
        assert_matches(
            lambda x, n: lif(x, spec, decay=n[0], threshold=n[1]),
            lambda x, n: lif_reference(x, spec, decay=n[0], threshold=n[1]),
            [x, values(2).to(device)],
        )


def test_pixels_of_a_tile():
    """A power of two that leaves at most an eighth of a tile unused, where there is one."""
    found = {pixels: learned._pixels(pixels, 1024) for pixels in (4, 16, 49, 64, 196, 784, 1024, 1073, 3136, 50176)}
    assert found == {4: 4, 16: 16, 49: 64, 64: 64, 196: 16, 784: 64, 1024: 1024, 1073: 128, 3136: 256, 50176: 1024}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_products_with_a_decay_round_as_in_the_reference(backend, layout, device):
    """Neurons that a fused multiply-add would move over the threshold, or over the edge of a rectangle.

    Each channel has a decay d and inputs v, c of its own. The threshold is the membrane d * v + c as two roundings give
    it, which does not fire; then half less, so that the membrane lies just outside of a rectangle half as wide.
    """
    make = torch.Generator().manual_seed(0)
    d, v, c = (torch.rand(2**14, generator=make) for _ in range(3))
    d, v, c = 0.1 + 0.8 * d, 0.4 * v, 1.0 + c / 2
    fused = (d.double() * v.double() + c.double()).float()
    moved = torch.cat([where.nonzero()[:100, 0] for where in (fused > d * v + c, fused < d * v + c)])
    assert len(moved) == 200
    d, v, c = d[moved], v[moved], c[moved]
    membrane = d * v + c
    spec = LIFSpec(surrogate="rectangle", width=0.5)
    x = torch.stack((v, c)).view(2, 1, -1, 1, 1).expand(2, 2, -1, 4, 4).to(device)
    x = LAYOUTS[layout](x.contiguous()).requires_grad_()
    spikes = lif(x, spec, decay=d.to(device), threshold=membrane.to(device))
    assert not spikes.any()
    spikes = lif(x, spec, decay=d.to(device), threshold=(membrane - 0.5).to(device))
    assert spikes[1].all() and not spikes[0].any()
    assert not torch.autograd.grad(spikes[1].sum(), x)[0].any()


NORMS = {"alone": (False, False), "residual": (True, False), "normed residual": (True, True)}


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda s: f"{s.surrogate}-{s.reset}-{s.detach_reset}")
@pytest.mark.parametrize(
    ("num_steps", "layout", "kind"),
    [
        (4, "channels_last", "alone"),
        (11, "contiguous", "alone"),
        (4, "contiguous", "residual"),
        (11, "channels_last", "normed residual"),
    ],
)
def test_norm_lif(backend, spec, num_steps, layout, kind, device, poisoned):
    """Values of channels, a decay of the whole layer in one case, batch statistics, with and without a residual."""
    with_residual, normed = NORMS[kind]
    x, residual = (LAYOUTS[layout](torch.randn(num_steps, 3, 5, 4, 2, device=device)).flatten(0, 1) for _ in range(2))
    inputs = [x, *values(5, seed=1), values(5), *([residual] if with_residual else [])]
    inputs = [v.to(device) for v in inputs]

    def run(op, x, weight, bias, neuron, residual=None):
        mean, var = batch_stats(x)
        of_residual = ResidualNorm(*batch_stats(residual), weight + 0.5, bias) if normed else None
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
            return_membrane=with_residual,
            residual_norm=of_residual,
            decay=neuron[0, :1] if normed else neuron[0],
            threshold=neuron[1],
        )

    assert_matches(lambda *a: run(norm_lif, *a), lambda *a: run(norm_lif_reference, *a), inputs)


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda s: f"{s.surrogate}-{s.reset}-{s.detach_reset}")
@pytest.mark.parametrize(
    ("op", "num_steps", "static", "channels", "layout"),
    [
        ("gac_encode", 4, True, 5, "channels_last"),
        ("gated_lif", 11, False, 5, "contiguous"),
        ("gac_fire", 4, True, 5, "contiguous"),
        ("gac_fire", 3, False, 1, "channels_last"),
        ("gac_fire", 9, False, 5, "channels_last"),
    ],
)
def test_encoder(backend, spec, op, num_steps, static, channels, layout, device, poisoned):
    stem, spatial, temporal = gate_inputs((2, 5, 7, 3), num_steps, torch.float32, device, static=static)
    if layout == "channels_last":
        stem, spatial = (v.movedim(-3, -1).contiguous().movedim(-1, -3) for v in (stem, spatial))
    inputs = [stem, spatial, temporal, values(channels)]
    if op == "gac_fire":
        inputs[3] = torch.cat((inputs[3], values(channels, seed=5) * 0.8))
    names = ("decay", "threshold", "second_decay", "second_threshold")

    def run(name, stem, spatial, temporal, neurons):
        given = dict(zip(names, neurons, strict=False))
        return getattr(gac_kernels, name)(stem, spatial, temporal, spec, **given)

    inputs = [v.to(device) for v in inputs]
    assert_matches(lambda *a: run(op, *a), lambda *a: run(f"{op}_reference", *a), inputs)


def test_one_of_several_neurons_alone(backend, device):
    """The neuron that is not given keeps the spec's numbers; one element goes with one a channel."""
    inputs = [v.to(device) for v in (*gate_inputs((2, 5, 4, 3), 4, torch.float32, device), values(5))]

    def run(name, stem, spatial, temporal, n):
        return getattr(gac_kernels, name)(
            stem, spatial, temporal, IMAGENET, second_decay=n[0, 0], second_threshold=n[1]
        )

    assert_matches(lambda *a: run("gac_fire", *a), lambda *a: run("gac_fire_reference", *a), inputs)


def case_lif(spec, x, neuron, **options):
    return lif(x, spec, decay=neuron[0], threshold=neuron[1], **options)


def test_values_of_the_spec_change_nothing(backend, device):
    """Decays and thresholds equal to the spec's give its spikes to the bit, and its gradient at x."""
    for spec in (CIFAR, IMAGENET):
        x = torch.randn(4, 3, 5, 4, device=device, requires_grad=True)
        neuron = torch.tensor([[spec.decay], [spec.threshold]], device=device).expand(2, 5)
        fixed, learned = lif(x, spec), case_lif(spec, x, neuron)
        assert torch.equal(fixed, learned)
        grad = torch.randn_like(fixed)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (fixed, learned)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(backend, dtype, device):
    """The neuron's gradients stay in its own dtype."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    x = torch.randn(6, 3, 5, 4, device=device).to(dtype)
    assert_matches(
        lambda x, n: case_lif(CIFAR, x, n),
        lambda x, n: lif_reference(x, CIFAR, decay=n[0], threshold=n[1]),
        [x, values(5).to(device, torch.float64 if dtype == torch.float64 else torch.float32)],
    )


def test_gradients_are_the_same_bits_every_time(backend, device):
    x, neuron = torch.randn(4, 8, 5, 6, device=device), values(5).to(device).requires_grad_()
    grads = [torch.autograd.grad(case_lif(CIFAR, x, neuron).sum(), neuron)[0] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("op", ["lif", "norm_lif", "gated_lif", "gac_fire"])
def test_opcheck_and_second_derivatives(op, backend, device):
    """The operator's own checks; and gradients of gradients, which run as the definition."""
    neuron = values(3).to(device)
    x = torch.randn(4, 2, 3, 2, 2, device=device, requires_grad=True)
    spec = LIFSpec(surrogate="atan").op_arguments
    gate = [v.requires_grad_() for v in gate_inputs((2, 3, 2, 2), 4, torch.float32, device)]
    per_channel = [v.to(device).requires_grad_() for v in values(3, seed=1)]
    args = {
        "lif": lambda n: (x, None, *spec, True, True, n),
        "norm_lif": lambda n: (
            *(x.flatten(0, 1), None, *per_channel, *(v.detach() for v in per_channel), None, 1e-5, 4, *spec),
            *(True, False, "", None, None, None, None, 0.0, False, n),
        ),
        "gated_lif": lambda n: (*gate, *spec, n),
        "gac_fire": lambda n: (*gate, False, *spec, torch.cat((n, n))),
    }[op]
    function = getattr(torch.ops.gac_kernels, op)
    torch.library.opcheck(function.default, args(neuron.clone().requires_grad_()))
    leaf = neuron.clone().requires_grad_()
    outputs = (
        [y for y in function(*args(leaf)) if y.is_floating_point()] if op != "gated_lif" else [function(*args(leaf))]
    )
    (first,) = torch.autograd.grad(sum(y.square().sum() for y in outputs if y.requires_grad), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert second.isfinite().all() and second.abs().sum() > 0


@pytest.mark.parametrize(
    ("decay", "threshold", "message"),
    [
        (0.0, 1.0, "expected decays between 0 and 1, got 0"),
        (1.0, 1.0, "expected decays between 0 and 1, got 1"),
        (float("nan"), 1.0, "expected decays between 0 and 1, got nan"),
        (0.5, 0.0, "expected finite thresholds > 0, got 0"),
        (torch.full((4,), 0.5), 1.0, r"expected decay with one element or shape \(3,\), got \(4,\)"),
        (torch.tensor(1), 1.0, "expected decay as a floating tensor, got torch.int64"),
        (torch.tensor(0.5, device="meta"), 1.0, "expected decay on cpu, got meta"),
        (0.5, "1.0", "expected threshold to be a tensor"),
    ],
)
def test_bad_values_are_named(decay, threshold, message):
    given = [torch.tensor(v) if isinstance(v, float) else v for v in (decay, threshold)]
    x = torch.randn(4, 2, 3, 2, 2)
    names = dict(zip(("decay", "threshold"), given, strict=True))
    ones = torch.ones(3)
    for call in (
        lambda: lif(x, **names),
        lambda: norm_lif(x.flatten(0, 1), ones, ones, 4, **names),
        lambda: gac_kernels.gac_encode(x[0], x[1], torch.zeros(2, 4), **names),
        lambda: gac_kernels.gac_fire(x[0], x[1], torch.zeros(2, 4), **names),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="no channel axis"):
        lif(torch.ones(4, 3), decay=torch.full((3,), 0.5))
