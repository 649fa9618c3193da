"""Launches of batch norm and neuron between convolutions in 8 bits; statistics are those of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.layout import on_device
from ..common.tiles import FINISH, channel_tiles
from ..common.triton import cdiv, next_power_of_2
from ..norm import eager
from ..norm.norm_lif_kernels import reduce_kernel
from ..registry import kernel_constants
from ..tuning import launch_config
from .norm_kernels import apply_kernel, bytes_kernel, finish_kernel, forward_kernel
from .weight_gradient import turned_size

MAX_STEPS = 8  # of which registers hold all


class Spikes(NamedTuple):
    """Spikes (T*B, C, H, W) in 8 bits.

    Attributes:
        plain: (T*B, C, H, W) int8, 0 or 1, channels-last.
        turned: 0 or 1.0 in e4m3, as `turned_size` says.
    """

    plain: Tensor
    turned: Tensor


class Norm(NamedTuple):
    """A batch norm: weight and bias, which may be None, statistics of the batch (C,) float32, and eps.

    ``affine`` is its scale and shift, (2, C) float32, where `convolution.finish_statistics` has left them.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    affine: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, mean and variance."""
        return self[:4]


NO_NORM = Norm(None, None, None, None, 0.0)


def empty_turned(like: Tensor, num_steps: int) -> Tensor:
    """Unwritten turned bytes of a tensor (T*B, C, H, W)."""
    samples, channels, height, width = like.shape
    size = turned_size(num_steps, samples // num_steps, channels, height, width)
    return torch.empty(size, dtype=torch.int32, device=like.device)


def _geometry(op: str, x: Tensor, num_steps: int, config: dict[str, int] | None) -> tuple[Any, tuple, dict[str, int]]:
    """Grid, sizes (images, channels, pixels) and constants of a kernel that writes turned bytes."""
    config = dict(config or launch_config(op, num_steps, x.element_size(), x.device))
    samples, channels, height, width = x.shape
    batch = samples // num_steps
    config["BLOCK_B"] = min(config["BLOCK_B"], max(4, next_power_of_2(batch)))
    config["BLOCK_C"] = min(config["BLOCK_C"], next_power_of_2(channels))
    grid = (height * width * cdiv(batch, config["BLOCK_B"]), cdiv(channels, config["BLOCK_C"]))
    return grid, (batch, channels, height * width), config | {"T": num_steps, "WORDS": cdiv(num_steps, 4)}


def to_spikes(x: Tensor, num_steps: int, config: dict[str, int] | None = None) -> Spikes:
    """Spikes of a floating dtype (T*B, C, H, W), dense channels-last, in 8 bits."""
    spikes = Spikes(torch.empty_like(x, dtype=torch.int8), empty_turned(x, num_steps))
    grid, sizes, meta = _geometry("eight_bit_bytes", x, num_steps, config)
    with on_device(x):
        bytes_kernel[grid](x, *spikes, *sizes, **meta)
    return spikes


def norm_and_fire(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    res_norm: Norm,
    num_steps: int,
    neuron: tuple,
    keep_membrane: bool,
    full: bool,
    config: dict[str, int] | None = None,
) -> tuple[Spikes | Tensor, Tensor | None]:
    """Spikes in 8 bits, or with ``full`` in x's dtype, and the neuron's input current where it is kept.

    Args:
        x: (T*B, C, H, W), dense channels-last, as all such tensors here.
        residual: Of the same shape, or None.
        norm: Of x.
        res_norm: Of the residual, or `NO_NORM`.
        num_steps: T, up to 8.
        neuron: `LIFSpec.op_arguments`.
        keep_membrane: Whether it is wanted.
        full: For whom other layers than these follow.
        config: Launch parameters in the place of the tuned ones.
    """
    membrane = torch.empty_like(x) if keep_membrane else None
    whole = torch.empty_like(x) if full else None
    spikes = None if full else Spikes(torch.empty_like(x, dtype=torch.int8), empty_turned(x, num_steps))
    threshold, decay, _, _, _, soft_reset = neuron
    grid, sizes, meta = _geometry("eight_bit_norm_fwd", x, num_steps, config)
    with on_device(x):
        forward_kernel[grid](
            x,
            residual,
            *norm.tensors,
            norm.affine,
            *res_norm.tensors,
            *(spikes or (None, None)),
            whole,
            membrane,
            *sizes,
            EPS=norm.eps,
            R_EPS=res_norm.eps,
            THRESHOLD=threshold,
            DECAY=decay,
            SOFT=soft_reset,
            **meta,
        )
    found: Any = whole if full else spikes
    return found, membrane


class Gradients(NamedTuple):
    """What `backward` returns.

    Attributes:
        plain: (T*B, C, H, W) float8 e4m3: gradient at x times the convolution's scale and divisor.
        turned: The same, turned.
        divisor: One float32 value, a power of two.
        current: Gradient at the neuron's input current, or at the residual where that has a norm; empty if not asked.
        of_norm: At weight and bias, None where there is none.
        of_res_norm: Likewise, of the residual's norm.
    """

    plain: Tensor
    turned: Tensor
    divisor: Tensor
    current: Tensor
    of_norm: tuple[Tensor | None, Tensor | None]
    of_res_norm: tuple[Tensor | None, Tensor | None]


def backward(
    grad_spikes: Tensor | None,
    grad_membrane: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    membrane: Tensor | None,
    norm: Norm,
    res_norm: Norm,
    conv_scale: Tensor,
    num_steps: int,
    neuron: tuple,
    has_residual: bool,
    total: Tensor | None = None,
    group: str = "",
    config: dict[str, int] | None = None,
) -> Gradients:
    """Gradients of `norm_and_fire`, the one at x in 8 bits.

    Args:
        grad_spikes: At the spikes.
        grad_membrane: At the current that was returned.
        x: Input of the norm.
        residual: Where it is needed: it has a norm of its own, or no current was kept.
        membrane: The current that was kept.
        norm: Of x.
        res_norm: Of the residual, or `NO_NORM`.
        conv_scale: (C,), of the weight of the convolution that made x.
        num_steps: T.
        neuron: `LIFSpec.op_arguments`.
        has_residual: Whether there was one, whose gradient is wanted.
        total: Values of a channel over all processes.
        group: Name of their group.
        config: Launch parameters of the second pass in the place of the tuned ones.
    """
    normed = res_norm.mean is not None
    source = residual if membrane is None else membrane
    written = has_residual or source is not None or grad_spikes is None
    channels, size = x.shape[1], x.element_size()
    device = x.device
    ga = torch.empty_like(x) if written else x.new_empty(0)
    gw, gb, grw, grb = (
        None if v is None else torch.empty_like(v) for v in (norm.weight, norm.bias, res_norm.weight, res_norm.bias)
    )
    sum_count = 3 if normed else 2
    kind = "_normed" if normed else "_residual" if source is not None else ""
    config_of_sums = launch_config(f"norm_lif_bwd_reduce{kind}", num_steps, size, device)
    # The largest values take registers: of up to 168 or 208 a thread (sm_90, T=4) as many programs fit at once.
    config_of_sums = config_of_sums | {"PER_SM": min(config_of_sums["PER_SM"], 2 if normed else 3)}
    tiles = channel_tiles(x, num_steps, config_of_sums)
    programs, count = tiles.grid[0], tiles.rows * num_steps
    partial = torch.empty((programs, sum_count + 2, channels), dtype=torch.float32, device=device)
    factors, bound = torch.empty((8, channels), dtype=torch.float32, device=device), partial.new_empty(channels)
    sums = torch.empty((3, channels), dtype=torch.float32, device=device) if group else None
    names = ("THRESHOLD", "DECAY", "SURROGATE", "WIDTH", "DETACH", "SOFT")
    shared: dict[str, Any] = dict(zip(names, neuron, strict=True)) | {"NORMED": normed}
    eps: dict[str, Any] = dict(EPS=norm.eps, R_EPS=res_norm.eps, SUMS=sum_count + 2)

    def finish(first: bool, last: bool) -> None:
        finish_kernel[(cdiv(channels, FINISH["BLOCK_C"]),)](
            partial,
            *norm.tensors,
            res_norm.weight,
            res_norm.mean,
            res_norm.var,
            conv_scale,
            total,
            sums,
            gw,
            gb,
            grw,
            grb,
            bound,
            factors,
            programs,
            channels,
            count,
            NORMED=normed,
            FIRST=first,
            LAST=last,
            **eps,
            **FINISH,
        )

    with on_device(x):
        reduce_kernel[tiles.grid](
            grad_spikes,
            grad_membrane,
            x,
            source,
            residual,
            *norm.tensors,
            *res_norm.tensors,
            ga,
            partial,
            x.new_empty(0),
            None,
            tiles.rows,
            channels,
            tiles.spatial,
            x.numel() // num_steps,
            tiles.tiles,
            T=num_steps,
            STEPS=num_steps,
            RESIDUAL=residual is not None,
            KEEP=membrane is not None,
            HAS_GS=grad_spikes is not None,
            HAS_GY=grad_membrane is not None,
            WRITE=written,
            MAXES=True,
            **eps,
            **shared | kernel_constants(neuron[2], backward=True),
            **tiles.meta,
        )
        if sums is None:
            finish(True, True)
        else:
            finish(True, False)
            dist.all_reduce(sums, group=eager.resolve_group(group))
            finish(False, True)
        plain = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        turned, divisor = empty_turned(x, num_steps), torch.empty(1, dtype=torch.float32, device=device)
        grid, sizes, meta = _geometry("eight_bit_norm_bwd_apply", x, num_steps, config)
        apply_kernel[grid](
            ga if written else grad_spikes,
            x,
            residual,
            factors,
            bound,
            divisor,
            plain.view(torch.uint8),
            turned,
            ga,
            *sizes,
            RECOMPUTE=not written,
            ALL_C=next_power_of_2(channels),
            **shared,
            **meta,
        )
    return Gradients(plain, turned, divisor, ga if has_residual else x.new_empty(0), (gw, gb), (grw, grb))
