"""Rounding to 8 bits inside of Triton kernels: integers of weights, float8 e4m3, and powers of two as scales."""

from __future__ import annotations

from ..common.triton import INTERPRETED, tl, triton

# The interpreter's own conversion to float8 rounds ties wrongly and loses a carry into the exponent.
BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def to_integer(x):
    """The nearest integers, ties to even, of float32 numbers below 2**22: 1.5 * 2**23 has no bits for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_code(x):
    """The bits of the nearest e4m3 numbers of float32, ties to even, saturating at 448, NaN for NaN: uint8."""
    if BY_HAND:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        capped = tl.minimum(size, 0x43E00000)  # 448
        normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 the numbers are multiples of 2**-9, the last bit of numbers from 2**14 on.
        small = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(capped < 0x3C800000, small, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        code = (code | sign).to(tl.uint8)
    else:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.satfinite
    return code


@triton.jit
def e4m3_pair(low, high):
    """`e4m3_code` of two in the low and the next byte of an int32.

    By one instruction of its own: `ptxas` of CUDA 12.8 and 12.9 reads registers that nothing wrote where bytes of one
    conversion are both stored as they are and shifted into a word.
    """
    if BY_HAND:
        pair = e4m3_code(low).to(tl.int32) | (e4m3_code(high).to(tl.int32) << 8)
    else:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }",
            "=r,f,f",
            [low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return pair


@triton.jit
def power_scale(largest):
    """The largest power of two that keeps what has this largest magnitude within 448: a float32 scalar.

    1 for 0, NaN where the magnitude is not finite; see `reference.int8_conv2d.gradient_scale`.
    """
    bits = largest.to(tl.int32, bitcast=True)
    # largest = m * 2**e with m in [1, 2); 448 = 1.75 * 2**8. Subnormal numbers are below the limit of 2**120 anyway.
    exponent = ((bits >> 23) & 255) - 127
    power = tl.where((bits & 0x7FFFFF) <= 0x600000, 8, 7) - exponent
    power = tl.minimum(tl.maximum(power, -120), 120)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(largest > 0.0, scale, 1.0)
    return tl.where((bits & 0x7F800000) == 0x7F800000, float("nan"), scale)
