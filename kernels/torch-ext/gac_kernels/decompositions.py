"""The operators of inference as plain PyTorch operations, for exported programs that run without this package.

One function an operator, with the operator's arguments, values and memory formats: on a CPU also its bits.
`torch.export.ExportedProgram.run_decompositions` takes the table. No operator enters the table of torch.compile, which
keeps the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.shortcut import shortcut_stride
from .common.tiles import dense, is_channels_last
from .derivatives import spec_of
from .reference import of_channels, run_steps, state_dtype
from .reference.convolution import grid_shift
from .registry import neuron_by

Number = float | Tensor


def _learned(threshold: float, decay: float, values: Tensor | None, frame: Tensor) -> tuple[Number, Number]:
    """Threshold and decay as numbers or, from values (2, N), as they meet a frame (B, C, ...)."""
    if values is None:
        return threshold, decay
    decays, thresholds = (of_channels(row, frame) for row in values.unbind())
    return thresholds, decays


def _fire(
    currents: Sequence[Tensor],
    v: Tensor | None,
    threshold: Number,
    decay: Number,
    soft_reset: bool,
    surrogate: int = 0,
) -> Any:
    """The spikes of each step, bool, and the membrane after the last reset; currents and ``v`` in the state's dtype.

    Of a registered neuron spikes in the state's dtype and, where there are several, all states.
    """
    neuron = neuron_by(surrogate)
    if neuron is not None:
        assert not isinstance(threshold, Tensor) and not isinstance(decay, Tensor)  # nothing of it is learned
        spec = spec_of(threshold, decay, surrogate, 1.0, False, soft_reset)
        start = v if v is None or neuron.states > 1 else v[None]
        emitted, after = run_steps(torch.stack(list(currents)), start, spec, gradient=False)
        return emitted, torch.stack(after) if neuron.states > 1 else after[0]
    spikes = []
    for current in currents:
        u = current if v is None else v * decay + current
        fired = u > threshold
        v = u - fired.to(u.dtype) * threshold if soft_reset else torch.where(fired, 0.0, u)
        spikes.append(fired)
    return spikes, v


def _steps(x: Tensor, num_steps: int) -> list[Tensor]:
    """The steps of a time-folded (T*B, ...) tensor, (B, ...) each."""
    return list(x.unflatten(0, (num_steps, x.shape[0] // num_steps)).unbind())


def _fire_folded(
    current: Tensor,
    num_steps: int,
    threshold: Number,
    decay: Number,
    soft_reset: bool,
    dtype: torch.dtype,
    surrogate: int = 0,
) -> Tensor:
    """The spikes of a time-folded current, (T*B, ...) in ``dtype``."""
    wide = current.to(state_dtype(current.dtype))
    spikes, _ = _fire(_steps(wide, num_steps), None, threshold, decay, soft_reset, surrogate)
    return torch.cat(spikes).to(dtype)


def lif(
    x: Tensor,
    state: Tensor | None,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    keep_mask: bool,
    return_state: bool,
    values: Tensor | None = None,
) -> Any:
    """`gac_kernels.lif`; one that keeps a mask for a backward pass stays as it is."""
    if keep_mask:
        return NotImplemented
    wide = x.to(state_dtype(x.dtype))
    numbers = _learned(threshold, decay, values, x[0])
    spikes, v = _fire(list(wide.unbind()), state, *numbers, soft_reset, surrogate)
    nothing = x.new_empty(0, dtype=torch.float32)
    fired = torch.cat(spikes).view(x.shape) if x.dim() > 1 else torch.stack(spikes)
    return fired.to(x.dtype), v if return_state else nothing, nothing.to(torch.uint8)


def integer_lif(x: Tensor, num_steps: int, threshold: float, decay: float, soft_reset: bool) -> Tensor:
    """`gac_kernels.integer_lif`."""
    return _fire_folded(dense(x), num_steps, threshold, decay, soft_reset, torch.int8)


def _normed(x: Tensor, norm: Sequence[Tensor | None], eps: float) -> Tensor:
    """Batch norm of x with given statistics, or x + bias without them, in the state's dtype."""
    wide = x.to(state_dtype(x.dtype))
    weight, bias, mean, var = (None if v is None else v.to(wide.dtype) for v in norm)
    if mean is None:
        return wide if bias is None else wide + bias[:, None, None]
    return F.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps)


