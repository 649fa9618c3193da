"""Launches of batch norm and neuron between convolutions in 8 bits; statistics are those of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.launch import Launch, prepared
from ..common.tiles import FINISH, is_channels_last, tiles_of
from ..common.triton import cdiv, next_power_of_2
from ..norm import eager
from ..norm.launch import kept
from ..norm.norm_lif_backward_kernels import reduce_kernel
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


class _Place(NamedTuple):
    """A dense channels-last tensor, and launch parameters in the place of the tuned ones."""

    shape: torch.Size
    element_size: int
    device: torch.device
    num_steps: int
    items: tuple[tuple[str, int], ...] | None


def _place(x: Tensor, num_steps: int, config: dict[str, int] | None) -> _Place:
    items = None if config is None else tuple(config.items())
    return _Place(x.shape, x.element_size(), x.device, num_steps, items)


def _geometry(op: str, place: _Place) -> tuple[Any, tuple, dict[str, int]]:
    """Grid, sizes (images, channels, pixels) and constants of a kernel that writes turned bytes."""
    (samples, channels, height, width), element_size, device, num_steps, items = place
    config = dict(items or launch_config(op, num_steps, element_size, device))
    batch = samples // num_steps
    config["BLOCK_B"] = min(config["BLOCK_B"], max(4, next_power_of_2(batch)))
    config["BLOCK_C"] = min(config["BLOCK_C"], next_power_of_2(channels))
    grid = (height * width * cdiv(batch, config["BLOCK_B"]), cdiv(channels, config["BLOCK_C"]))
    return grid, (batch, channels, height * width), config | {"T": num_steps, "WORDS": cdiv(num_steps, 4)}


def to_spikes(x: Tensor, num_steps: int, config: dict[str, int] | None = None) -> Spikes:
    """Spikes of a floating dtype (T*B, C, H, W), dense channels-last, in 8 bits."""
    spikes = Spikes(torch.empty_like(x, dtype=torch.int8), empty_turned(x, num_steps))
    _to_bytes(_place(x, num_steps, config))(x, *spikes)
    return spikes


@prepared
def _to_bytes(place: _Place) -> Launch:
    grid, sizes, meta = _geometry("eight_bit_bytes", place)
    return Launch(bytes_kernel, grid, place.device, sizes, **meta)


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
    launch = _forward(_place(x, num_steps, config), norm.eps, res_norm.eps, *neuron[:2], neuron[5])
    before = (x, residual, *norm.tensors, norm.affine, *res_norm.tensors)
    if full:
        whole = torch.empty_like(x)
        launch(*before, None, None, whole, membrane)
        return whole, membrane
    spikes = Spikes(torch.empty_like(x, dtype=torch.int8), empty_turned(x, num_steps))
    launch(*before, *spikes, None, membrane)
    return spikes, membrane


@prepared
def _forward(place: _Place, eps: float, res_eps: float, threshold: float, decay: float, soft_reset: bool) -> Launch:
    grid, sizes, meta = _geometry("eight_bit_norm_fwd", place)
    return Launch(
        forward_kernel,
        grid,
        place.device,
        sizes,
        EPS=eps,
        R_EPS=res_eps,
        THRESHOLD=threshold,
        DECAY=decay,
        SOFT=soft_reset,
        **meta,
    )


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
    source = residual if membrane is None else membrane
    written = has_residual or source is not None or grad_spikes is None
    given = (residual is not None, membrane is not None, grad_spikes is not None, grad_membrane is not None)
    place, device, channels_last = _place(x, num_steps, config), x.device, is_channels_last(x)
    normed = res_norm.mean is not None
    launches = kept(_backward, neuron)(place, channels_last, norm.eps, res_norm.eps, neuron, given, normed, written)
    nothing = x.new_empty(0)
    ga = torch.empty_like(x) if written else nothing
    of_norm, of_res_norm = _empty_affine(norm), _empty_affine(res_norm)
    partial, factors, bound = [torch.empty(size, dtype=torch.float32, device=device) for size in launches.sizes]
    launches.reduce(
        grad_spikes, grad_membrane, x, source, residual, *norm.tensors, *res_norm.tensors, ga, partial, nothing, None
    )
    sums = torch.empty((3, x.shape[1]), dtype=torch.float32, device=device) if group else None
    affine = (*norm.tensors, res_norm.weight, res_norm.mean, res_norm.var)
    finished = (partial, *affine, conv_scale, total, sums, *of_norm, *of_res_norm, bound, factors)
    if sums is None:
        launches.finish(*finished)
    else:
        launches.begin_finish(*finished)
        dist.all_reduce(sums, group=eager.resolve_group(group))
        launches.end_finish(*finished)
    plain = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    turned, divisor = empty_turned(x, num_steps), torch.empty(1, dtype=torch.float32, device=device)
    first = ga if written else grad_spikes
    launches.apply(first, x, residual, factors, bound, divisor, plain.view(torch.uint8), turned, ga)
    return Gradients(plain, turned, divisor, ga if has_residual else nothing, of_norm, of_res_norm)


def _empty_affine(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """Unwritten gradients at weight and bias, None where there is none."""
    weight, bias = norm.weight, norm.bias
    return None if weight is None else torch.empty_like(weight), None if bias is None else torch.empty_like(bias)


class _Backward(NamedTuple):
    """Launches of a backward pass.

    Attributes:
        reduce: Sums and largest values of each channel.
        finish: What they make of a channel's gradient.
        begin_finish: The same in two parts, between which processes add up.
        end_finish: The second one.
        apply: Gradients.
        sizes: Of partial sums, factors and bounds in float32.
    """

    reduce: Launch
    finish: Launch
    begin_finish: Launch
    end_finish: Launch
    apply: Launch
    sizes: tuple[tuple[int, ...], ...]


@prepared
def _backward(
    place: _Place,
    channels_last: bool,
    eps: float,
    res_eps: float,
    neuron: tuple,
    given: tuple[bool, bool, bool, bool],
    normed: bool,
    written: bool,
) -> _Backward:
    shape, size, device, num_steps, _ = place
    residual, membrane, has_gs, has_gy = given
    channels, sums = shape[1], (3 if normed else 2) + 2
    kind = "_normed" if normed else "_residual" if residual or membrane else ""
    config = launch_config(f"norm_lif_bwd_reduce{kind}", num_steps, size, device)
    # The largest values take registers: of up to 168 or 208 a thread (sm_90, T=4) as many programs fit at once.
    config = config | {"PER_SM": min(config["PER_SM"], 2 if normed else 3)}
    tiles = tiles_of(shape, channels_last, num_steps, config, device)
    programs, count = tiles.grid[0], tiles.rows * num_steps
    names = ("THRESHOLD", "DECAY", "SURROGATE", "WIDTH", "DETACH", "SOFT")
    shared: dict[str, Any] = dict(zip(names, neuron, strict=True)) | {"NORMED": normed}
    of_norms: dict[str, Any] = dict(EPS=eps, R_EPS=res_eps, SUMS=sums)
    reduce = Launch(
        reduce_kernel,
        tiles.grid,
        device,
        (tiles.rows, channels, tiles.spatial, shape.numel() // num_steps, tiles.tiles),
        T=num_steps,
        STEPS=num_steps,
        RESIDUAL=residual,
        KEEP=membrane,
        HAS_GS=has_gs,
        HAS_GY=has_gy,
        WRITE=written,
        MAXES=True,
        **of_norms,
        **shared | kernel_constants(neuron[2], backward=True),
        **tiles.meta,
    )

    def finish(first: bool, last: bool) -> Launch:
        grid, numbers = (cdiv(channels, FINISH["BLOCK_C"]),), (programs, channels, count)
        flags = dict(NORMED=normed, FIRST=first, LAST=last)
        return Launch(finish_kernel, grid, device, numbers, **flags, **of_norms, **FINISH)

    grid, sizes, meta = _geometry("eight_bit_norm_bwd_apply", place)
    all_channels = next_power_of_2(channels)
    apply = Launch(apply_kernel, grid, device, sizes, RECOMPUTE=not written, ALL_C=all_channels, **shared, **meta)
    return _Backward(
        reduce,
        finish(True, True),
        finish(True, False),
        finish(False, True),
        apply,
        ((programs, sums, channels), (8, channels), (channels,)),
    )
