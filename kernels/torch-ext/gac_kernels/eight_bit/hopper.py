"""Convolutions with operands of one byte on Hopper, in Gluon: which calls the kernel takes, and its launch."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.launch import Descriptor, Launch
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


class Prepared(NamedTuple):
    """A launch of the kernel.

    Attributes:
        launch: Of the operand twice, weight, output, scale, divisor and partial sums.
        parts: Of how many parts the statistics are.
        kind: Its GPU, and whether its plan shares rows: those that compile or do not compile together.
    """

    launch: Launch
    parts: int
    kind: tuple[torch.device, bool]


class Work(NamedTuple):
    """A convolution to compute.

    Attributes:
        shape: (T*B, C, H, W) of the operand, of one byte an element.
        out_shape: (T*B, C', H', W').
        operand: Dtype of the operand, int8 or float8 e4m3.
        dtype: Of the output.
        device: Of all.
        num_steps: T, or any number that divides the frames.
        stride: 1 or 2.
        stats: Whether statistics are wanted.
    """

    shape: torch.Size
    out_shape: torch.Size
    operand: torch.dtype
    dtype: torch.dtype
    device: torch.device
    num_steps: int
    stride: int
    stats: bool


def prepare(work: Work, config: dict[str, int]) -> Prepared | str:
    """The launch of the kernel, or why it cannot do the work.

    Args:
        work: What to compute.
        config: Launch parameters COPIES, STEPS and, for float8, PROMOTE; see `tuning`.
    """
    shape, out_shape, _, dtype, device, num_steps, stride, _ = work
    if GLUON_ERROR:
        return f"this Triton has no Gluon for it ({GLUON_ERROR})"
    if reason := wrong_device(device):
        return reason
    if dtype not in _DTYPES or dtype.itemsize != 2:
        return f"the output is {dtype}, not 16 bits"
    if not config.get("COPIES", 0):
        return "its launch parameters leave it to plain Triton"
    failure = functools.partial(_refusal, device)
    num_steps = steps_per_unit(shape, out_shape, num_steps, stride, config, multiprocessors(device))
    plan = plan_of(shape, out_shape, num_steps, stride, config, failure)
    if isinstance(plan, str):
        return plan
    return prepare_launch(plan, work._replace(num_steps=num_steps), bool(config.get("PROMOTE", 1)))


def wrong_device(device: torch.device) -> str:
    """Why a device cannot run the kernel; empty where it can."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != _CAPABILITY:
        return "it is written for compute capability 9.0"
    return ""


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


def steps_per_unit(
    shape: torch.Size, out_shape: torch.Size, num_steps: int, stride: int, config: dict[str, int], processors: int
) -> int:
    """How many frames, as if they were steps, a unit of work has: T, or a divisor where that leaves less idle.

    A program takes units in turn, each for all of its steps, so a GPU is busy for as many steps as the longest program
    has. 256 channels of 14x14 pixels and 64 images are 196 units of 4 steps for 132 multiprocessors, 8 steps for the
    longest, but 392 units of 2 steps, 6 for the longest. Each unit begins its copies anew, so 5 % decide for T.
    """

    def longest(steps: int) -> float:
        plan = plan_of(shape, out_shape, steps, stride, config, lambda _: "")
        if isinstance(plan, str):
            return math.inf
        _, out_channels, height, width = out_shape
        tiles_n = out_channels // plan.block_n
        units = plan.programs(shape[0] // steps, out_channels, height, width)
        return steps * math.ceil(units / (max(processors // tiles_n, 1) * tiles_n))

    found = num_steps
    for steps in range(num_steps - 1, 0, -1):
        if num_steps % steps == 0 and longest(steps) < 0.95 * longest(found):
            found = steps
    return found


# Of a GPU, and plans that share rows or do not: why they are not used, from the first call that did not compile.
_refusals: dict[tuple[torch.device, bool], str] = {}


def _refusal(device: torch.device, shared: bool) -> str:
    return _refusals.get((device, shared), "")


def run(
    prepared: Prepared,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scale: Tensor | None,
    divisor: Tensor | None,
    partial: Tensor | None,
) -> bool:
    """Launch the kernel, and say whether it was; where it does not compile, no later call is prepared that way.

    Args:
        prepared: What `prepare` gave.
        x: (T*B, C, H, W) int8 or float8 e4m3, dense channels-last, as the output.
        weight: (C', 3, 3, C) in the same dtype.
        out: (T*B, C', H', W') float16 or bfloat16, which is written.
        scale: (C',) float32, or None.
        divisor: One float32 value, or None.
        partial: (parts, 3, C') float32, what `convolution.finish_statistics` takes, where statistics are wanted.
    """
    try:
        prepared.launch(x, x, weight, out, scale, divisor, partial)
    except Exception as error:  # whatever the compiler raises: there is another way to compute the same
        first = str(error).partition("\n")[0]
        reason = f"its kernel does not compile with this Triton ({type(error).__name__}: {first})"
        _refusals[prepared.kind] = reason
        _logger.warning("training in 8 bits runs slower on this GPU than it could: %s", reason)
        return False
    return True


def _descriptor(dtype: torch.dtype, shape: list[int], strides: list[int], block: list[int]) -> Descriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, _DTYPES[dtype]))
    return Descriptor(TensorDescriptor, shape, strides, block, layout)


def _steps_descriptor(dtype: torch.dtype, size: torch.Size, num_steps: int, block: list[int]) -> Descriptor:
    """(T*B, C, H, W), channels-last, as rows, steps, images, columns and channels."""
    samples, channels, height, width = size
    batch, row = samples // num_steps, width * channels
    strides = [row, batch * height * row, height * row, channels, 1]
    return _descriptor(dtype, [height, num_steps, batch, width, channels], strides, block)


def _pairs_descriptor(dtype: torch.dtype, size: torch.Size, num_steps: int, block: list[int]) -> Descriptor:
    """The same as pairs of rows, row of the pair, images, pairs of columns, column of the pair and channel."""
    samples, channels, height, width = size
    row = width * channels
    shape = [height // 2, 2, samples, width // 2, 2 * channels]
    return _descriptor(dtype, shape, [2 * row, row, height * row, 2 * channels, 1], block)


def prepare_launch(plan: Plan, work: Work, promote: bool) -> Prepared:
    """The launch by a plan.

    Args:
        plan: What `plan_of` gave.
        work: What to compute.
        promote: Add sums of float8 products up in float32 on the way.
    """
    shape, out_shape, operand, dtype, device, num_steps, stride, stats = work
    samples, out_channels, height, width = out_shape
    channels, batch = shape[1], samples // num_steps
    _, tiles_h, tiles_w = plan.tiles(batch, height, width)
    tiles_n = out_channels // plan.block_n
    outer = [plan.tile[0], 1, *plan.tile[1:], plan.block_n]
    taken = [*outer[:-1], plan.block_k]
    describe = _steps_descriptor if stride == 1 else _pairs_descriptor
    pixels = describe(operand, shape, num_steps, taken)
    edge = describe(operand, shape, num_steps, [2 // stride, *taken[1:]]) if plan.shared else pixels
    blocks = [plan.block_n, plan.block_k]
    weights = _descriptor(operand, [out_channels, 9 * channels], [9 * channels, 1], blocks)
    pairs = plan.programs(batch, out_channels, height, width)
    # A multiple of the channel blocks: each program keeps its block of channels, and so its weights.
    at_once = max(multiprocessors(device) // tiles_n, 1) * tiles_n
    programs = min(pairs, at_once)
    launch = Launch(
        sums_kernel,
        (programs,),
        device,
        (batch, height, width, channels, tiles_h, tiles_w, tiles_n, pairs),
        (pixels, edge, weights, _steps_descriptor(dtype, out_shape, num_steps, outer)),
        T=num_steps,
        STRIDE=stride,
        CHUNKS=channels // plan.block_k,
        STEPS=plan.steps,
        STATS=stats,
        PROMOTE=promote and operand != torch.int8,
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
    return Prepared(launch, 2 * (programs // tiles_n), (device, plan.shared))
