"""How often each neuron fired over a batch, added to running counts, and whether all values were spikes: in one read.

This is what energy accounting asks of every operand of a network. In PyTorch it takes thirteen passes of reading and
writing, which is more than the network itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import DTYPES, check_steps, check_tensor
from ..common.fake import register_fake
from ..common.layout import on_device
from ..common.triton import cdiv, tl, triton
from ..tuning import launch_config


@triton.jit
def _count_spikes_kernel(x_ptr, total_ptr, real_ptr, frame, batch, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    step = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < frame
    count = tl.zeros((BLOCK,), tl.float32)
    real = tl.zeros((BLOCK,), tl.int1)
    for b in tl.range(0, batch, num_stages=STAGES):  # several in flight: there are too few programs to fill the memory
        x = tl.load(x_ptr + (step * batch + b) * frame + i, mask=inside, other=0).to(tl.float32)
        count += tl.where(x != 0, 1.0, 0.0)
        real |= (x != 0) & (tl.abs(x) != 1.0)
    to = total_ptr + step * frame + i
    tl.store(to, tl.load(to, mask=inside, other=0.0) + count, mask=inside)
    if tl.max(real.to(tl.int32), 0) > 0:
        tl.store(real_ptr, 1)  # by every program that found one, all the same


def _count_triton(x: Tensor, num_steps: int, total: Tensor, real: Tensor) -> None:
    config = launch_config("count_spikes", 1, x.element_size(), x.device)
    frame, batch = total[0].numel(), x.shape[0] // num_steps
    strides = (frame, *total.stride()[1:])
    if x.stride() != strides:
        x = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
    with on_device(x):
        _count_spikes_kernel[(cdiv(frame, config["BLOCK"]), num_steps)](
            x, total, real.view(torch.uint8), frame, batch, **config
        )


def _count_eager(x: Tensor, num_steps: int, total: Tensor, real: Tensor) -> None:
    for counts, step in zip(total, x.unflatten(0, (num_steps, -1)), strict=True):
        counts += (step != 0).sum(0, dtype=counts.dtype)
    real |= ((x != 0) & (x.abs() != 1)).any()


_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("count_spikes(Tensor x, int num_steps, Tensor(a!) total, Tensor(b!) real) -> ()")


def _check(x: Tensor, num_steps: int, total: Tensor, real: Tensor) -> None:
    for name, tensor in (("x", x), ("total", total), ("real", real)):
        check_tensor(name, tensor)
    if x.dtype not in (*DTYPES, torch.int8) or x.dim() < 2:
        raise ValueError(
            f"expected x as (T*B, ...) in a floating dtype or int8, got {x.dtype} of shape {tuple(x.shape)}: fold time "
            "with x.flatten(0, 1), convert with x.float()"
        )
    check_steps("x", x, num_steps)
    if total.shape != (num_steps, *x.shape[1:]) or total.dtype != torch.float32:
        raise ValueError(
            f"expected total as float32 of shape {(num_steps, *x.shape[1:])}, got {total.dtype} of shape "
            f"{tuple(total.shape)}: one count a step and neuron"
        )
    span = 1 + sum((size - 1) * stride for size, stride in zip(total.shape, total.stride(), strict=True))
    if total.numel() and (span != total.numel() or (num_steps > 1 and total.stride(0) != total[0].numel())):
        raise ValueError(f"expected total dense, one step after another, got strides {total.stride()}: use torch.zeros")
    if real.dtype != torch.bool or real.numel() != 1:
        raise ValueError(
            f"expected real as one bool, got {real.dtype} of shape {tuple(real.shape)}: use torch.zeros((), "
            "dtype=torch.bool)"
        )
    if total.requires_grad:
        raise ValueError("expected total as a tensor to add to, got one that requires a gradient: use torch.zeros")
    if total.device != x.device or real.device != x.device:
        raise ValueError(f"expected total and real on {x.device}, got {total.device} and {real.device}: move them")


@torch.library.impl(_lib, "count_spikes", "CompositeExplicitAutograd")
def _count_spikes(x, num_steps, total, real):
    _check(x, num_steps, total, real)
    if x.numel():
        run = _count_triton if resolve_backend(x.device, x.dtype) == "triton" else _count_eager
        run(x, num_steps, total, real)


@register_fake("gac_kernels::count_spikes", lib=_lib)
def _count_spikes_fake(x, num_steps, total, real):
    _check(x, num_steps, total, real)


def count_spikes(x: Tensor, num_steps: int, total: Tensor, real: Tensor) -> None:
    """Add to ``total`` how many samples have a value other than 0 at each step and place, in one read of x.

    Args:
        x: (T*B, ...), row ``t * B + b`` being sample b at step t; a floating dtype or int8; read without a copy where
            its frames lie in memory as those of ``total`` do.
        num_steps: T.
        total: (T, ...) float32, dense, added to in place; exact up to 2**24 samples.
        real: One bool, set in place where a value of x is none of 0, 1 and -1.

    Raises:
        ValueError: A shape, dtype, device or memory layout is another, or T does not divide the first axis.
    """
    _check(x, num_steps, total, real)
    torch.ops.gac_kernels.count_spikes(x.detach(), num_steps, total, real)
