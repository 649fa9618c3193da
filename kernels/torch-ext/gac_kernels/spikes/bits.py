"""Spikes as bits, ``byte = sum_t spike[t] << t`` of up to eight steps a byte, and a convolution that keeps these alone.

A convolution needs its input once more in the backward pass, for the gradient at its weight. An input of spikes is kept
here in one byte a pixel and channel for eight steps, where bfloat16 takes sixteen, and is unpacked into a temporary
tensor when its turn comes. The values that come out are those that went in, so the gradients are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import resolve_backend
from ..checks import DTYPES, check_bits, check_current, check_integer, check_steps, check_tensor
from ..common.fake import register_fake
from ..common.layout import on_device
from ..common.messages import shown
from ..common.tiles import dense
from ..common.triton import cdiv, tl, triton
from ..derivatives import register_derivatives
from ..tuning import launch_config

STEPS_PER_BYTE = 8


@triton.jit
def _pack_kernel(x_ptr, bits_ptr, frame, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < frame
    frame = tl.cast(frame, tl.int64)
    for first in tl.static_range(0, T, 8):
        bits = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(0, 8):
            if first + k < T:
                x = tl.load(x_ptr + i + (first + k) * frame, mask=inside, other=0.0).to(tl.float32)
                bits |= tl.where(x != 0.0, 1 << k, 0)
        tl.store(bits_ptr + i + (first // 8) * frame, bits.to(tl.uint8), mask=inside)


@triton.jit
def _unpack_kernel(bits_ptr, x_ptr, frame, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < frame
    frame = tl.cast(frame, tl.int64)
    for first in tl.static_range(0, T, 8):
        bits = tl.load(bits_ptr + i + (first // 8) * frame, mask=inside, other=0).to(tl.int32)
        for k in tl.static_range(0, 8):
            if first + k < T:
                spike = ((bits >> k) & 1).to(tl.float32)
                tl.store(x_ptr + i + (first + k) * frame, spike.to(x_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, source: Tensor, target: Tensor, num_steps: int) -> None:
    frame = max(source.numel(), target.numel()) // num_steps  # of the spikes, which are more than their bits
    config = launch_config("unpack_spikes", num_steps, 2, source.device)
    with on_device(source):
        kernel[(cdiv(frame, config["BLOCK"]),)](source, target, frame, T=num_steps, **config)


def empty_bits(spikes: Tensor, num_steps: int) -> Tensor:
    """Unwritten bits of dense spikes (T*B, C, H, W): (ceil(T/8)*B, C, H, W) uint8 in their memory format."""
    count = -(-num_steps // STEPS_PER_BYTE) * (spikes.shape[0] // num_steps)
    return torch.empty_like(spikes[:count], dtype=torch.uint8)


def pack_eager(spikes: Tensor, bits: Tensor, num_steps: int) -> None:
    """Write the bits of spikes in plain PyTorch."""
    for group, target in zip(_groups(spikes, num_steps), _frames(bits, num_steps), strict=True):
        target.zero_()
        for k, spike in enumerate(group):
            target |= (spike != 0).to(torch.uint8) << k


def _unpack_eager(bits: Tensor, spikes: Tensor, num_steps: int) -> None:
    for group, source in zip(_groups(spikes, num_steps), _frames(bits, num_steps), strict=True):
        for k, spike in enumerate(group):
            spike.copy_((source >> k) & 1)


def _groups(spikes: Tensor, num_steps: int) -> tuple[Tensor, ...]:
    """The spikes' steps, eight at a time, (up to 8, B, C, H, W) each."""
    return spikes.unflatten(0, (num_steps, -1)).split(STEPS_PER_BYTE)


