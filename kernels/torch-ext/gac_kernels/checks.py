"""Checks of what a user hands to an op: each failure says what was expected, what given and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common.messages import shown
from .common.shortcut import shortcut_stride
from .reference import state_dtype
from .spec import LIFSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Most input channels of a 3x3 convolution of spikes whose sums of int8 weights stay below 2**24, exact in float32.
MAX_INT8_CHANNELS = 2**24 // (9 * 128)


def check_tensor(name: str, x: object) -> None:
    """Raise unless ``x`` is a dense tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"expected {name} to be a tensor, got {shown(x)}: convert it with torch.as_tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else "sparse"
        raise ValueError(
            f"expected {name} as a dense tensor, got a {kind} one ({x.layout}): convert it with "
            f"{'torch.nested.to_padded_tensor' if x.is_nested else '.to_dense()'}"
        )


def check_tensors(**tensors: object) -> None:
    """Raise unless each is a dense tensor or None."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor)


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise unless ``value`` is a plain integer that is not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
        raise ValueError(f"expected {name} as an integer >= {minimum}, got {shown(value)}: give one such as {minimum}")


def check_flags(**flags: object) -> None:
    """Raise unless each is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"expected {name} as True or False, got {shown(flag)}: give one of these")


def check_finite(name: str, value: object, minimum: float) -> None:
    """Raise unless ``value`` is a finite number that is not below ``minimum``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not minimum <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"expected {name} as a finite number >= {minimum}, got {shown(value)}: give one such as 1e-5")


def check_steps(name: str, x: Tensor, num_steps: object) -> None:
    """Raise unless T is an integer >= 1 that divides the first axis of ``x``."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1 or x.shape[0] % num_steps:
        raise ValueError(
            f"expected num_steps >= 1 that divides the first axis of {name}, got {shown(num_steps)} and shape "
            f"{tuple(x.shape)}: fold time with x.flatten(0, 1)"
        )


def check_spec(spec: LIFSpec) -> None:
    """Raise unless ``spec`` is a `LIFSpec`."""
    if not isinstance(spec, LIFSpec):
        raise ValueError(f"expected spec to be a LIFSpec, got {type(spec).__name__}: use CIFAR or LIFSpec(...)")


def check_current(name: str, x: Tensor, min_dims: int, max_dims: int | None = None) -> None:
    """Raise unless ``x`` is a floating tensor of the right rank with at least one step."""
    check_tensor(name, x)
    if x.dtype not in DTYPES:
        names = [str(dtype) for dtype in DTYPES]
        raise ValueError(f"expected {name} in one of {names}, got {x.dtype}: convert it with .float()")
    if x.dim() < min_dims or (max_dims is not None and x.dim() > max_dims):
        rank = f"at least {min_dims}" if max_dims is None else f"{min_dims}" if max_dims == min_dims else "4 or 5"
        axes = {4: "(B, C, H, W)", 5: "(T, B, C, H, W)"}.get(min_dims, "(T, ...)")
        raise ValueError(f"expected {name} with {rank} axes, {axes}, got shape {tuple(x.shape)}: add or fold axes")
    if x.shape[0] == 0 and (max_dims is None or x.dim() == 5):
        raise ValueError(f"expected {name} with at least one time step, got shape {tuple(x.shape)}: give T >= 1 steps")


def check_state(state: Tensor | None, x: Tensor, states: int = 1) -> None:
    """Raise unless ``state`` is None or a membrane that fits ``x``; of several states, all of them."""
    if state is None:
        return
    check_tensor("state", state)
    expected = (*([states] if states > 1 else []), *x.shape[1:])
    if state.shape != expected:
        raise ValueError(
            f"expected state of shape {expected} (x without its time axis), got {tuple(state.shape)}: "
            "hand over the state that an earlier call returned for the same batch"
        )
    if state.dtype != state_dtype(x.dtype):
        raise ValueError(f"expected state in {state_dtype(x.dtype)}, got {state.dtype}: convert it with .to(...)")
    if state.device != x.device:
        raise ValueError(f"expected state on {x.device}, got {state.device}: move it with .to(x.device)")


