"""3x3 convolution of spikes for training in 8 bits: int8 weights forward, float8 e4m3 gradients backward.

Spikes are 0 or 1, so only weights and gradients round. `gac_kernels.reference.int8_conv2d` has the equations. Here they
run as float32 convolutions of the same integers and e4m3 numbers, on any device: the forward pass has the very bits of
the definition, sums of gradients differ in order alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_current, check_int8_conv2d, conv3x3_shape
from ..common.fake import register_fake
from ..common.tiles import dense
from ..derivatives import register_derivatives
from ..reference.int8_conv2d import gradient_scale, int8_weight_reference, to_e4m3
from ..spikes.bits import STEPS_PER_BYTE, unpacked

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("int8_conv2d(Tensor spikes, Tensor weight, int stride, Tensor? bits=None, int num_steps=1) -> Tensor")
_lib.define(
    "int8_conv2d_backward(Tensor grad, Tensor kept, Tensor weight, int stride, int num_steps, bool packed, "
    "bool need_input, bool need_weight) -> (Tensor, Tensor)"
)


def _output(spikes: Tensor, weight: Tensor, stride: int) -> Tensor:
    return spikes.new_empty(conv3x3_shape(spikes, weight, stride)).contiguous(
        memory_format=torch._prims_common.suggest_memory_format(spikes)
    )


@torch.library.impl(_lib, "int8_conv2d", "CompositeExplicitAutograd")
def _int8_conv2d(spikes, weight, stride, bits=None, num_steps=1):
    out = _output(spikes, weight, stride)
    if out.numel():
        integers, scale = int8_weight_reference(weight)
        wide = torch.promote_types(spikes.dtype, torch.float32)
        # Integers up to 127 fit into TF32 and their sums into float32; round removes a Winograd algorithm's error.
        with torch.autocast(spikes.device.type, enabled=False):  # which would round the sums to 16 bits
            sums = F.conv2d(spikes.to(wide), integers.to(wide), None, stride, 1).round_()
        out.copy_(sums.mul_(scale.to(wide)[:, None, None]))
    return out


@register_fake("gac_kernels::int8_conv2d", lib=_lib)
def _int8_conv2d_fake(spikes, weight, stride, bits=None, num_steps=1):
    return _output(spikes, weight, stride)


@torch.library.impl(_lib, "int8_conv2d_backward", "CompositeExplicitAutograd")
def _int8_conv2d_backward(grad, kept, weight, stride, num_steps, packed, need_input, need_weight):
    spikes = unpacked(dense(kept), num_steps, grad.dtype) if packed else kept
    at_spikes, at_weight = _gradients(grad, spikes, weight, need_input, need_weight)
    if not grad.numel():
        return at_spikes.zero_(), at_weight.zero_()
    wide = torch.promote_types(grad.dtype, torch.float32)
    integers, scale = int8_weight_reference(weight)
    h = grad.float() * scale[:, None, None]
    s = gradient_scale(h)
    found = torch.ops.aten.convolution_backward(
        to_e4m3(h * s).to(wide),
        spikes.to(wide),
        to_e4m3(integers.float()).to(wide),
        None,
        [stride, stride],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        [need_input, need_weight, False],
    )
    if need_input:
        at_spikes.copy_(found[0].div_(s))
    if need_weight:
        at_weight.copy_(found[1].div_((s * scale)[:, None, None, None]))
    return at_spikes, at_weight


@register_fake("gac_kernels::int8_conv2d_backward", lib=_lib)
def _int8_conv2d_backward_fake(grad, kept, weight, stride, num_steps, packed, need_input, need_weight):
    spikes = kept
    if packed:
        kept = dense(kept)
        batch = kept.shape[0] // -(-num_steps // STEPS_PER_BYTE)
        spikes = torch.empty_strided(
            (num_steps * batch, *kept.shape[1:]), kept.stride(), dtype=grad.dtype, device=grad.device
        )
    return _gradients(grad, spikes, weight, need_input, need_weight)


def _gradients(
    grad: Tensor, spikes: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Unwritten gradients; what is not needed has no elements."""
    at_spikes = torch.empty_like(spikes, dtype=grad.dtype) if need_input else grad.new_empty(0)
    return at_spikes, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    spikes, weight, ctx.stride, bits, ctx.num_steps = inputs
    ctx.packed = bits is not None
    ctx.save_for_backward(bits if ctx.packed else spikes, weight)


def _backward(ctx, grad):
    need_input, need_weight = ctx.needs_input_grad[:2]
    at_spikes, at_weight = torch.ops.gac_kernels.int8_conv2d_backward(
        grad, *ctx.saved_tensors, ctx.stride, ctx.num_steps, ctx.packed, need_input, need_weight
    )
    return at_spikes if need_input else None, at_weight if need_weight else None, None, None, None


def _once(*_: object) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "expected one backward pass through int8_conv2d, got a second derivative, forward mode or a torch.func "
        "transform: its gradients round to 8 bits and have no derivatives; switch it off with set_int8_convs(False)"
    )


register_derivatives(
    _lib,
    "int8_conv2d",
    setup_context=_setup_context,
    backward=_backward,
    again=_once,
    definition=_once,
    defaults=(None, 1),
)


def int8_conv2d(
    spikes: Tensor, weight: Tensor, stride: int = 1, *, bits: Tensor | None = None, num_steps: int = 1
) -> Tensor:
    """3x3 convolution of spikes with weights rounded to int8, whose gradients round to float8 e4m3.

    Each output channel has one scale, its largest weight / 127 (in 16 bits, so that integer times scale is exact);
    gradients go straight through the rounding. The gradient at the output, times that scale, is rounded to e4m3 with
    one power of two for the tensor, chosen on the device, and serves both gradients; the one at the spikes multiplies
    it with the integers in e4m3. Gradients saturate; NaN and infinity stay visible as NaN.

    Args:
        spikes: (T*B, C, H, W), 0 or 1, floating-point.
        weight: (C', C, 3, 3), the weights that learn; padding is 1.
        stride: 1 or 2.
        bits: What `pack_spikes` makes of the spikes: these are then kept for the backward pass instead.
        num_steps: T, where there are bits.

    Returns:
        (T*B, C', H', W') in the spikes' dtype, H' = ceil(H / stride). The sum is exact, its product with the scale
        rounded to float32 and then to the dtype.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, C is above 14,563, where float32 may not hold the
            sums, or the bits do not fit the spikes.
        NotImplementedError: In the backward pass, that a second derivative is asked for.
    """
    check_int8_conv2d(spikes, weight, stride, bits, num_steps)
    return torch.ops.gac_kernels.int8_conv2d(spikes, weight, stride, bits, num_steps)


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers and scales with which `int8_conv2d` computes.

    Args:
        weight: (C', C, kH, kW).

    Returns:
        int8 in the weight's shape and (C',) float32. Their product is exact in float32, and its integers and scales
        are these again.

    Raises:
        ValueError: The weight is no floating-point tensor of four axes.
    """
    check_current("weight", weight, min_dims=4, max_dims=4)
    return int8_weight_reference(weight)