def _frames(bits: Tensor, num_steps: int) -> Tensor:
    return bits.unflatten(0, (-(-num_steps // STEPS_PER_BYTE), -1))


def _empty_spikes(bits: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Unwritten spikes (T*B, C, H, W) of dense bits, in their memory format."""
    count = num_steps * (bits.shape[0] // -(-num_steps // STEPS_PER_BYTE))
    # A frame keeps its strides; only the number of frames is another.
    return torch.empty_strided((count, *bits.shape[1:]), bits.stride(), dtype=dtype, device=bits.device)


def unpacked(bits: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Spikes (T*B, C, H, W) of their bits, in the bits' memory format."""
    spikes = _empty_spikes(bits, num_steps, dtype)
    if spikes.numel():
        if resolve_backend(bits.device, dtype) == "triton":
            _launch(_unpack_kernel, bits, spikes, num_steps)
        else:
            _unpack_eager(bits, spikes, num_steps)
    return spikes


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("pack_spikes(Tensor spikes, int num_steps) -> Tensor")
_lib.define("unpack_spikes(Tensor bits, int num_steps, ScalarType dtype) -> Tensor")
_lib.define(
    "packed_conv2d(Tensor spikes, Tensor bits, Tensor weight, int num_steps, int[] stride, int[] padding, "
    "int[] dilation, int groups) -> Tensor"
)
_lib.define(
    "packed_conv2d_backward(Tensor grad, Tensor bits, Tensor weight, int num_steps, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)


@torch.library.impl(_lib, "pack_spikes", "CompositeExplicitAutograd")
def _pack_spikes(spikes, num_steps):
    spikes = dense(spikes)
    bits = empty_bits(spikes, num_steps)
    if spikes.numel():
        if resolve_backend(spikes.device, spikes.dtype) == "triton":
            _launch(_pack_kernel, spikes, bits, num_steps)
        else:
            pack_eager(spikes, bits, num_steps)
    return bits


@register_fake("gac_kernels::pack_spikes", lib=_lib)
def _pack_spikes_fake(spikes, num_steps):
    return empty_bits(dense(spikes), num_steps)


@torch.library.impl(_lib, "unpack_spikes", "CompositeExplicitAutograd")
def _unpack_spikes(bits, num_steps, dtype):
    return unpacked(dense(bits), num_steps, dtype)


@register_fake("gac_kernels::unpack_spikes", lib=_lib)
def _unpack_spikes_fake(bits, num_steps, dtype):
    return _empty_spikes(dense(bits), num_steps, dtype)


def _convolve(spikes, bits, weight, num_steps, stride, padding, dilation, groups):
    return torch.ops.aten.convolution(spikes, weight, None, stride, padding, dilation, False, [0, 0], groups)


torch.library.impl(_lib, "packed_conv2d", "CompositeExplicitAutograd")(_convolve)
register_fake("gac_kernels::packed_conv2d", lib=_lib)(_convolve)


@torch.library.impl(_lib, "packed_conv2d_backward", "CompositeExplicitAutograd")
def _packed_conv2d_backward(grad, bits, weight, num_steps, *geometry_and_needs: Any):
    *_, need_weight = geometry_and_needs
    # The gradient at the input asks for the spikes' shape and layout alone.
    spikes = (unpacked if need_weight else _empty_spikes)(dense(bits), num_steps, grad.dtype)
    return _gradients(grad, spikes, weight, *geometry_and_needs)


@register_fake("gac_kernels::packed_conv2d_backward", lib=_lib)
def _packed_conv2d_backward_fake(grad, bits, weight, num_steps, *geometry_and_needs: Any):
    return _gradients(grad, _empty_spikes(dense(bits), num_steps, grad.dtype), weight, *geometry_and_needs)


def _gradients(grad, spikes, weight, stride, padding, dilation, groups, need_input, need_weight):
    """The gradients at spikes and weight, empty where they are not needed."""
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, spikes, weight, None, stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, False]
    )
    return gx if need_input else grad.new_empty(0), gw if need_weight else grad.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    _, bits, weight, *ctx.args = inputs
    ctx.save_for_backward(bits, weight)


def _backward(ctx, grad):
    need_input, _, need_weight = ctx.needs_input_grad[:3]
    gx, gw = torch.ops.gac_kernels.packed_conv2d_backward(grad, *ctx.saved_tensors, *ctx.args, need_input, need_weight)
    return gx if need_input else None, None, gw if need_weight else None, *[None] * 5


def _backward_again(ctx, grad):
    bits, weight = ctx.saved_tensors
    num_steps, stride, padding, dilation, groups = ctx.args
    need_input, _, need_weight = ctx.needs_input_grad[:3]
    spikes = unpacked(dense(bits), num_steps, grad.dtype)
    needed = [need_input, need_weight, False]
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, spikes, weight, None, stride, padding, dilation, False, [0, 0], groups, needed
    )
    if need_input and need_weight:  # which depends on the spikes, whose history the bits do not have
        gw = torch._C._functions.DelayedError(_TWICE, 1)(gw if gw.requires_grad else gw.requires_grad_())
    return gx, None, gw, *[None] * 5


_TWICE = (
    "expected one derivative through packed_conv2d, got a second one (double backward): bits do not keep what it "
    "needs, use conv2d, in a network set_spike_packing(False)"
)


def _definition(spikes, bits, weight, num_steps, stride, padding, dilation, groups):
    return F.conv2d(spikes, weight, None, stride, padding, dilation, groups)


register_derivatives(
    _lib,
    "packed_conv2d",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=_definition,
)


def _check_convolution(spikes: Tensor, weight: Tensor, pairs: tuple[Any, Any, Any], groups: int) -> None:
    """Raise unless weight, (stride, padding, dilation) and groups fit the spikes."""
    if (weight.dtype, weight.device) != (spikes.dtype, spikes.device):
        raise ValueError(
            f"expected the weight in {spikes.dtype} on {spikes.device} like the spikes, got {weight.dtype} on "
            f"{weight.device}: convert it with .to(spikes)"
        )
    for name, pair, minimum in zip(("stride", "padding", "dilation"), pairs, (1, 0, 1), strict=True):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"expected {name} as two integers, got {shown(pair)}: give a pair such as (1, 1)")
        for value in pair:
            check_integer(name, value, minimum)
    check_integer("groups", groups, 1)
    if weight.dim() != 4 or weight.shape[1] * groups != spikes.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"expected weight of shape (C', {spikes.shape[1]} / {groups}, kH, kW) with C' a multiple of "
            f"groups={groups}, got {tuple(weight.shape)}: give a convolution of the spikes' channels"
        )
    _, padding, dilation = pairs
    for size, kernel, pad, gap in zip(spikes.shape[2:], weight.shape[2:], padding, dilation, strict=True):
        if not 1 <= kernel <= size + 2 * pad or gap * (kernel - 1) >= size + 2 * pad or 0 in weight.shape[:2]:
            raise ValueError(
                f"expected a kernel of at least 1 that fits into {tuple(spikes.shape[2:])} with padding "
                f"{tuple(padding)}, got weight {tuple(weight.shape)} with dilation {tuple(dilation)}: use a smaller one"
            )