def check_gate(x: Tensor, spatial: Tensor, temporal: Tensor) -> None:
    """Raise unless the two gate inputs fit the current ``x``, (B, C, H, W) or (T, B, C, H, W)."""
    for name, tensor in (("spatial", spatial), ("temporal", temporal)):
        check_tensor(name, tensor)
        if tensor.dtype not in DTYPES:
            raise ValueError(f"expected {name} to be a floating tensor, got {tensor.dtype}: convert it with .float()")
        if tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device}, got {tensor.device}: move it with .to(...)")
    if spatial.shape != x.shape or spatial.dtype != x.dtype:
        raise ValueError(
            f"expected spatial of shape {tuple(x.shape)} and dtype {x.dtype} like the current, got "
            f"{tuple(spatial.shape)} and {spatial.dtype}: compute it from the same tensor"
        )
    batch = x.shape[0] if x.dim() == 4 else x.shape[1]
    steps = temporal.shape[1] if x.dim() == 4 and temporal.dim() == 2 else x.shape[0]
    if tuple(temporal.shape) != (batch, steps) or steps == 0:
        expected = f"({batch}, T)" if x.dim() == 4 else f"({batch}, {steps})"
        raise ValueError(
            f"expected temporal of shape {expected} (batch, steps) with T >= 1, got {tuple(temporal.shape)}: give one "
            "score for each sample and step"
        )


def check_residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    res_weight: Tensor | None,
    res_bias: Tensor | None,
    res_mean: Tensor | None,
    res_var: Tensor | None,
    group: str = "",
) -> None:
    """Raise unless the residual's own norm, if any, fits the residual and the norm of ``x``."""
    given = [tensor for tensor in (res_weight, res_bias, res_mean, res_var) if tensor is not None]
    if not given:
        return
    if residual is None or res_mean is None or res_var is None:
        raise ValueError("expected a residual with mean and var for its norm, got a part of them: give all three")
    if (res_weight is None) != (weight is None) or (res_bias is None) != (weight is None):
        raise ValueError(
            "expected scale and shift for both norms or for neither, got them for one: give ones and zeros to the other"
        )
    if group:
        raise ValueError("expected no norm of the residual where statistics are shared over processes: apply it before")
    for tensor in given:
        _check_channels("the residual norm's tensors", tensor, x)


def check_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    num_steps: int,
    batch_stats: bool,
) -> None:
    """Raise unless residual, scale, shift and statistics fit the time-folded (T*B, C, H, W) tensor ``x``."""
    check_current("x", x, min_dims=4, max_dims=4)
    check_steps("x", x, num_steps)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"expected residual of shape {tuple(x.shape)}, {x.dtype}, on {x.device} like x, got "
            f"{tuple(residual.shape)}, {residual.dtype}, on {residual.device}: bring it to x's with .to(x)"
        )
    if (mean is None) != (var is None):
        raise ValueError("expected mean and var both or neither, got one: give both, or None for no normalisation")
    if mean is None and (weight is not None or batch_stats):
        raise ValueError("expected mean and var with a weight or batch_stats, got none: give them, or a bias alone")
    if mean is not None and (weight is None) != (bias is None):
        raise ValueError("expected weight and bias both or neither, got one: give ones or zeros for the other")
    for name, tensor in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)):
        if tensor is not None:
            _check_channels(name, tensor, x)


def _check_channels(name: str, tensor: Tensor, x: Tensor) -> None:
    shape = x.shape
    if tensor.dim() != 1 or tensor.shape[0] != shape[1] or tensor.device != x.device or tensor.dtype not in DTYPES:
        raise ValueError(
            f"expected {name} of shape ({shape[1]},) in a floating dtype on {x.device}, got {tuple(tensor.shape)} in "
            f"{tensor.dtype} on {tensor.device}: one value a channel, where x is"
        )
    if tensor.layout is not torch.strided:
        check_tensor(name, tensor)


