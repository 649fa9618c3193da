"""How the work of a call is divided among programs of the Hopper kernels: tiles of pixels by output channels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# Output pixels per warpgroup; smallest channel block of a TMA store.
TILE_PIXELS, _LEAST_CHANNELS = 64, 32
SHARED_MEMORY = 227 * 1024  # bytes per program on Hopper
_LEAST_RING = 3  # buffers of weights, so that one is filled while another is read


class Call(NamedTuple):
    """The sizes of a call that decide how it is divided.

    Attributes:
        batch: Images of a time step.
        channels: C.
        out_channels: C'.
        height: Rows of the output.
        width: Columns of the output.
        num_steps: T.
        stride: 1 or 2.
        operand_bytes: Bytes per element of spikes and weights.
        value_bytes: Bytes per element of the residual or of the current that is returned; 0 without either.
        shortcut_channels: Input channels of the 1x1 shortcut; 0 without one.
    """

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    num_steps: int
    stride: int
    operand_bytes: int
    value_bytes: int
    shortcut_channels: int = 0

    @property
    def frames(self) -> tuple[int, int, int, int]:
        """Images, channels, rows and columns of an output of one step."""
        return self.batch, self.out_channels, self.height, self.width

    @property
    def block_k(self) -> int:
        """Input channels per TMA copy, the most that divide C: 128, 64 or 32 bytes."""
        depth = self.channels * self.operand_bytes
        return next(size // self.operand_bytes for size in (128, 64, 32) if depth % size == 0)

    @property
    def block_n(self) -> int:
        """Output channels of a program."""
        return next(n for n in (128, 64, 32) if self.out_channels % n == 0)


class Plan(NamedTuple):
    """How a call is divided among programs.

    Attributes:
        tile: Rows, images and columns of a tile of 64 output pixels, powers of two.
        block_n: Output channels of a program.
        block_k: Input channels per TMA copy, 32, 64 or 128 bytes.
        ring: Buffers of weights; of pixels too, where a program has one tile.
        steps: Time steps that share a copy of weights, 1 or 2.
        copies: Buffers of pixels per tile where a program has two tiles (`pair`); 0 where it has one (`ring`).
        shared: A buffer of pixels includes the rows above and below, so that it serves three taps of the window.
    """

    tile: tuple[int, int, int]
    block_n: int
    block_k: int
    ring: int
    steps: int
    copies: int = 0
    shared: bool = False

    def tiles(self, batch: int, height: int, width: int) -> tuple[int, int, int]:
        """Tiles along images, rows and columns of an output of so many."""
        rows, images, columns = self.tile
        return math.ceil(batch / images), math.ceil(height / rows), math.ceil(width / columns)

    def programs(self, batch: int, channels: int, height: int, width: int) -> int:
        """Units of work (one per program, or more in turn) of an output (T*batch, channels, height, width)."""
        tiles = math.prod(self.tiles(batch, height, width))
        return math.ceil(tiles / 2 if self.copies else tiles) * (channels // self.block_n)


def pair_plan(call: Call, copies: int, steps: int, shared: bool) -> Plan | None:
    """The plan with two tiles per program, or None if it needs more shared memory than there is.

    Args:
        call: The call.
        copies: Buffers of pixels per tile, at least 2.
        steps: Time steps that share a copy of weights, 1 or 2.
        shared: A buffer of pixels includes the rows above and below, so that it serves three taps of the window.
    """
    tile = tile_of(TILE_PIXELS, call.batch, call.height, call.width)
    rows, images, columns = tile
    around = 2 if call.stride == 1 else rows + 1
    depth = call.block_k * call.operand_bytes
    stored = 2 * steps * TILE_PIXELS * call.block_n * (call.operand_bytes + call.value_bytes)
    pixels = 2 * copies * steps * (rows + around * shared) * images * columns * depth
    ring = (SHARED_MEMORY - 1024 - stored - pixels) // (call.block_n * depth)
    if ring < _LEAST_RING:
        return None
    taps = (9 * call.channels + 2 * call.shortcut_channels // call.operand_bytes) // call.block_k
    return Plan(
        tile=tile,
        block_n=call.block_n,
        block_k=call.block_k,
        ring=min(ring, taps),
        steps=steps,
        copies=copies,
        shared=shared,
    )


def ring_plan(call: Call, processors: int) -> Plan:
    """The plan with one tile per program, and fewer channels per tile where half of the GPU would be idle.

    Args:
        call: The call.
        processors: Multiprocessors of the GPU.
    """
    plan = Plan(
        tile=tile_of(TILE_PIXELS, call.batch, call.height, call.width),
        block_n=call.block_n,
        block_k=call.block_k,
        ring=4,
        steps=1,
    )
    while plan.block_n > _LEAST_CHANNELS and 2 * plan.programs(*call.frames) <= processors:
        plan = plan._replace(block_n=plan.block_n // 2)
    return plan


@functools.cache
def tile_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Rows, images and columns of a tile: least padding, then fewest surrounding pixels, then longest rows.

    Args:
        pixels: Of the tile, a power of two of at least 8.
        batch: Images of a time step.
        height: Rows of the output.
        width: Columns of the output.
    """

    def cost(tile: tuple[int, int, int]) -> tuple[float, float, int]:
        rows, images, columns = tile
        sizes = zip((height, batch, width), tile, strict=True)
        return math.prod(-(-size // part) for size, part in sizes), (rows + 2) * (columns + 2) * images, -columns

    sizes = [2**i for i in range(pixels.bit_length())]
    tiles = [
        (rows, pixels // (rows * columns), columns) for rows in sizes for columns in sizes if rows * columns <= pixels
    ]
    # A row of a tile begins at a multiple of the swizzle's period, eight pixels.
    return min((tile for tile in tiles if tile[1] * tile[2] >= 8), key=cost)


def one_pass_fills(batch: int, channels: int, height: int, width: int, num_steps: int, processors: int) -> bool:
    """Whether one program for all time steps of a tile keeps the GPU about as busy as one per step.

    Counted in whole waves of 128x128 tiles. Up to 1.25 times as many are accepted, since two passes read memory twice.

    Args:
        batch: Images of a time step.
        channels: Of the output.
        height: Rows of the output.
        width: Columns of the output.
        num_steps: T.
        processors: Multiprocessors of the GPU.
    """
    tiles = math.ceil(batch * height * width / 128) * math.ceil(channels / 128)
    return num_steps * math.ceil(tiles / processors) <= 1.25 * math.ceil(num_steps * tiles / processors)
