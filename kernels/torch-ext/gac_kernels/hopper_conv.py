"""Convolution and neuron in one pass for Hopper, in Gluon: tensor copies fill a ring that tensor cores drain.

`spike_conv` uses it with int8 operands, `conv_lif` with 16-bit ones.

A program owns ``BM = BH * NB * BW`` output pixels (rows, images, columns) by BN channels at all time steps. For every
tap of the 3x3 window and every BK input channels, one stage of a ring takes the shifted pixels and the weights; the
weights of a stage serve STEPS time steps. The membrane stays in registers; residual, membrane and spikes travel
through shared memory too.

Gluon is experimental in Triton: everything that uses it is in this file, `plan` says where the file applies, and where
a version of Triton does not compile it, that is logged and the other implementations run.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from .hopper_tiles import Plan, spread, tile_of
from .layout import on_device
from .tiles import multiprocessors

_logger = logging.getLogger(__name__)

GLUON_ERROR = ""
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    _barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
except (ImportError, AttributeError) as error:  # absent, or changed: the kernel in plain Triton does the work
    GLUON_ERROR = str(error)

_CAPABILITY = (9, 0)
_SHARED_MEMORY = 227 * 1024  # bytes that a Hopper program can have
_GLUON_DTYPES = {torch.int8: "int8", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def plan(
    spikes: Tensor, out: Tensor, residual: Tensor | None, membrane: Tensor, num_steps: int, stride: int,
    config: dict[str, int],
) -> Plan | str:  # fmt: skip
    """The division of a call, or why this kernel cannot take it.

    Args:
        spikes: Input (T*B, C, H, W).
        out: Output spikes (T*B, C', H', W').
        residual: Of the call.
        membrane: Output of the call, or empty.
        num_steps: T.
        stride: 1 or 2.
        config: Launch parameters, see `tuning`.
    """
    (channels, height, width), (out_channels, out_height, out_width) = spikes.shape[1:], out.shape[1:]
    if GLUON_ERROR:
        return f"this Triton has no Gluon for it ({GLUON_ERROR})"
    if (
        spikes.device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(spikes.device) != _CAPABILITY
    ):
        return "it is written for compute capability 9.0"
    if failure := _failure(spikes.device):
        return failure
    if channels % 32 or out_channels % 32:
        return f"{channels} to {out_channels} channels are not multiples of 32"
    if stride == 2 and (height % 2 or width % 2):
        return f"stride 2 needs even sizes, not {height}x{width}"
    if any(tensor.data_ptr() % 16 for tensor in (spikes, out, residual, membrane) if tensor is not None):
        return "a tensor does not begin at a multiple of 16 bytes"
    if residual is not None and membrane.numel() and residual.dtype != membrane.dtype:
        return "residual and membrane have different dtypes"
    size, batch = spikes.element_size(), spikes.shape[0] // num_steps
    block_k = next(n for n in (128 // size, 64 // size, 32 // size) if channels % n == 0)
    block_n = next(n for n in (128, 64, 32) if n <= config["BLOCK_N"] and out_channels % n == 0)
    kept = residual if residual is not None else membrane if membrane.numel() else None
    made = Plan(
        tile_of(config["BLOCK_M"], batch, out_height, out_width), block_n, block_k, config["RING"],
        min(config["STEPS"], num_steps), config["num_warps"],
    )  # fmt: skip
    if made.shared_bytes(size, 0 if kept is None else kept.element_size()) > _SHARED_MEMORY:
        made = made._replace(tile=tile_of(64, batch, out_height, out_width), ring=3, steps=1, num_warps=4)
    return spread(made, batch, out_channels, out_height, out_width, multiprocessors(spikes.device))


if not GLUON_ERROR:

    @gluon.jit
    def _copy_tap(
        x_desc, w_desc, pixels, weights, ready, tap, active, b0, h0, w0, n0, B, C,
        STRIDE: gl.constexpr, STEPS: gl.constexpr, CHUNKS: gl.constexpr, RING: gl.constexpr, BK: gl.constexpr,
        BYTES: gl.constexpr,
    ):  # fmt: skip
        """Start the copies of a tap: BK channels of pixels at STEPS time steps, and their weights.

        Taps run over the window's rows and columns, then channels, then time. What lies outside is copied as 0.
        """
        slot = tap % RING
        kh = tap % 9 // 3
        kw = tap % 3
        first = tap // 9 % CHUNKS * BK
        step = tap // (9 * CHUNKS) * STEPS
        done = ready.index(slot)
        mbarrier.expect(done, BYTES, pred=active)
        column = (kh * 3 + kw) * C + first
        tma.async_copy_global_to_shared(w_desc, [n0, column], done, weights.index(slot), pred=active)
        for s in gl.static_range(STEPS):
            tile = pixels.index(slot * STEPS + s)
            if STRIDE == 1:
                corner = [h0 + kh - 1, step + s, b0, w0 + kw - 1, first]
            else:  # in pairs of rows and columns: the middle of the window is even, its sides odd
                corner = [
                    h0 - (kh == 0).to(gl.int32), (kh != 1).to(gl.int32), (step + s) * B + b0,
                    w0 - (kw == 0).to(gl.int32), (kw != 1).to(gl.int32) * C + first,
                ]  # fmt: skip
            tma.async_copy_global_to_shared(x_desc, corner, done, tile, pred=active)

    @gluon.jit
    def _finish_step(
        total, v, scale_ptr, bias_ptr, SCALED: gl.constexpr, t, b0, h0, w0, n0, s_desc, s_buffer, y_desc, y_buffer,
        THRESHOLD: gl.constexpr, DECAY: gl.constexpr, SOFT: gl.constexpr, RESIDUAL: gl.constexpr, SHIFT: gl.constexpr,
        KEEP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, SUMS: gl.constexpr,
    ):  # fmt: skip
        """Membrane after step t from its sums; stores start here and are waited for by who needs the buffers.

        Copies clip what lies outside of a tensor, a step T too.
        """
        # Loaded here, they occupy no registers while sums are taken.
        channel = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, SUMS))
        bias = gl.expand_dims(gl.load(bias_ptr + channel) - SHIFT, 0)
        current = total.to(gl.float32)
        if SCALED:
            current = current * gl.expand_dims(gl.load(scale_ptr + channel), 0)
        current += bias
        if RESIDUAL or KEEP:
            Y: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], y_buffer.dtype)
            flat_y = y_buffer._reinterpret(y_buffer.dtype, [BM, BN], Y)
        if RESIDUAL:
            r = flat_y.load(SUMS).to(gl.float32)
            if SHIFT != 0.0:
                r += SHIFT  # so large that r is rounded to the grid; the bias takes it away again
            current += r
        if KEEP:
            flat_y.store(current.to(y_buffer.dtype))
        u = DECAY * v + current
        fired = u > THRESHOLD
        S: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], s_buffer.dtype)
        s_buffer._reinterpret(s_buffer.dtype, [BM, BN], S).store(fired.to(s_buffer.dtype))
        if SOFT:
            v = gl.where(fired, u - THRESHOLD, u)
        else:
            v = gl.where(fired, 0.0, u)
        fence_async_shared()
        _barrier()
        if KEEP:
            tma.async_copy_shared_to_global(y_desc, [h0, t, b0, w0, n0], y_buffer)
        tma.async_copy_shared_to_global(s_desc, [h0, t, b0, w0, n0], s_buffer)
        return v

    @gluon.jit
    def _conv_lif_kernel(
        x_desc, w_desc, s_desc, r_desc, y_desc, scale_ptr, bias_ptr, B, C, tiles_h, tiles_w, tiles_n,
        T: gl.constexpr, STRIDE: gl.constexpr, CHUNKS: gl.constexpr, STEPS: gl.constexpr,
        THRESHOLD: gl.constexpr, DECAY: gl.constexpr, SOFT: gl.constexpr, RESIDUAL: gl.constexpr, SHIFT: gl.constexpr,
        KEEP: gl.constexpr, BH: gl.constexpr, NB: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
        RING: gl.constexpr, SCALED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        OPERAND: gl.constexpr = x_desc.dtype
        BITS: gl.constexpr = OPERAND.primitive_bitwidth
        SUM: gl.constexpr = gl.int32 if BITS == 8 else gl.float32
        BM: gl.constexpr = BH * NB * BW
        GROUPS: gl.constexpr = (T + STEPS - 1) // STEPS
        TAPS: gl.constexpr = 9 * CHUNKS
        BYTES: gl.constexpr = (STEPS * BM + BN) * BK * (BITS // 8)
        SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 256 // BITS])
        PIXELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], OPERAND)

        # Neighbouring programs share pixels and differ in channels: the second finds the pixels in the L2 cache.
        tile = gl.program_id(0)
        n0 = tile % tiles_n * BN
        tile = tile // tiles_n
        w0 = tile % tiles_w * BW
        tile = tile // tiles_w
        h0 = tile % tiles_h * BH
        b0 = tile // tiles_h * NB

        pixels = gl.allocate_shared_memory(OPERAND, [RING * STEPS, BH, 1, NB, BW, BK], x_desc.layout)
        weights = gl.allocate_shared_memory(OPERAND, [RING, BN, BK], w_desc.layout)
        s_buffers = gl.allocate_shared_memory(OPERAND, [STEPS, BH, 1, NB, BW, BN], s_desc.layout)
        if KEEP:
            y_buffers = gl.allocate_shared_memory(y_desc.dtype, [STEPS, BH, 1, NB, BW, BN], y_desc.layout)
        elif RESIDUAL:
            y_buffers = gl.allocate_shared_memory(r_desc.dtype, [STEPS, BH, 1, NB, BW, BN], r_desc.layout)
        else:
            y_buffers = s_buffers
        ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
        residual_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(RING):
            mbarrier.init(ready.index(i), count=1)
        mbarrier.init(residual_ready, count=1)
        fence_async_shared()
        _barrier()

        for i in gl.static_range(RING - 1):
            _copy_tap(
                x_desc, w_desc, pixels, weights, ready, i, True, b0, h0, w0, n0, B, C, STRIDE, STEPS, CHUNKS, RING, BK,
                BYTES,
            )  # fmt: skip

        v = gl.zeros([BM, BN], gl.float32, SUMS)
        for group in range(GROUPS):
            first = gl.zeros([BM, BN], SUM, SUMS)
            if STEPS == 2:
                second = gl.zeros([BM, BN], SUM, SUMS)
            for j in range(TAPS):
                tap = group * TAPS + j
                slot = tap % RING
                mbarrier.wait(ready.index(slot), (tap // RING) & 1)
                right = weights.index(slot).permute((1, 0))
                left = pixels.index(slot * STEPS)._reinterpret(OPERAND, [BM, BK], PIXELS)
                first = warpgroup_mma(left, right, first, is_async=True)
                if STEPS == 2:
                    left = pixels.index(slot * STEPS + 1)._reinterpret(OPERAND, [BM, BK], PIXELS)
                    second = warpgroup_mma(left, right, second, is_async=True)
                # What the tap before read may be overwritten once its products are done in every warp.
                if STEPS == 2:
                    first, second = warpgroup_mma_wait(2, deps=(first, second))
                else:
                    first = warpgroup_mma_wait(1, deps=(first,))
                _barrier()
                _copy_tap(
                    x_desc, w_desc, pixels, weights, ready, tap + RING - 1, tap + RING - 1 < GROUPS * TAPS, b0, h0, w0,
                    n0, B, C, STRIDE, STEPS, CHUNKS, RING, BK, BYTES,
                )  # fmt: skip
                if RESIDUAL:  # noqa: SIM102 (known when compiling, the other when running)
                    if j == 2:  # by now the stores of the group before have left the buffers
                        tma.store_wait(0)
                        _barrier()
                        mbarrier.expect(residual_ready, STEPS * BM * BN * (r_desc.dtype.primitive_bitwidth // 8))
                        for s in gl.static_range(STEPS):
                            tma.async_copy_global_to_shared(
                                r_desc, [h0, group * STEPS + s, b0, w0, n0], residual_ready, y_buffers.index(s)
                            )
            if STEPS == 2:
                first, second = warpgroup_mma_wait(0, deps=(first, second))
            else:
                first = warpgroup_mma_wait(0, deps=(first,))
            if RESIDUAL:
                mbarrier.wait(residual_ready, group & 1)
            else:
                tma.store_wait(0)
                _barrier()
            v = _finish_step(
                first, v, scale_ptr, bias_ptr, SCALED, group * STEPS, b0, h0, w0, n0, s_desc, s_buffers.index(0),
                y_desc, y_buffers.index(0), THRESHOLD, DECAY, SOFT, RESIDUAL, SHIFT, KEEP, BM, BN, SUMS,
            )  # fmt: skip
            if STEPS == 2:
                v = _finish_step(
                    second, v, scale_ptr, bias_ptr, SCALED, group * STEPS + 1, b0, h0, w0, n0, s_desc,
                    s_buffers.index(1), y_desc, y_buffers.index(1), THRESHOLD, DECAY, SOFT, RESIDUAL, SHIFT, KEEP, BM,
                    BN, SUMS,
                )  # fmt: skip
        tma.store_wait(0)


@functools.cache
def _failure(device: torch.device) -> str:
    """Why this version of Triton does not compile the kernel, empty where it does; tried on one small call."""
    layout = torch.channels_last
    spikes = torch.zeros((1, 32, 8, 8), dtype=torch.int8, device=device).contiguous(memory_format=layout)
    weight = torch.zeros((32, 32, 3, 3), dtype=torch.int8, device=device).contiguous(memory_format=layout)
    zeros = torch.zeros(32, device=device)
    made = Plan((8, 1, 8), 32, 32, 2, 1, 4)
    try:
        out = torch.empty_like(spikes)
        launch(made, spikes, weight, zeros, zeros, None, 1, 1, 1.0, 0.5, False, 0.0, out, zeros[:0])
    except Exception as error:  # whatever the compiler raises: there is another way to compute the same
        first = str(error).partition("\n")[0]
        reason = f"its kernel does not compile with this Triton ({type(error).__name__}: {first})"
        _logger.warning("spiking convolutions run slower on this GPU than they could: %s", reason)
        return reason
    return ""


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


def _pairs_descriptor(tensor: Tensor, block: list[int]) -> Any:
    """The same as pairs of rows, row of the pair, images, pairs of columns, column of the pair and channel."""
    samples, channels, height, width = tensor.shape
    row = width * channels
    shape = [height // 2, 2, samples, width // 2, 2 * channels]
    return _descriptor(tensor, shape, [2 * row, row, height * row, 2 * channels, 1], block)


def launch(
    made: Plan, spikes: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, residual: Tensor | None,
    num_steps: int, stride: int, threshold: float, decay: float, soft_reset: bool, shift: float, out: Tensor,
    membrane: Tensor,
) -> None:  # fmt: skip
    """Write spikes and, where it has elements, the neuron's input current.

    Args:
        made: What `plan` gave.
        spikes: (T*B, C, H, W) int8, float16 or bfloat16, dense channels-last, as all four-dimensional tensors here.
        weight: (C', C, 3, 3) in the spikes' dtype.
        scale: (C',) float32, or None for 1.
        bias: (C',) float32.
        residual: (T*B, C', H', W') or None.
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
    rows, images, columns = made.tile
    batch = out.shape[0] // num_steps
    _, tiles_h, tiles_w = made.tiles(batch, height, width)
    outer = [rows, 1, images, columns, made.block_n]
    taken = [*outer[:-1], made.block_k]
    pixels = _steps_descriptor(spikes, num_steps, taken) if stride == 1 else _pairs_descriptor(spikes, taken)
    weights = _descriptor(weight, [out_channels, 9 * channels], [9 * channels, 1], [made.block_n, made.block_k])
    fired = _steps_descriptor(out, num_steps, outer)
    kept, source = fired, fired
    if residual is not None:
        source = _steps_descriptor(residual, num_steps, outer)
    if membrane.numel():
        kept = _steps_descriptor(membrane, num_steps, outer)
    with on_device(spikes):
        _conv_lif_kernel[(made.programs(batch, out_channels, height, width),)](
            pixels, weights, fired, source, kept, scale, bias, batch, channels, tiles_h, tiles_w,
            out_channels // made.block_n, T=num_steps, STRIDE=stride, CHUNKS=channels // made.block_k, STEPS=made.steps,
            THRESHOLD=threshold, DECAY=decay, SOFT=soft_reset, RESIDUAL=residual is not None,
            SHIFT=shift, KEEP=membrane.numel() > 0, BH=rows, NB=images, BW=columns, BN=made.block_n,
            BK=made.block_k, RING=made.ring, SCALED=scale is not None, num_warps=made.num_warps,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where every other path rounds twice
        )  # fmt: skip
