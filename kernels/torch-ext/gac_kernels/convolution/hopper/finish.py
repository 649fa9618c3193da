"""The end of a time step in both Hopper kernels: from the sums to the membrane, the spikes and their stores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def finish_step(
    total,
    shortcut,
    v,
    scale_ptr,
    bias_ptr,
    SCALED: gl.constexpr,
    t,
    b0,
    h0,
    w0,
    n0,
    s_desc,
    s_buffer,
    y_desc,
    y_buffer,
    THRESHOLD: gl.constexpr,
    DECAY: gl.constexpr,
    SOFT: gl.constexpr,
    RESIDUAL: gl.constexpr,
    SHORTCUT: gl.constexpr,
    SHIFT: gl.constexpr,
    KEEP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Membrane after step t from its sums. Stores start here; the caller waits for them before it reuses the buffers.

    The residual lies in the membrane's buffer or, with SHORTCUT, in registers: the sums of the shortcut's convolution,
    rounded to the dtype that they would have in memory. TMA copies clip what lies outside of a tensor, also a step T.
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
    if RESIDUAL or SHORTCUT:
        if SHORTCUT:
            r = shortcut.to(gl.float32)
        else:
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
    barrier()
    if KEEP:
        tma.async_copy_shared_to_global(y_desc, [h0, t, b0, w0, n0], y_buffer)
    tma.async_copy_shared_to_global(s_desc, [h0, t, b0, w0, n0], s_buffer)
    return v
