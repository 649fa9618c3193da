"""Convolution and neuron in one pass for Hopper, in Gluon: which kernel takes a call, and its launch.

`spike_conv` uses it with int8 operands, `conv_lif` with 16-bit ones. TMA copies fill shared memory, tensor cores read
it, and the membrane stays in registers; residual, current and spikes go through shared memory too. Calls that fill the
GPU run in `pair`, smaller ones in `ring`.

Gluon is experimental in Triton: what uses it is in this package, `plan_call` says where they apply, and where a
version of Triton does not compile them, that is logged and the other implementations run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...common.layout import on_device
from ...common.tiles import multiprocessors
from ...common.triton import is_embedding
from .plan import Call, Plan, pair_plan, ring_plan

_logger = logging.getLogger(__name__)

GLUON_ERROR = ""
try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .pair import pair_kernel
    from .ring import ring_kernel
except (ImportError, AttributeError) as error:  # absent, or changed: the kernel in plain Triton does the work
    GLUON_ERROR = str(error)

_CAPABILITY = (9, 0)
_GLUON_DTYPES = {torch.int8: "int8", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def plan_call(
    spikes: Tensor,
    out: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
    membrane: Tensor,
    num_steps: int,
    stride: int,
    config: dict[str, int],
) -> Plan | str:
    """How a call is divided among programs, or why these kernels cannot take it.

    Args:
        spikes: Input (T*B, C, H, W).
        out: Output spikes (T*B, C', H', W').
        residual: Of the call, or what the shortcut convolves.
        shortcut: Weight of the 1x1 shortcut, or None.
        membrane: Output for the neuron's input current, or empty.
        num_steps: T.
        stride: 1 or 2.
        config: Launch parameters, see `tuning`.
    """
    (channels, height, width), (out_channels, out_height, out_width) = spikes.shape[1:], out.shape[1:]
    if is_embedding():
        return "compilers put no Gluon kernels into their graphs"
    if GLUON_ERROR:
        return f"this Triton has no Gluon for it ({GLUON_ERROR})"
    if (
        spikes.device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(spikes.device) != _CAPABILITY
    ):
        return "it is written for compute capability 9.0"
    if channels % 32 or out_channels % 32:
        return f"{channels} to {out_channels} channels are not multiples of 32"
    if stride == 2 and (height % 2 or width % 2):
        return f"stride 2 needs even sizes, not {height}x{width}"
    if any(t.data_ptr() % 16 for t in (spikes, out, residual, shortcut, membrane) if t is not None):
        return "a tensor does not begin at a multiple of 16 bytes"
    if residual is not None and membrane.numel() and residual.dtype != membrane.dtype:
        return "residual and membrane have different dtypes"
    kept = membrane if membrane.numel() else residual if shortcut is None else None
    call = Call(
        batch=spikes.shape[0] // num_steps,
        channels=channels,
        out_channels=out_channels,
        height=out_height,
        width=out_width,
        num_steps=num_steps,
        stride=stride,
        operand_bytes=spikes.element_size(),
        value_bytes=0 if kept is None else kept.element_size(),
        shortcut_channels=0 if shortcut is None else shortcut.shape[1],
    )
    processors = multiprocessors(spikes.device)
    plan = None
    if config["COPIES"] and (spikes.device, PAIR) not in _refusals:
        plan = _fitting(call, config, shared=(spikes.device, PAIR_SHARED) not in _refusals)
    fills = plan is not None and 2 * plan.programs(*call.frames) > processors
    if shortcut is not None:
        if plan is None or not fills:
            reason = "only the kernel with two tiles per program takes a shortcut"
            return reason if plan is None else f"{reason}, and this call would not fill the GPU with it"
        return _refused_shortcut(residual, shortcut, call, plan) or plan
    if plan is not None and fills:
        return plan
    return _refusals.get((spikes.device, RING)) or ring_plan(call, processors)


def _fitting(call: Call, config: dict[str, int], shared: bool) -> Plan | None:
    """The plan with two tiles per program that is nearest to the launch parameters and fits into shared memory."""
    copies, steps = config["COPIES"] * (1 if shared else 2), min(config["STEPS"], call.num_steps)
    if call.shortcut_channels:  # the sums of both convolutions need as many registers as two steps
        steps = 1
    tries = (pair_plan(call, fewer, s, shared) for s in range(steps, 0, -1) for fewer in range(copies, 1, -1))
    return next((plan for plan in tries if plan is not None), None)


def _refused_shortcut(residual: Tensor | None, shortcut: Tensor, call: Call, plan: Plan) -> str:
    """Why a shortcut's convolution is not fused; empty where it is."""
    assert residual is not None
    depth = plan.block_k * call.operand_bytes // shortcut.element_size()
    if shortcut.element_size() != 2 or residual.dtype != shortcut.dtype:
        return f"the shortcut is {shortcut.dtype} of {residual.dtype}, not 16 bits of 16 bits"
    if shortcut.shape[1] % depth:
        return f"the shortcut's {shortcut.shape[1]} input channels are not a multiple of {depth}"
    if residual.shape[2:] not in ((call.height, call.width), (2 * call.height, 2 * call.width)):
        return f"the shortcut goes from {tuple(residual.shape[2:])} to {(call.height, call.width)}"
    return ""


def run(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    shift: float,
    out: Tensor,
    membrane: Tensor,
    config: dict[str, int],
) -> str:
    """Launch the kernel that takes a call, if one does; arguments as of `launch` and `plan_call`.

    A kernel that this version of Triton refuses is not asked again: the next one takes the call.

    Returns:
        Why no kernel takes the call; empty where one was launched.
    """
    while True:
        plan = plan_call(
            spikes=spikes,
            out=out,
            residual=residual,
            shortcut=shortcut,
            membrane=membrane,
            num_steps=num_steps,
            stride=stride,
            config=config,
        )
        if isinstance(plan, str):
            return plan
        try:
            launch(
                plan=plan,
                spikes=spikes,
                weight=weight,
                scale=scale,
                bias=bias,
                residual=residual,
                shortcut=shortcut,
                num_steps=num_steps,
                stride=stride,
                threshold=threshold,
                decay=decay,
                soft_reset=soft_reset,
                shift=shift,
                out=out,
                membrane=membrane,
            )
        except Exception as error:  # whatever the compiler raises: there is another way to compute the same
            _note_refusal(spikes.device, kernel_of(plan), error)
        else:
            return ""


RING, PAIR, PAIR_SHARED = "ring", "pair", "pair with rows shared"
# Of a GPU and a kernel: why it is not used, from the first call for which it did not compile.
_refusals: dict[tuple[torch.device, str], str] = {}


def kernel_of(plan: Plan) -> str:
    """Which kernel a plan runs: ``ring``, ``pair`` or ``pair with rows shared``."""
    return (PAIR_SHARED if plan.shared else PAIR) if plan.copies else RING


def _note_refusal(device: torch.device, kernel: str, error: Exception) -> None:
    first = str(error).partition("\n")[0]
    reason = f"its kernel does not compile with this Triton ({type(error).__name__}: {first})"
    _refusals[device, kernel] = reason
    _logger.warning("spiking convolutions run slower on this GPU than they could (%s): %s", kernel, reason)


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    dtype = getattr(gl, _GLUON_DTYPES[tensor.dtype])
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
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
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    shift: float,
    out: Tensor,
    membrane: Tensor,
) -> None:
    """Write spikes and, where it has elements, the neuron's input current.

    Args:
        plan: What `plan_call` gave.
        spikes: (T*B, C, H, W) int8, float16 or bfloat16, dense channels-last, as all four-dimensional tensors here.
        weight: (C', C, 3, 3) in the spikes' dtype.
        scale: (C',) float32, or None for 1.
        bias: (C',) float32.
        residual: (T*B, C', H', W') or None; with a shortcut what it convolves, (T*B, C'', H'', W'').
        shortcut: Weight (C', C'', 1, 1) in the residual's dtype, or None.
        num_steps: T.
        stride: 1 or 2.
        threshold: Of the neuron.
        decay: Of the neuron.
        soft_reset: Of the neuron.
        shift: Added to the residual, which rounds it to a grid (`grid_shift`), and subtracted from the bias; or 0.
        out: (T*B, C', H', W') in the spikes' dtype.
        membrane: As out, or empty.
    """
    channels, (out_channels, height, width) = spikes.shape[1], out.shape[1:]
    batch = out.shape[0] // num_steps
    _, tiles_h, tiles_w = plan.tiles(batch, height, width)
    tiles_n = out_channels // plan.block_n
    outer = [plan.tile[0], 1, *plan.tile[1:], plan.block_n]
    taken = [*outer[:-1], plan.block_k]
    describe = _steps_descriptor if stride == 1 else _pairs_descriptor
    pixels = describe(spikes, num_steps, taken)
    weights = _descriptor(weight, [out_channels, 9 * channels], [9 * channels, 1], [plan.block_n, plan.block_k])
    fired = _steps_descriptor(out, num_steps, outer)
    kept, source = fired, fired
    if residual is not None and shortcut is None:
        source = _steps_descriptor(residual, num_steps, outer)
    if membrane.numel():
        kept = _steps_descriptor(membrane, num_steps, outer)
    constants: dict[str, Any] = dict(
        T=num_steps,
        STRIDE=stride,
        CHUNKS=channels // plan.block_k,
        STEPS=plan.steps,
        THRESHOLD=threshold,
        DECAY=decay,
        SOFT=soft_reset,
        RESIDUAL=residual is not None and shortcut is None,
        SHIFT=shift,
        KEEP=membrane.numel() > 0,
        BH=plan.tile[0],
        NB=plan.tile[1],
        BW=plan.tile[2],
        BN=plan.block_n,
        BK=plan.block_k,
        RING=plan.ring,
        SCALED=scale is not None,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where every other path rounds twice
    )
    programs = plan.programs(batch, out_channels, height, width)
    if not plan.copies:
        with on_device(spikes):
            ring_kernel[(programs,)](
                pixels,
                weights,
                fired,
                source,
                kept,
                scale,
                bias,
                batch,
                channels,
                tiles_h,
                tiles_w,
                tiles_n,
                **constants,
            )
        return
    edge = describe(spikes, num_steps, [2 // stride, *taken[1:]]) if plan.shared else pixels
    shortcut_weights, shortcut_chunks, shortcut_stride = weights, 0, 1
    if residual is not None and shortcut is not None:
        depth, inputs = plan.block_k * spikes.element_size() // 2, shortcut.shape[1]
        shortcut_chunks, shortcut_stride = inputs // depth, residual.shape[2] // height
        describe = _steps_descriptor if shortcut_stride == 1 else _pairs_descriptor
        source = describe(residual, num_steps, [*taken[:-1], depth])
        shortcut_weights = _descriptor(shortcut, [out_channels, inputs], [inputs, 1], [plan.block_n, depth])
    # A multiple of the channel blocks: each program keeps its block of channels, and so its weights.
    at_once = max(multiprocessors(spikes.device) // tiles_n, 1) * tiles_n
    with on_device(spikes):
        pair_kernel[(min(programs, at_once),)](
            pixels,
            edge,
            weights,
            fired,
            source,
            kept,
            shortcut_weights,
            scale,
            bias,
            batch,
            channels,
            tiles_h,
            tiles_w,
            tiles_n,
            programs,
            SHORTCUT_CHUNKS=shortcut_chunks,
            SHORTCUT_STRIDE=shortcut_stride,
            SHARED=plan.shared,
            COPIES=plan.copies,
            **constants,
        )
