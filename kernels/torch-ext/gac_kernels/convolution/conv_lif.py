"""3x3 convolution with bias, residual and multi-step LIF for inference, in one pass where that is faster.

Layer by layer, the tuned launch parameters say where one kernel beats cuDNN's convolution followed by `norm_lif`: in
one pass the convolution's output never reaches memory, but cuDNN's tensor core loop is better. Where they say nothing,
the two passes run, and also where the batch is so small that one pass, whose programs take one time step after the
other, would leave the GPU idle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_conv_lif, check_flags, check_spec, check_tensors, conv3x3_shape
from ..common.fake import register_fake
from ..common.layout import packed
from ..common.shortcut import convolve_shortcut
from ..common.triton import is_embedding
from ..derivatives import refuse_forward_mode, register_no_derivatives
from ..spec import CIFAR, LIFSpec
from .dispatch import Shape, spike_conv_config
from .hopper import launch as hopper
from .hopper.plan import one_pass_fills

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define(
    "conv_lif(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int num_steps, int stride, float threshold, "
    "float decay, bool soft_reset, bool keep_membrane, Tensor? shortcut=None) -> (Tensor, Tensor)"
)


def _outputs(x: Tensor, weight: Tensor, stride: int, keep_membrane: bool) -> tuple[Tensor, Tensor]:
    """Unwritten spikes and, where asked for, membrane."""
    size = conv3x3_shape(x, weight, stride)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, torch.empty_like(out) if keep_membrane else x.new_empty(0)


def _two_passes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    keep_membrane: bool,
) -> tuple[Tensor, Tensor]:
    size = [stride, stride]
    current = torch.ops.aten.convolution(x, weight, None, size, [1, 1], [1, 1], False, [0, 0], 1)
    current = current.contiguous(memory_format=torch.channels_last)  # as it mostly is already
    spikes, membrane, _ = torch.ops.gac_kernels.norm_lif(
        current,
        residual,
        None,
        bias,
        None,
        None,
        None,
        0.0,
        num_steps,
        threshold,
        decay,
        0,
        1.0,
        False,
        soft_reset,
        False,
        keep_membrane,
        "",
    )
    return spikes, membrane


@torch.library.impl(_lib, "conv_lif", "CompositeExplicitAutograd")
def _conv_lif(x, weight, bias, residual, num_steps, stride, threshold, decay, soft_reset, keep_membrane, shortcut=None):
    check_conv_lif(
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        num_steps=num_steps,
        stride=stride,
        shortcut=shortcut,
    )
    refuse_forward_mode("conv_lif")
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(
            x, weight, bias, residual, num_steps, stride, threshold, decay, soft_reset, keep_membrane, shortcut
        )


def _forward(x, weight, bias, residual, num_steps, stride, threshold, decay, soft_reset, keep_membrane, shortcut):
    if not x.numel() or not weight.numel():
        return _outputs(x, weight, stride, keep_membrane)
    layout = torch.channels_last
    x, weight = (tensor.contiguous(memory_format=layout) for tensor in (x, weight))
    bias, shortcut = packed((bias, shortcut))
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    neuron = (threshold, decay, soft_reset)
    shape = Shape.of(x, weight, stride, residual is not None, shortcut is not None)
    size = (shape.height, shape.width)
    if resolve_backend(x.device, x.dtype) == "triton" and x.element_size() == 2 and not is_embedding():
        config = spike_conv_config("conv_lif_hopper", shape, x.device)
        frames = (len(x) // num_steps, shape.out_channels, shape.height, shape.width)
        if config["ONE_PASS"] and one_pass_fills(*frames, num_steps, hopper.multiprocessors(x.device)):
            out, membrane = _outputs(x, weight, stride, keep_membrane)
            arguments: dict[str, Any] = dict(
                spikes=x,
                weight=weight,
                scale=None,
                bias=bias,
                num_steps=num_steps,
                stride=stride,
                threshold=threshold,
                decay=decay,
                soft_reset=soft_reset,
                shift=0.0,
                out=out,
                membrane=membrane,
                config=config,
            )
            refusal = hopper.run(**arguments, residual=residual, shortcut=shortcut)
            if refusal and shortcut is not None:
                residual, shortcut = convolve_shortcut(residual, shortcut, size), None
                refusal = hopper.run(**arguments, residual=residual, shortcut=None)
            if not refusal:
                return out, membrane
    if shortcut is not None:
        residual = convolve_shortcut(residual, shortcut, size)
    return _two_passes(x, weight, bias, residual, num_steps, stride, *neuron, keep_membrane)


register_no_derivatives(_lib, "conv_lif")


@register_fake("gac_kernels::conv_lif", lib=_lib)
def _conv_lif_fake(
    x, weight, bias, residual, num_steps, stride, threshold, decay, soft_reset, keep_membrane, shortcut=None
):
    return _outputs(x, weight, stride, keep_membrane)


def conv_lif(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_steps: int,
    spec: LIFSpec = CIFAR,
    *,
    stride: int = 1,
    residual: Tensor | None = None,
    return_membrane: bool = False,
    shortcut: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``lif(conv3x3(x, weight) + bias + residual)`` over T steps, for inference: no gradient.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t; any floating dtype, channels-last without a copy.
        weight: (C', C, 3, 3) in x's dtype; padding is 1.
        bias: (C',) float32, or float64 with such an x.
        num_steps: T.
        spec: What the neuron computes.
        stride: 1 or 2.
        residual: (T*B, C', H', W') in x's dtype, added to the neuron's input current.
        return_membrane: Return the neuron's input current too. One pass fires before it rounds the current to x's
            dtype, two passes round the convolution's output and, where it is returned, the current first.
        shortcut: (C', C'', 1, 1) in x's dtype: the residual is then (T*B, C'', H'', W''), and what is added is its
            convolution with this weight and a stride of 1 or 2.

    Returns:
        Spikes (T*B, C', H', W') in x's dtype, channels-last, H' = ceil(H / stride); with ``return_membrane`` the pair
        (current, spikes).

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, or T does not divide the first axis.
    """
    check_spec(spec)
    check_tensors(residual=residual, shortcut=shortcut)
    check_flags(return_membrane=return_membrane)
    check_conv_lif(
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        num_steps=num_steps,
        stride=stride,
        shortcut=shortcut,
    )
    out, membrane = torch.ops.gac_kernels.conv_lif(
        x, weight, bias, residual, num_steps, stride, *spec.forward_arguments, return_membrane, shortcut
    )
    return (membrane, out) if return_membrane else out
