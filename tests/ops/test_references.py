"""Each public op has a plain PyTorch twin with its signature, and gives what the twin gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gac_kernels
from compare import assert_close, assert_matches
from gac_kernels import CIFAR, IMAGENET, LIFSpec, ResidualNorm, pack_spikes

OPS = [name for name in gac_kernels.__all__ if f"{name}_reference" in gac_kernels.__all__]
EXTRA = {"smooth", "dtype"}  # of a reference alone
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "strided": None}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# T, B, C, H, W: odd sizes, nine steps for a second byte, one pixel. Small, since most of them run in an interpreter.
SHAPES = [(3, 2, 3, 5, 3), (9, 1, 5, 1, 3), (1, 3, 7, 1, 1)]


def pair(name: str) -> tuple[Callable, Callable]:
    return getattr(gac_kernels, name), getattr(gac_kernels, f"{name}_reference")


def frames(shape, dtype, layout, device, spikes=False) -> Tensor:
    """(T*B, C, H, W), random or spikes; ``strided`` views every second column of a tensor."""
    num_steps, batch, channels, height, width = shape
    size = (num_steps * batch, channels, height, width * (2 if layout is None else 1))
    x = torch.randn(size, device=device)
    x = (x > 0.3).to(dtype) if spikes else x.to(dtype)
    return x[..., ::2] if layout is None else x.contiguous(memory_format=layout)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, backend):
    if request.param == torch.float64 and backend == "triton":
        pytest.skip("float64 always runs as plain PyTorch")
    return request.param


def check(name: str, inputs: list[Tensor], *arguments: object, exact: bool = False, **keywords: object) -> None:
    """Outputs and the gradient at each input, which an op sees with the strides given here."""
    op, reference = pair(name)
    views = [lambda leaf, like=like: leaf.as_strided(like.shape, like.stride()) for like in inputs]
    leaves = [torch.empty(like.untyped_storage().nbytes() // like.element_size(), dtype=like.dtype) for like in inputs]
    leaves = [leaf.to(like.device).normal_() for leaf, like in zip(leaves, inputs, strict=True)]
    for leaf, view, like in zip(leaves, views, inputs, strict=True):
        view(leaf).copy_(like)

    def call(function: Callable) -> Callable:
        def run(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
            viewed = [view(leaf) for view, leaf in zip(views, leaves, strict=True)]
            return function(*viewed, *arguments, **keywords)

        return run

    assert_matches(call(op), call(reference), leaves, exact)


def assert_same_arguments(op: Callable, reference: Callable) -> None:
    mine, theirs = (inspect.signature(function).parameters for function in (op, reference))
    assert set(theirs) - set(mine) <= EXTRA
    shared = [parameter for name, parameter in theirs.items() if name in mine]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in mine.values()]


def test_every_op_has_a_twin() -> None:
    registered = {name for name in gac_kernels.__all__ if hasattr(torch.ops.gac_kernels, name)}
    assert len(OPS) == 17 and registered | {"gac_encode"} == set(OPS)  # gac_encode is gated_lif of a static input
    for name in OPS:
        assert_same_arguments(*pair(name))


def test_another_signature_is_seen() -> None:
    def reference(x: Tensor, spec: LIFSpec = CIFAR, state: None = None) -> None: ...

    with pytest.raises(AssertionError):
        assert_same_arguments(gac_kernels.lif, reference)


@pytest.mark.parametrize("rectify", [False, True])
def test_pad_frames(backend, dtype, shape, layout, rectify, device, poisoned) -> None:
    check("pad_frames", [frames(shape, dtype, layout, device)], 1, 2, rectify, exact=True)


def test_pool_frames(backend, dtype, shape, layout, device, poisoned) -> None:
    check("pool_frames", [frames(shape, dtype, layout, device)])


def test_firing_rate(backend, dtype, shape, layout, device, poisoned) -> None:
    x = frames(shape, dtype, layout, device, spikes=True)
    check("firing_rate", [x], shape[0])
    op, reference = pair("firing_rate")
    for spikes, asked in ((x.to(torch.int8), None), (x.to(torch.int8), dtype), (x, torch.float32)):
        assert_close("rate", op(spikes, shape[0], asked), reference(spikes, shape[0], asked))


def test_count_spikes(backend, dtype, shape, layout, device) -> None:
    op, reference = pair("count_spikes")
    x = frames(shape, dtype, layout, device, spikes=True)
    for values, real in ((x, False), (-x.to(torch.int8), False), (x * 0.5, True)):
        mine, theirs = (
            (torch.ones(shape, device=device)[:, 0].contiguous(), torch.zeros((), dtype=torch.bool, device=device))
            for _ in range(2)
        )
        op(values, shape[0], *mine), reference(values, shape[0], *theirs)
        assert torch.equal(mine[0], theirs[0]) and mine[1].item() is theirs[1].item() is (real and bool(x.any()))


def test_spikes_as_bits(backend, dtype, shape, layout, device, poisoned) -> None:
    spikes = frames(shape, dtype, layout, device, spikes=True)
    op, reference = pair("pack_spikes")
    bits = reference(spikes, shape[0])
    assert torch.equal(op(spikes, shape[0]), bits)
    op, reference = pair("unpack_spikes")
    assert torch.equal(reference(bits, shape[0], dtype), spikes)
    view = bits.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(op(view, shape[0], dtype), spikes)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 5)])
def test_packed_conv2d(backend, dtype, stride, groups, layout, device) -> None:
    shape = (3, 2, 5, 7, 3)
    spikes = frames(shape, dtype, layout, device, spikes=True)
    weight = torch.randn(10, 5 // groups, 3, 3, device=device).to(dtype)
    bits = pack_spikes(spikes, 3)
    op, reference = pair("packed_conv2d")
    rest = (3, (stride, 1), (1, 2), (1, 1), groups)
    assert_matches(lambda x, w: op(x, bits, w, *rest), lambda x, w: reference(x, bits, w, *rest), [spikes, weight])


def test_batch_stats(backend, dtype, layout, device, poisoned) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    x = frames((3, 2, 5, 7, 3), dtype, layout, device)
    for function in pair("batch_stats"):
        running = torch.full((5,), 0.25, dtype=wide, device=device), torch.full((5,), 2.0, dtype=wide, device=device)
        batches = torch.tensor(3, device=device)
        results.append([*function(x, *running, 0.3, batches), *running, batches, *function(x)])
    assert results[0][4].item() == results[1][4].item() == 4
    for index, (mine, theirs) in enumerate(zip(*results, strict=True)):
        if index != 4:
            assert not mine.requires_grad
            assert_close(f"statistic {index}", mine, theirs)


@pytest.mark.parametrize(("batch", "keep"), [(True, True), (True, False), (False, True)])
def test_norm_lif_with_a_normed_residual_and_bits(backend, batch, keep, layout, device, poisoned) -> None:
    shape = SHAPES[0]
    op, reference = pair("norm_lif")
    channels = shape[2]
    x, residual = (frames(shape, torch.float32, layout, device) + offset for offset in (0.5, -1.0))
    parts = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
    stats = [(torch.zeros_like(parts[0]), parts[0])] * 2
    if batch:
        stats = [gac_kernels.batch_stats(tensor) for tensor in (x, residual)]

    def call(function: Callable) -> Callable:
        def run(x, residual, weight, bias, res_weight, res_bias):
            *found, bits = function(
                x,
                *stats[0],
                shape[0],
                LIFSpec(surrogate="atan"),
                weight=weight,
                bias=bias,
                residual=residual,
                batch_stats=batch,
                return_membrane=keep,
                residual_norm=ResidualNorm(*stats[1], res_weight, res_bias),
                return_bits=True,
            )
            packed.append(bits)
            return tuple(found)

        return run

    packed: list[Tensor] = []
    assert_matches(call(op), call(reference), [x, residual, *parts])
    assert torch.equal(*packed)


def test_integer_lif(backend, dtype, shape, layout, device, poisoned) -> None:
    op, reference = pair("integer_lif")
    x = frames(shape, dtype, layout, device) + 0.5
    spikes = reference(x, shape[0], IMAGENET)
    assert spikes.dtype == torch.int8 and 0.1 < spikes.float().mean() < 0.99
    assert torch.equal(op(x, shape[0], IMAGENET), spikes)


def test_a_reference_compiles_to_one_graph_with_its_gradient(device) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 4, device=device, requires_grad=True)
    op = gac_kernels.lif_reference
    values = [compiled(x) for compiled in (op, torch.compile(op, backend="aot_eager", fullgraph=True))]
    torch._dynamo.reset()
    assert torch.equal(*values)
    assert torch.equal(*[torch.autograd.grad(spikes.sum(), x)[0] for spikes in values])


@pytest.mark.parametrize(("residual", "shortcut_stride"), [(False, 0), (True, 0), (True, 1), (True, 2)])
def test_conv_lif(dtype, residual, shortcut_stride, layout, device, poisoned) -> None:
    """Of a 16-bit current that is rounded on the way, a spike in a hundred may differ."""
    op, reference = pair("conv_lif")
    x = frames((3, 2, 16, 7, 5), dtype, layout, device, spikes=True)
    weight = (torch.randn(24, 16, 3, 3, device=device) / 8).to(dtype)
    bias = torch.randn(24, device=device, dtype=torch.promote_types(dtype, torch.float32)) * 0.3 + 0.3
    keywords: dict[str, Tensor] = {}
    if residual:
        size = (3, 2, 16, 4 * shortcut_stride, 3 * shortcut_stride) if shortcut_stride else (3, 2, 24, 4, 3)
        keywords["residual"] = frames(size, dtype, layout, device)
    if shortcut_stride:
        keywords["shortcut"] = (torch.randn(24, 16, 1, 1, device=device) / 4).to(dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        current, spikes = op(x, weight, bias, 3, stride=2, return_membrane=True, **keywords)
        alone = op(x, weight, bias, 3, stride=2, **keywords)
    expected_current, expected = reference(x, weight, bias, 3, stride=2, return_membrane=True, **keywords)
    assert torch.equal(reference(x, weight, bias, 3, stride=2, **keywords), expected)
    assert 0.1 < expected.float().mean() < 0.9
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert current.dtype == expected_current.dtype == spikes.dtype == dtype
    assert (current - expected_current).double().norm() <= tolerance * expected_current.double().norm()
    differ = 0 if dtype in (torch.float32, torch.float64) else 3e-2
    assert (spikes != expected).float().mean() <= differ and (alone != expected).float().mean() <= differ
