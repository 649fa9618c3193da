"""How a call of the Hopper kernel is divided among programs: pixels by output channels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# What a group of four warps multiplies, and the least channels of a tensor copy that the kernel stores.
_LEAST_PIXELS, _LEAST_CHANNELS = 64, 32


class Plan(NamedTuple):
    """How a call is divided among programs.

    Attributes:
        tile: Rows, images and columns of a program's output pixels, powers of two.
        block_n: Output channels of a program.
        block_k: Input channels of a copy, 32, 64 or 128 bytes.
        ring: Stages that are in flight.
        steps: Time steps that share a weight tile, 1 or 2.
        num_warps: Of a program, 4 or 8.
    """

    tile: tuple[int, int, int]
    block_n: int
    block_k: int
    ring: int
    steps: int
    num_warps: int

    @property
    def pixels(self) -> int:
        """Output pixels of a program at one time step."""
        return math.prod(self.tile)

    def tiles(self, batch: int, height: int, width: int) -> tuple[int, int, int]:
        """Tiles along images, rows and columns of an output of so many."""
        rows, images, columns = self.tile
        return math.ceil(batch / images), math.ceil(height / rows), math.ceil(width / columns)

    def programs(self, batch: int, channels: int, height: int, width: int) -> int:
        """Programs of an output (T*batch, channels, height, width): each takes all T steps of its tile."""
        return math.prod(self.tiles(batch, height, width)) * (channels // self.block_n)

    def shared_bytes(self, operands: int, values: int) -> int:
        """Shared memory of a program.

        Args:
            operands: Bytes an element of spikes and weights.
            values: Bytes an element of residual or membrane, 0 without.
        """
        stage = (self.steps * self.pixels + self.block_n) * self.block_k * operands
        return self.ring * stage + self.steps * self.pixels * self.block_n * (operands + values) + 1024


@functools.cache
def tile_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Rows, images and columns of a tile: least padding, then the smallest surround, then the longest runs.

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


def spread(made: Plan, batch: int, channels: int, height: int, width: int, processors: int) -> Plan:
    """The plan, in smaller tiles where its programs would leave half of the GPU's multiprocessors idle, or more.

    Args:
        made: The plan of a call that fills the GPU.
        batch: Images of a time step.
        channels: Of the output.
        height: Rows of the output.
        width: Columns of the output.
        processors: Multiprocessors of the GPU.
    """
    while 2 * made.programs(batch, channels, height, width) <= processors:
        if made.pixels > _LEAST_PIXELS:
            made = made._replace(tile=tile_of(_LEAST_PIXELS, batch, height, width), num_warps=_LEAST_PIXELS // 16)
        elif made.block_n > _LEAST_CHANNELS:
            made = made._replace(block_n=made.block_n // 2)
        else:
            break
    return made


def one_pass_fills(batch: int, channels: int, height: int, width: int, num_steps: int, processors: int) -> bool:
    """Whether programs that each take all time steps keep the GPU nearly as busy as those that take one step each.

    Counted in whole waves of 128x128 tiles; a quarter more is what the second pass over memory would take.

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
