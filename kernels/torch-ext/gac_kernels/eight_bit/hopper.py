"""Convolutions with operands of one byte on Hopper, in Gluon: which calls the kernel takes, and its launch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..common.layout import on_device
from ..common.tiles import multiprocessors
from ..convolution.hopper.launch import GLUON_ERROR as _GLUON_ERROR
from ..convolution.hopper.plan import SHARED_MEMORY, Call, Plan, pair_plan

_logger = logging.getLogger(__name__)

GLUON_ERROR = _GLUON_ERROR
if not GLUON_ERROR:
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from .hopper_kernel import sums_kernel
    except (ImportError, AttributeError) as error:  # absent, or changed: the kernel in plain Triton does the work
        GLUON_ERROR = str(error)

_CAPABILITY = (9, 0)
_SCRATCH = 6 * 1024  # bytes: barriers, and sums over warps
_DTYPES = {torch.int8: "int8", torch.float8_e4m3fn: "float8e4nv", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def plan_call(x: Tensor, out: Tensor, num_steps: int, stride: int, config: dict[str, int]) -> Plan | str:
    """How a call is divided among programs, or why this kernel cannot take it.

    Args:
        x: (T*B, C, H, W) of one byte an element.
        out: (T*B, C', H', W').
        num_steps: T, or any number that divides the frames.
        stride: 1 or 2.
        config: Launch parameters COPIES, STEPS and, for float8, PROMOTE; see `tuning`.
    """
    if GLUON_ERROR:
        return f"this Triton has no Gluon for it ({GLUON_ERROR})"
    if x.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(x.device) != _CAPABILITY:
        return "it is written for compute capability 9.0"
    if out.dtype not in _DTYPES or out.element_size() != 2:
        return f"the output is {out.dtype}, not 16 bits"
    if not config.get("COPIES", 0):
        return "its launch parameters leave it to plain Triton"
    return plan_of(x.shape, out.shape, num_steps, stride, config, lambda shared: _refusals.get((x.device, shared), ""))


def plan_of(
    shape: torch.Size, out_shape: torch.Size, num_steps: int, stride: int, config: dict[str, int], failure: Any
) -> Plan | str:
    """The plan of a call by its sizes; ``failure(shared)`` says why such plans are not compiled, if they are not."""
    (samples, channels, height, width), (_, out_channels, out_height, out_width) = shape, out_shape
    if channels % 32 or out_channels % 32:
        return f"{channels} to {out_channels} channels are not multiples of 32"
    if stride == 2 and (height % 2 or width % 2):
        return f"stride 2 needs even sizes, not {height}x{width}"
    call = Call(
        batch=samples // num_steps,
        channels=channels,
        out_channels=out_channels,
        height=out_height,
        width=out_width,
        num_steps=num_steps,
        stride=stride,
        operand_bytes=1,
        value_bytes=1,  # with an operand's byte, which is not stored here, the output's two
    )
    if reason := failure(False):
        return reason
    shared = not failure(True)
    copies = config["COPIES"] * (1 if shared else 2)
    for steps in {config["STEPS"] if num_steps % config["STEPS"] == 0 else 1: 0, 1: 0}:
        for fewer in range(copies, 1, -1):
            plan = pair_plan(call, fewer, steps, shared)
            plan = None if plan is None else _with_room(plan, stride)
            if plan is not None:
                return plan
    return "its buffers do not fit into shared memory"


def _with_room(plan: Plan, stride: int) -> Plan | None:
    """The plan with so many fewer buffers of weights that sums of statistics over warps have room."""
    rows, images, columns = plan.tile
    lines = rows + (2 if stride == 1 else rows + 1) * plan.shared
    pixels = 2 * plan.copies * plan.steps * lines * images * columns * plan.block_k
    stored = 2 * plan.steps * 64 * plan.block_n * 2
    room = SHARED_MEMORY - pixels - stored - 4 * 4 * plan.block_n - _SCRATCH
    ring = min(plan.ring, room // (plan.block_n * plan.block_k))
    return plan._replace(ring=ring) if ring >= 3 else None


# Of a GPU, and plans that share rows or do not: why they are not used, from the first call that did not compile.
_refusals: dict[tuple[torch.device, bool], str] = {}


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    divisor: Tensor | None,
    out: Tensor,
    num_steps: int,
    stride: int,
    stats: bool,
    config: dict[str, int],
) -> tuple[str, Tensor | None]:
    """Launch the kernel if it takes a call; arguments as of `launch` and `plan_call`.

    Returns:
        Why it does not take the call, empty where it does; and what `launch` returned.
    """
    while True:
        plan = plan_call(x, out, num_steps, stride, config)
        if isinstance(plan, str):
            return plan, None
        try:
            return "", launch(
                plan, x, weight, scale, divisor, out, num_steps, stride, stats, bool(config.get("PROMOTE", 1))
            )
        except Exception as error:  # whatever the compiler raises: there is another way to compute the same
            first = str(error).partition("\n")[0]
            reason = f"its kernel does not compile with this Triton ({type(error).__name__}: {first})"
            _refusals[x.device, plan.shared] = reason
            _logger.warning("training in 8 bits runs slower on this GPU than it could: %s", reason)


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, _DTYPES[tensor.dtype]))
    return TensorDescriptor(tensor, shape, strides, block, layout)


def _steps_descriptor(tensor: Tensor, num_steps: int, block: list[int]) -> Any:
    """(T*B, C, H, W), channels-last, as rows, steps, images, columns and channels."""
    samples, channels, height, width = tensor.shape
    batch, row = samples // num_steps, width * channels
    strides = [row, batch * height * row, height * row, channels, 1]
    return _descriptor(tensor, [height, num_steps, batch, width, channels], strides, block)


def _pairs_descriptor(tensor: Tensor, num_steps: int, block: list[int]) -> Any:
    """The same as pairs of rows, row of the pair, images, pairs of columns, column of the pair and channel."""
    samples, channels, height, width = tensor.shape
    row = width * channels
    shape = [height // 2, 2, samples, width // 2, 2 * channels]
    return _descriptor(tensor, shape, [2 * row, row, height * row, 2 * channels, 1], block)


def launch(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    divisor: Tensor | None,
    out: Tensor,
    num_steps: int,
    stride: int,
    stats: bool,
    promote: bool,
) -> Tensor | None:
    """Write the output; returns what `convolution.finish_statistics` takes, (parts, 3, C'), where that is wanted.

    Args:
        plan: What `plan_call` gave.
        x: (T*B, C, H, W) int8 or float8 e4m3, dense channels-last, as the output.
        weight: (C', 3, 3, C) in the same dtype.
        scale: (C',) float32, or None.
        divisor: One float32 value, or None.
        out: (T*B, C', H', W') float16 or bfloat16.
        num_steps: T.
        stride: 1 or 2.
        stats: Whether statistics are wanted.
        promote: Add sums of float8 products up in float32 on the way.
    """
    channels, (out_channels, height, width) = x.shape[1], out.shape[1:]
    batch = out.shape[0] // num_steps
    _, tiles_h, tiles_w = plan.tiles(batch, height, width)
    tiles_n = out_channels // plan.block_n
    outer = [plan.tile[0], 1, *plan.tile[1:], plan.block_n]
    taken = [*outer[:-1], plan.block_k]
    describe = _steps_descriptor if stride == 1 else _pairs_descriptor
    pixels = describe(x, num_steps, taken)
    edge = describe(x, num_steps, [2 // stride, *taken[1:]]) if plan.shared else pixels
    flat = weight.reshape(out_channels, 9 * channels)
    weights = _descriptor(flat, list(flat.shape), [9 * channels, 1], [plan.block_n, plan.block_k])
    pairs = plan.programs(batch, out_channels, height, width)
    # A multiple of the channel blocks: each program keeps its block of channels, and so its weights.
    at_once = max(multiprocessors(x.device) // tiles_n, 1) * tiles_n
    programs = min(pairs, at_once)
    partial = None
    if stats:
        partial = torch.empty((2 * (programs // tiles_n), 3, out_channels), dtype=torch.float32, device=x.device)
    with on_device(x):
        sums_kernel[(programs,)](
            pixels,
            edge,
            weights,
            _steps_descriptor(out, num_steps, outer),
            scale,
            divisor,
            partial,
            batch,
            height,
            width,
            channels,
            tiles_h,
            tiles_w,
            tiles_n,
            pairs,
            T=num_steps,
            STRIDE=stride,
            CHUNKS=channels // plan.block_k,
            STEPS=plan.steps,
            STATS=stats,
            PROMOTE=promote and x.dtype != torch.int8,
            BH=plan.tile[0],
            NB=plan.tile[1],
            BW=plan.tile[2],
            BN=plan.block_n,
            BK=plan.block_k,
            SHARED=plan.shared,
            COPIES=plan.copies,
            RING=plan.ring,
            num_warps=4,
        )
    return partial
