"""How a call of the Hopper kernel is divided among programs: pixels by output channels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


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