def check_running(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless a running statistic fits the channels of ``x`` and can be written in place."""
    check_tensor(name, tensor)
    _check_channels(name, tensor, x)
    if tensor.requires_grad or (tensor.shape[0] > 1 and tensor.stride(0) == 0):
        why = "one that requires a gradient" if tensor.requires_grad else "an expanded one"
        raise ValueError(f"expected {name} as a tensor to write into, got {why}: give a buffer's own memory")


def check_spike_conv(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    grid: float,
    shortcut: Tensor | None,
) -> None:
    """Raise unless weights, scale, bias, residual and grid fit the time-folded int8 spikes (T*B, C, H, W)."""
    for name, tensor in (("spikes", spikes), ("weight", weight)):
        check_tensor(name, tensor)
        if tensor.dtype != torch.int8 or tensor.dim() != 4:
            given = f"{tensor.dtype}, {tuple(tensor.shape)}"
            raise ValueError(f"expected {name} as int8 with 4 axes, got {given}: convert them with .to(torch.int8)")
    check_conv3x3(
        name="spikes",
        x=spikes,
        weight=weight,
        num_steps=num_steps,
        stride=stride,
    )
    channels, out_channels = spikes.shape[1], weight.shape[0]
    if channels > MAX_INT8_CHANNELS:
        raise ValueError(f"expected at most {MAX_INT8_CHANNELS:,} channels, got {channels:,}: sums would lose bits")
    for name, tensor in (("scale", scale), ("bias", bias)):
        check_tensor(name, tensor)
        if tensor.shape != (out_channels,) or tensor.dtype != torch.float32:
            raise ValueError(
                f"expected {name} of shape ({out_channels},) in float32, got {tuple(tensor.shape)} in {tensor.dtype}: "
                "give one value an output channel"
            )
    shape = conv3x3_shape(spikes, weight, stride)
    if shortcut is not None:
        _check_shortcut(residual, shortcut, shape)
    elif residual is not None and (tuple(residual.shape) != shape or residual.dtype not in (*DTYPES[:3], torch.int8)):
        raise ValueError(
            f"expected residual of shape {shape} in float32, float16, bfloat16 or int8, got {tuple(residual.shape)} in "
            f"{residual.dtype}: it is added to the convolution's output"
        )
    number = isinstance(grid, (int, float)) and not isinstance(grid, bool)
    if not number or (grid != 0.0 and not (2.0**-24 <= grid <= 1.0 and math.frexp(grid)[0] == 0.5)):
        raise ValueError(
            f"expected grid as a power of two from 2**-24 to 1, or 0, got {shown(grid)}: give one such as 2**-15"
        )
    check_device(spikes, weight=weight, scale=scale, bias=bias, residual=residual, shortcut=shortcut)


def check_int8_conv2d(spikes: Tensor, weight: Tensor, stride: int, bits: Tensor | None, num_steps: int) -> None:
    """Raise unless a weight that learns, and bits, fit the time-folded spikes (T*B, C, H, W)."""
    check_current("spikes", spikes, min_dims=4, max_dims=4)
    check_integer("num_steps", num_steps, 1)
    check_current("weight", weight, min_dims=4, max_dims=4)
    check_conv3x3("spikes", spikes, weight, num_steps, stride)
    if spikes.shape[1] > MAX_INT8_CHANNELS:
        raise ValueError(
            f"expected at most {MAX_INT8_CHANNELS:,} channels, got {spikes.shape[1]:,}: sums would lose bits"
        )
    check_device(spikes, weight=weight)
    if bits is not None:
        check_bits(spikes, bits, num_steps)


def check_bits(spikes: Tensor, bits: Tensor, num_steps: int) -> None:
    """Raise unless ``bits`` can be what `pack_spikes` makes of the spikes."""
    check_tensor("bits", bits)
    size = (-(-num_steps // 8) * (spikes.shape[0] // num_steps), *spikes.shape[1:])  # eight steps a byte
    if bits.dtype != torch.uint8 or bits.shape != size or bits.device != spikes.device:
        raise ValueError(
            f"expected bits as uint8 {size} on {spikes.device}, got {bits.dtype} {tuple(bits.shape)} on "
            f"{bits.device}: make them of these spikes with pack_spikes"
        )


def check_conv_lif(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    shortcut: Tensor | None,
) -> None:
    """Raise unless weights, bias and residual fit the time-folded input (T*B, C, H, W)."""
    check_current("x", x, min_dims=4, max_dims=4)
    check_tensor("weight", weight)
    check_tensor("bias", bias)
    check_conv3x3(
        name="x",
        x=x,
        weight=weight,
        num_steps=num_steps,
        stride=stride,
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if bias.shape != weight.shape[:1] or bias.dtype != wide:
        raise ValueError(
            f"expected bias of shape ({len(weight)},) in {wide}, got {tuple(bias.shape)} in {bias.dtype}: give one "
            "value an output channel"
        )
    shape = conv3x3_shape(x, weight, stride)
    if shortcut is not None:
        _check_shortcut(residual, shortcut, shape)
        assert residual is not None
        shape = tuple(residual.shape)
    for name, tensor, size in (("weight", weight, weight.shape), ("residual", residual, shape)):
        if tensor is not None and (tuple(tensor.shape) != tuple(size) or tensor.dtype != x.dtype):
            raise ValueError(
                f"expected {name} of shape {tuple(size)} in {x.dtype} like x, got {tuple(tensor.shape)} in "
                f"{tensor.dtype}: bring it to x's with .to(x.dtype)"
            )
    check_device(x, weight=weight, bias=bias, residual=residual, shortcut=shortcut)


def _check_shortcut(residual: Tensor | None, shortcut: Tensor, shape: tuple[int, ...]) -> None:
    if residual is None or residual.dim() != 4 or residual.dtype not in DTYPES or residual.dtype != shortcut.dtype:
        given = "none" if residual is None else f"{tuple(residual.shape)} in {residual.dtype}"
        raise ValueError(
            f"expected a residual with 4 axes in the shortcut's {shortcut.dtype}, a floating dtype, got {given}: give "
            "what the shortcut convolves"
        )
    if tuple(shortcut.shape) != (shape[1], residual.shape[1], 1, 1):
        raise ValueError(
            f"expected shortcut of shape {(shape[1], residual.shape[1], 1, 1)}, got {tuple(shortcut.shape)}: give a "
            "1x1 convolution's weight"
        )
    if residual.shape[0] != shape[0] or not shortcut_stride(tuple(residual.shape[2:]), shape[2:]):
        raise ValueError(
            f"expected a residual of {shape[0]} frames that a stride of 1 or 2 brings to {shape[2:]}, got "
            f"{tuple(residual.shape)}: give the block's input"
        )


def check_conv3x3(name: str, x: Tensor, weight: Tensor, num_steps: int, stride: int) -> None:
    """Raise unless ``weight`` is a 3x3 convolution of the time-folded ``x`` with stride 1 or 2."""
    check_steps(name, x, num_steps)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"expected stride 1 or 2, got {shown(stride)}: use PyTorch's convolution for others")
    if x.shape[1] == 0:
        raise ValueError(f"expected {name} with at least one channel, got shape {tuple(x.shape)}: give C >= 1")
    if tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(
            f"expected weight of shape (C', {x.shape[1]}, 3, 3) for {name} {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}: give a 3x3 convolution of as many input channels"
        )


def conv3x3_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    """The output's shape (T*B, C', H', W') of a 3x3 convolution with padding 1."""
    return (x.shape[0], weight.shape[0], *((n - 1) // stride + 1 for n in x.shape[2:]))


def check_device(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless all are on the device of ``x``."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"expected {name} on {x.device}, got {other.device}: move it with .to(...)")
