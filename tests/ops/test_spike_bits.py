"""Spikes as bits: packing, the packed convolution, and both inside norm_lif."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gac_kernels import (
    CIFAR,
    LIFSpec,
    ResidualNorm,
    batch_stats,
    norm_lif,
    norm_lif_reference,
    pack_spikes,
    packed_conv2d,
    unpack_spikes,
)

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def spikes_of(num_steps: int, device, dtype=torch.float32, memory_format=torch.channels_last) -> Tensor:
    x = torch.randn(num_steps * 3, 5, 4, 3, device=device)
    return (x > 0).to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("num_steps", [1, 4, 8, 9, 17])
def test_bits_are_the_spikes(backend, num_steps, memory_format, device, poisoned):
    spikes = spikes_of(num_steps, device, torch.bfloat16, memory_format)
    bits = pack_spikes(spikes, num_steps)
    frames = spikes.unflatten(0, (num_steps, 3)).long()
    for group, found in enumerate(bits.unflatten(0, (-1, 3)).long()):
        expected = sum(frames[t] << (t - 8 * group) for t in range(8 * group, min(8 * group + 8, num_steps)))
        assert torch.equal(found, expected)
    assert bits.dtype == torch.uint8 and len(bits) == 3 * -(-num_steps // 8)
    again = unpack_spikes(bits, num_steps, torch.bfloat16)
    assert torch.equal(again, spikes) and again.stride() == spikes.stride()


@pytest.mark.parametrize("num_steps", [2, 10])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_norm_lif_packs_what_it_fires(backend, num_steps, memory_format, device, poisoned):
    x = torch.randn(num_steps * 2, 7, 5, 3, device=device).contiguous(memory_format=memory_format)
    mean, var = batch_stats(x)
    spikes, bits = norm_lif(x, mean, var, num_steps, batch_stats=True, return_bits=True)
    assert spikes.mean() > 0.05 and torch.equal(bits, pack_spikes(spikes, num_steps))
    assert torch.equal(spikes, norm_lif(x, mean, var, num_steps, batch_stats=True))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 5)])
def test_packed_convolution_is_the_convolution_to_the_bit(backend, stride, groups, memory_format, device):
    spikes = spikes_of(4, device, memory_format=memory_format).requires_grad_()
    weight = torch.randn(10, 5 // groups, 3, 3, device=device).contiguous(memory_format=memory_format).requires_grad_()
    bits = pack_spikes(spikes, 4)
    plain = F.conv2d(spikes, weight, None, stride, 1, 1, groups)
    packed = packed_conv2d(
        spikes=spikes,
        bits=bits,
        weight=weight,
        num_steps=4,
        stride=(stride, stride),
        padding=(1, 1),
        groups=groups,
    )
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (spikes, weight), upstream)
    found = torch.autograd.grad(packed, (spikes, weight), upstream)
    assert torch.equal(packed, plain) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_opcheck(backend, device):
    ops, spikes = torch.ops.gac_kernels, spikes_of(3, device)
    bits, weight = pack_spikes(spikes, 3), torch.randn(4, 5, 3, 3, device=device, requires_grad=True)
    torch.library.opcheck(ops.pack_spikes, (spikes, 3))
    torch.library.opcheck(ops.unpack_spikes, (bits, 3, torch.float16))
    torch.library.opcheck(
        ops.packed_conv2d, (spikes.requires_grad_(), bits, weight, 3, [1, 1], [1, 1], [1, 1], 1), rtol=1e-5, atol=1e-5
    )
    x, residual = (torch.randn(6, 5, 4, 3, device=device, requires_grad=True) for _ in range(2))
    of_x, of_residual = (batch_stats(tensor) for tensor in (x, residual))
    w, b = (torch.rand(5, device=device, requires_grad=True) for _ in range(2))
    neuron = CIFAR.op_arguments
    args = (x, residual, w, b, *of_x, None, 1e-5, 2, *neuron, True, True, "", w, b, *of_residual, 1e-5, True)
    torch.library.opcheck(ops.norm_lif, args)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(("keep", "affine", "batch"), [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("num_steps", [3, 9])
def test_normed_residual_is_a_norm_before(backend, num_steps, keep, affine, batch, memory_format, device, poisoned):
    spec = LIFSpec(surrogate="atan")
    shape = (num_steps * 2, 130 if memory_format is torch.channels_last else 5, 4, 3)
    leaves, twins = [], []
    for scale in (1.0, 3.0):
        x = (torch.randn(shape, device=device) * scale + 1).contiguous(memory_format=memory_format)
        leaves += [x, torch.rand(shape[1], device=device) + 0.5, torch.randn(shape[1], device=device) * 0.3]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = [torch.randn(shape, device=device) for _ in range(1 + keep)]
    stats = [batch_stats(x) if batch else (torch.full_like(leaves[1], 0.9), leaves[1].detach()) for x in leaves[::3]]

    x, weight, bias, residual, res_weight, res_bias = leaves
    of_norms = ((weight, bias), (res_weight, res_bias)) if affine else ((None, None), (None, None))
    out = norm_lif(
        x,
        *stats[0],
        num_steps,
        spec,
        weight=of_norms[0][0],
        bias=of_norms[0][1],
        residual=residual,
        batch_stats=batch,
        return_membrane=keep,
        residual_norm=ResidualNorm(*stats[1], *of_norms[1]),
    )
    out = list(out) if keep else [out]
    x, weight, bias, residual, res_weight, res_bias = twins
    if not affine:
        weight = bias = res_weight = res_bias = None
    mean, var = (s.double() for s in stats[1])
    normed = F.batch_norm(residual, mean.clone(), var.clone(), res_weight, res_bias, batch, 0.0)
    first = (s.double() for s in stats[0])
    expected = norm_lif_reference(
        x, *first, num_steps, spec, weight=weight, bias=bias, residual=normed, batch_stats=batch, return_membrane=keep
    )
    expected = list(expected) if keep else [expected]
    assert torch.equal(out[-1].double(), expected[-1]) and expected[-1].mean() > 0.05
    inputs = [0, 3] if not affine else range(6)
    found = torch.autograd.grad(out, [leaves[i] for i in inputs], upstream)
    wanted = torch.autograd.grad(expected, [twins[i] for i in inputs], [g.double() for g in upstream])
    for a, b in zip([*out[:-1], *found], [*expected[:-1], *wanted], strict=True):
        assert (a.double() - b).norm() <= 3e-6 * b.norm()


def test_bad_input_is_a_sentence():
    spikes, weight = torch.zeros(4, 3, 2, 2), torch.zeros(2, 3, 1, 1)
    bits, stat = pack_spikes(spikes, 2), torch.ones(3)
    calls = {
        "divides the first axis": lambda: pack_spikes(spikes, 3),
        "bits as uint8": lambda: unpack_spikes(spikes, 2),
        "make them of these spikes": lambda: packed_conv2d(spikes, bits[:1], weight, 2),
        "the weight in": lambda: packed_conv2d(spikes, bits, weight.double(), 2),
        "a residual with mean and var": lambda: norm_lif(spikes, stat, stat, 2, residual_norm=ResidualNorm(stat, stat)),
        "both norms or for neither": lambda: norm_lif(
            spikes, stat, stat, 2, residual=spikes, residual_norm=ResidualNorm(stat, stat, stat, stat)
        ),
        "residual norm's tensors": lambda: norm_lif(
            spikes, stat, stat, 2, residual=spikes, residual_norm=ResidualNorm(stat, torch.ones(2))
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