def norm_lif(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    total: Tensor | None,
    eps: float,
    num_steps: int,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    batch_stats: bool,
    keep_membrane: bool,
    group: str,
    res_weight: Tensor | None = None,
    res_bias: Tensor | None = None,
    res_mean: Tensor | None = None,
    res_var: Tensor | None = None,
    res_eps: float = 0.0,
    pack: bool = False,
    values: Tensor | None = None,
) -> Any:
    """`gac_kernels.norm_lif`; one that packs spikes for a backward pass stays as it is."""
    if pack:
        return NotImplemented
    x = dense(x)
    current = _normed(x, (weight, bias, mean, var), eps)
    if residual is not None:
        if res_mean is not None:
            residual = _normed(residual, (res_weight, res_bias, res_mean, res_var), res_eps)
        current = current + _in_format_of(x, residual)
    nothing = x.new_empty(0)
    membrane = current.to(x.dtype) if keep_membrane else nothing
    numbers = _learned(threshold, decay, values, x)
    seen = membrane if keep_membrane else current
    spikes = _fire_folded(seen, num_steps, *numbers, soft_reset, x.dtype, surrogate)
    return spikes, membrane, nothing.to(torch.uint8)


def _in_format_of(x: Tensor, other: Tensor) -> Tensor:
    return other.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _gated(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    threshold: Number,
    decay: Number,
    soft_reset: bool,
    surrogate: int,
) -> Any:
    """The gated spikes of each step, (B, C, H, W) each in x's dtype."""
    dtype, num_steps = state_dtype(x.dtype), temporal.shape[1]
    wide, scores = x.to(dtype), spatial.to(dtype)
    currents = [wide] * num_steps if x.dim() == 4 else list(wide.unbind())
    fired, _ = _fire(currents, None, threshold, decay, soft_reset, surrogate)
    gated = []
    for t, spikes in enumerate(fired):
        gate = torch.sigmoid(temporal[:, t, None, None, None].to(dtype) * (scores if x.dim() == 4 else scores[t]))
        gated.append((gate * spikes.to(dtype)).to(x.dtype))
    return gated


def _frames(steps: list[Tensor]) -> Tensor:
    """Steps (B, C, H, W) as (T, B, C, H, W), each frame in the memory order that they have."""
    return torch.cat(steps).unflatten(0, (len(steps), steps[0].shape[0]))


def gated_lif(
    x: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    values: Tensor | None = None,
) -> Tensor:
    """`gac_kernels.gac_encode` and `gac_kernels.gated_lif`."""
    numbers = _learned(threshold, decay, values, x if x.dim() == 4 else x[0])
    return _frames(_gated(x, spatial, temporal, *numbers, soft_reset, surrogate))


