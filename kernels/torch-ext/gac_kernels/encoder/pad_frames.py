"""Zero padding of frames in one pass, with the rectification before it where there is one.

PyTorch fills the padded tensor, then copies into it; with a ReLU that is three passes. They take as long as the
convolutions of even size that need this padding, since cuDNN pads both sides alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_flags
from ..common.fake import register_fake
from ..common.layout import as_layout, on_device
from ..common.messages import shown
from ..common.tiles import dense, is_channels_last
from ..common.triton import cdiv, launchable, tl, triton
from ..derivatives import register_derivatives
from ..reference import pad_frames_reference
from ..tuning import launch_config


@triton.jit
def _pad_kernel(
    x_ptr,
    y_ptr,
    H,
    row_x,
    row_y,
    shift,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    i = row % (H + BEFORE + AFTER) - BEFORE
    source = (row // (H + BEFORE + AFTER) * H + i).to(tl.int64) * row_x - shift
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i >= 0) & (i < H) & (j >= shift) & (j < shift + row_x)
    x = tl.load(x_ptr + source + j, mask=inside, other=0.0)
    if RECTIFY:
        x = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    tl.store(y_ptr + row.to(tl.int64) * row_y + j, x, mask=j < row_y)


@triton.jit
def _pad_backward_kernel(
    grad_ptr,
    y_ptr,
    gx_ptr,
    H,
    row_x,
    row_y,
    shift,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    source = (row // H * (H + BEFORE + AFTER) + row % H + BEFORE).to(tl.int64) * row_y + shift
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < row_x
    g = tl.load(grad_ptr + source + j, mask=inside, other=0.0)
    if RECTIFY:
        y = tl.load(y_ptr + source + j, mask=inside, other=0.0)
        g = tl.where(y <= 0.0, 0.0, g)
    tl.store(gx_ptr + row.to(tl.int64) * row_x + j, g, mask=inside)


def _geometry(x: Tensor, y: Tensor, before: int) -> tuple[int, int, int, int]:
    """H, elements of a row of x and of y, and where x begins in it; a row being all that lies side by side."""
    unit = x.shape[1] if is_channels_last(x) else 1
    return x.shape[2], x.shape[3] * unit, y.shape[3] * unit, before * unit


def _launch(kernel, rows: int, width: int, x: Tensor, *arguments: Tensor | int, **constants: int) -> None:
    config = launch_config("pad_frames", 1, x.element_size(), x.device)
    with on_device(x):
        launchable(kernel)[(rows, cdiv(width, config["BLOCK"]))](*arguments, **constants, **config)


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("pad_frames(Tensor x, int before, int after, bool rectify) -> Tensor")
_lib.define("pad_frames_backward(Tensor grad, Tensor y, int before, int after, bool rectify) -> Tensor")


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """Unwritten (N, C, H + before + after, W + before + after) in the memory format of the dense x."""
    size = (*x.shape[:2], *(n + before + after for n in x.shape[2:]))
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _cropped(y: Tensor, before: int, after: int) -> Tensor:
    """Unwritten (N, C, H, W) of which y is the padded form, in y's memory format."""
    size = (*y.shape[:2], *(n - before - after for n in y.shape[2:]))
    layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    return torch.empty(size, dtype=y.dtype, device=y.device, memory_format=layout)


@torch.library.impl(_lib, "pad_frames", "CompositeExplicitAutograd")
def _pad_frames(x, before, after, rectify):
    x = dense(x)
    y = _padded(x, before, after)
    if x.numel() and resolve_backend(x.device, x.dtype) == "triton":
        geometry = _geometry(x, y, before)
        _launch(
            _pad_kernel,
            y.numel() // geometry[2],
            geometry[2],
            x,
            x,
            y,
            *geometry,
            BEFORE=before,
            AFTER=after,
            RECTIFY=rectify,
        )
    else:
        y.copy_(F.pad(x.relu() if rectify else x, [before, after, before, after]))
    return y


@torch.library.impl(_lib, "pad_frames_backward", "CompositeExplicitAutograd")
def _pad_frames_backward(grad, y, before, after, rectify):
    y = dense(y)
    gx, grad = _cropped(y, before, after), as_layout(grad, y)
    if gx.numel() and resolve_backend(y.device, y.dtype) == "triton":
        geometry = _geometry(gx, y, before)
        _launch(
            _pad_backward_kernel,
            gx.numel() // geometry[1],
            geometry[1],
            y,
            grad,
            y,
            gx,
            *geometry,
            BEFORE=before,
            AFTER=after,
            RECTIFY=rectify,
        )
    elif gx.numel():
        inner = (..., slice(before, before + gx.shape[2]), slice(before, before + gx.shape[3]))
        gx.copy_(torch.where(y[inner] <= 0, 0.0, grad[inner]) if rectify else grad[inner])
    return gx


@register_fake("gac_kernels::pad_frames", lib=_lib)
def _pad_frames_fake(x, before, after, rectify):
    return _padded(dense(x), before, after)


@register_fake("gac_kernels::pad_frames_backward", lib=_lib)
def _pad_frames_backward_fake(grad, y, before, after, rectify):
    return _cropped(dense(y), before, after)


def _setup_context(ctx, inputs, output) -> None:
    ctx.args = inputs[1:]
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    return torch.ops.gac_kernels.pad_frames_backward(grad, *ctx.saved_tensors, *ctx.args), None, None, None


def _backward_again(ctx, grad):
    before, after, rectify = ctx.args
    y = ctx.saved_tensors[0].detach()
    inner = (..., *(slice(before, size - after) for size in y.shape[2:]))
    gx = grad[inner]
    return gx.masked_fill(y[inner] <= 0, 0.0) if rectify else gx, None, None, None


register_derivatives(
    _lib,
    "pad_frames",
    setup_context=_setup_context,
    backward=_backward,
    again=_backward_again,
    definition=pad_frames_reference,
)


def pad_frames(x: Tensor, before: int, after: int, rectify: bool = False) -> Tensor:
    """``F.pad(x, [before, after, before, after])``, of ``F.relu(x)`` with ``rectify``, in one pass.

    Saved for backward: the result, which the convolution behind it keeps too.

    Args:
        x: (N, C, H, W), float32, float16, bfloat16 or float64, contiguous or channels-last without a copy.
        before: Rows above and columns to the left.
        after: Rows below and columns to the right.
        rectify: Set negative values to 0.

    Returns:
        (N, C, H + before + after, W + before + after) in x's dtype and memory format.

    Raises:
        ValueError: x is no floating tensor of four axes, or a size is negative.
    """
    check_current("x", x, min_dims=4, max_dims=4)
    for name, size in (("before", before), ("after", after)):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**20:
            raise ValueError(
                f"expected {name} as an integer from 0 to {2**20 - 1}, got {shown(size)}: to crop, index the tensor"
            )
    check_flags(rectify=rectify)
    return torch.ops.gac_kernels.pad_frames(x, before, after, rectify)