def pack_spikes(spikes: Tensor, num_steps: int) -> Tensor:
    """Spikes of T steps as bits, eight steps a byte.

    Args:
        spikes: (T*B, C, H, W), 0 or not (any other value counts as 1); row ``t * B + b`` is sample b at step t.
        num_steps: T.

    Returns:
        (ceil(T/8)*B, C, H, W) uint8 in the spikes' memory format; bit ``t % 8`` of frame ``t // 8`` is step t.

    Raises:
        ValueError: The spikes are no floating (T*B, C, H, W) tensor, or T does not divide their first axis.
    """
    check_current("spikes", spikes, min_dims=4, max_dims=4)
    check_steps("spikes", spikes, num_steps)
    return torch.ops.gac_kernels.pack_spikes(spikes.detach(), num_steps)


def unpack_spikes(bits: Tensor, num_steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The spikes (T*B, C, H, W), 0 or 1 in ``dtype``, that `pack_spikes` made ``bits`` of.

    Raises:
        ValueError: The bits are no uint8 (ceil(T/8)*B, C, H, W) tensor.
    """
    check_tensor("bits", bits)
    if bits.dtype != torch.uint8 or bits.dim() != 4:
        raise ValueError(f"expected bits as uint8 of 4 axes, got {bits.dtype} of {bits.dim()}: see pack_spikes")
    check_integer("num_steps", num_steps, 1)
    groups = -(-num_steps // STEPS_PER_BYTE)
    if bits.shape[0] % groups:
        raise ValueError(
            f"expected bits of {groups} * B frames for {num_steps} steps, got {bits.shape[0]}: see pack_spikes"
        )
    if dtype not in (*DTYPES, torch.int8, torch.uint8):
        raise ValueError(
            f"expected dtype as a floating one, int8 or uint8, got {shown(dtype)}: give one such as float32"
        )
    return torch.ops.gac_kernels.unpack_spikes(bits, num_steps, dtype)


def packed_conv2d(
    spikes: Tensor,
    bits: Tensor,
    weight: Tensor,
    num_steps: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``conv2d(spikes, weight)`` that keeps the spikes' bits for its backward pass, and not the spikes.

    Args:
        spikes: (T*B, C, H, W), 0 or 1.
        bits: What `pack_spikes` makes of them.
        weight: (C', C / groups, kH, kW) in the spikes' dtype.
        num_steps: T.
        stride: As for ``conv2d``, like those that follow.
        padding: On both sides of each axis.
        dilation: Of the kernel.
        groups: Of the channels.

    Returns:
        (T*B, C', H', W'); values and gradients are those of ``conv2d`` to the bit.

    Raises:
        ValueError: Spikes, bits, weight and T do not fit together.
    """
    check_current("spikes", spikes, min_dims=4, max_dims=4)
    check_steps("spikes", spikes, num_steps)
    check_bits(spikes, bits, num_steps)
    check_tensor("weight", weight)
    _check_convolution(spikes, weight, (stride, padding, dilation), groups)
    return torch.ops.gac_kernels.packed_conv2d(
        spikes, bits, weight, num_steps, list(stride), list(padding), list(dilation), groups
    )