def gac_fire(
    stem: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    integer: bool,
    threshold: float,
    decay: float,
    surrogate: int,
    width: float,
    detach_reset: bool,
    soft_reset: bool,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gac_kernels.gac_fire`."""
    frame, pairs = stem if stem.dim() == 4 else stem[0], (None, None) if values is None else values.split(2)
    first, second = (_learned(threshold, decay, pair, frame) for pair in pairs)
    gated = _gated(stem, spatial, temporal, *first, soft_reset, surrogate)
    currents = [step.to(state_dtype(step.dtype)) for step in gated]
    fired, _ = _fire(currents, None, *second, soft_reset, surrogate)
    spikes = _frames(fired).to(torch.int8 if integer else stem.dtype)
    return _frames(gated), spikes


def pad_frames(x: Tensor, before: int, after: int, rectify: bool) -> Tensor:
    """`gac_kernels.pad_frames`."""
    x = dense(x)
    return _in_format_of(x, F.pad(x.relu() if rectify else x, [before, after, before, after]))


def pool_frames(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gac_kernels.pool_frames`: mean, maximum and the number of elements equal to it."""
    frame, dtype = (1, 2, 3), state_dtype(x.dtype)
    x = dense(x)
    maximum = x.amax(frame)
    return x.mean(frame, dtype=dtype), maximum, (x == maximum[:, None, None, None]).sum(frame, dtype=dtype)


def firing_rate(x: Tensor, num_steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """`gac_kernels.firing_rate`."""
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    x = dense(x)
    count = torch.sum(x.unflatten(0, (num_steps, x.shape[0] // num_steps)), 0, dtype=wide)
    return _in_format_of(x, (count / num_steps).to(dtype))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _shortcut(residual: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """A residual, convolved with its 1x1 weight where there is one, in the shape of ``like``; channels-last."""
    if weight is None:
        return _channels_last(residual)
    stride = shortcut_stride(tuple(residual.shape[2:]), tuple(like.shape[2:]))
    return _channels_last(F.conv2d(_channels_last(residual), weight, None, stride))


def conv_lif(
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
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gac_kernels.conv_lif`, as two passes."""
    current = _channels_last(F.conv2d(_channels_last(x), _channels_last(weight), None, stride, 1))
    current = current.to(state_dtype(x.dtype)) + bias.to(state_dtype(x.dtype))[:, None, None]
    if residual is not None:
        current = current + _shortcut(residual, shortcut, current)
    membrane = current.to(x.dtype) if keep_membrane else x.new_empty(0)
    seen = membrane if keep_membrane else current
    return _fire_folded(seen, num_steps, threshold, decay, soft_reset, x.dtype), membrane


def spike_conv(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    keep_membrane: bool,
    grid: float = 0.0,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gac_kernels.spike_conv`, its integers as float32, which holds them all."""
    spikes, weight = _channels_last(spikes), _channels_last(weight)
    # Rounding mends what an algorithm that transforms its input (Winograd, FFT) leaves.
    sums = _channels_last(F.conv2d(spikes.float(), weight.float(), None, stride, 1).round())
    shift, dtype = 0.0, torch.float32
    if residual is not None:
        residual = _shortcut(residual, shortcut, sums)
        if residual.is_floating_point():
            shift, dtype = grid_shift(grid), residual.dtype
            residual = residual.float() + shift if shift else residual.float()
    current = sums * scale[:, None, None] + (bias - shift)[:, None, None]
    if residual is not None:
        current = current + residual
    fired = _fire_folded(current, num_steps, threshold, decay, soft_reset, torch.int8)
    return fired, current.to(dtype) if keep_membrane else spikes.new_empty(0, dtype=dtype)


_FUNCTIONS = (
    lif,
    integer_lif,
    norm_lif,
    gated_lif,
    gac_fire,
    pad_frames,
    pool_frames,
    firing_rate,
    conv_lif,
    spike_conv,
)


def decomposition_table() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The operators of inference with their decompositions, for ``ExportedProgram.run_decompositions``.

    They are `lif`, `integer_lif`, `norm_lif`, `gated_lif` (which is `gac_encode` too), `gac_fire`, `pad_frames`,
    `pool_frames`, `firing_rate`, `conv_lif` and `spike_conv`.
    """
    return {getattr(torch.ops.gac_kernels, function.__name__).default: function for function in _FUNCTIONS}


@contextmanager
def registered_decompositions() -> Iterator[None]:
    """PyTorch's own table knows the decompositions within ``with``, for exporters that take no table.

    `torch.onnx.export` is one. The table is the whole process's, and fake tensors of symbolic shape use it too, so
    nothing should be compiled within.
    """
    table: dict[Any, Any] = torch._decomp.decomposition_table
    ours = decomposition_table()
    table.update(ours)
    try:
        yield
    finally:
        for op in ours:
            table.pop(op, None)
