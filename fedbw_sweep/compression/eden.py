"""Rotate at random until every coordinate looks Gaussian, then quantise for the Gaussian."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import pi
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.cast import unit_for
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.lloyd_max import LEVELS
from fedbw_sweep.compression.tiles import TILE, tiles
from fedbw_sweep.compression.uniform import pack, packed_bytes, unpack
from fedbw_sweep.errors import ConfigError, PayloadError

_LARGEST_ROTATION = 4096
_SMALLEST_ROTATION = 256
_CELLS = 1 << 13
_RANGE = 8.0
"""Rotated values are looked up in a table of `_CELLS` cells over +-`_RANGE` deviations."""


@dataclass(frozen=True)
class Eden(Compressor):
    """Random rotation, Lloyd-Max quantiser, and the scale that makes the estimate unbiased.

    Vargaftik et al. 2022, arXiv 2108.08842. The vector is dealt out to columns of a power of two
    of rows (at most 4096); each column is rotated by random signs and a Hadamard matrix, twice,
    and quantised with the levels that are best for a Gaussian. A column's scale is
    ``|x|**2 / <rotated, quantised>``. Below one bit a random part of the rows is sent, at one bit.

    The proof of unbiasedness is for a rotation uniform over all rotations. With the Hadamard matrix
    once, as in the paper's code, a few coordinates that hold all the energy keep a bias of up to a
    quarter of it; with it twice, no bias is seen in averages of hundreds of draws.

    Parameters
    ----------
    bits : float
        Bits of one coordinate: an integer from 1 to 8, or a fraction between 0 and 1.
    """

    bits: float = 1
    fixed_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number = isinstance(self.bits, (int, float)) and not isinstance(self.bits, bool)
        if not number or not (0 < self.bits < 1 or self.bits in range(1, 9)):
            raise ConfigError("bits", self.bits, "an integer from 1 to 8, or between 0 and 1")

    @property
    def unbiased(self) -> bool:
        """See `Compressor`."""
        return True

    @property
    def expands(self) -> bool:
        """See `Compressor`: the error is ``pi / 2 / bits - 1`` of the update below one bit."""
        return self.bits < pi / 4

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        rows, columns = _dealt(layout.size)
        codes = packed_bytes(self._kept(rows) * columns, self._width)
        return self.FRAME_BYTES + 4 + 4 * columns + codes

    @property
    def _width(self) -> int:
        return max(1, int(self.bits))

    def _kept(self, rows: int) -> int:
        """Return how many rows of rotated coordinates are sent."""
        return max(1, round(min(self.bits, 1) * rows))

    def _draw(self, seed: int, rows: int) -> tuple[list[FloatVector], NDArray[np.int64]]:
        """Return the signs of the rotations and the rows that are sent, both ends alike."""
        words = np.random.PCG64(seed).random_raw(rows)
        signs = [
            1 - 2 * (words >> np.uint64(bit) & np.uint64(1)).astype(np.float32) for bit in (0, 1)
        ]
        return [s[:, None] for s in signs], np.argsort(words, kind="stable")[: self._kept(rows)]

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        rows, columns = _dealt(layout.size)
        seed = int(rng.integers(1 << 32))
        signs, kept = self._draw(seed, rows)
        dealt = np.zeros((rows, columns), np.float32)
        unit = unit_for(update)  # squares neither overflow nor vanish
        np.multiply(update, unit, out=dealt.reshape(-1)[: update.size])
        energy = np.einsum("ij,ij->j", dealt, dealt)
        rotated = dealt
        for sign in signs:
            rotated *= sign
            rotated = hadamard(rotated)
        if self.bits < 1:
            rotated = rotated[kept]
        # Rotations are not normalised: each multiplies by the root of the number of rows.
        deviation = np.sqrt(np.where(energy > 0, energy, 1) * np.float32(rows))
        cells, levels = _quantiser(self._width)
        normal = rotated * np.float32(_CELLS / 2 / _RANGE) / deviation
        normal += np.float32(_CELLS / 2)
        np.clip(normal, 0, _CELLS - 1, out=normal)
        codes = np.take(cells, normal.astype(np.uint16))
        agreement = np.einsum("ij,ij->j", rotated, np.take(levels, codes))
        scales = np.divide(energy, agreement, out=np.zeros_like(energy), where=agreement > 0)
        limit = np.finfo(np.float32).max
        sent = np.clip(scales.astype(np.float64) / float(unit), 0, limit).astype("<f4")
        packed = pack(codes.reshape(-1), self._width)
        return b"".join((struct.pack("<I", seed), sent.tobytes(), packed.data))

    @np.errstate(over="ignore")
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        rows, columns = _dealt(layout.size)
        split = 4 + 4 * columns
        if len(body) < split:
            raise PayloadError(f"expected at least {split} bytes, got {len(body)}")
        signs, kept = self._draw(struct.unpack("<I", body[:4])[0], rows)
        scales = floats_from(body[4:split], columns, "<f4", "tables")
        if not np.all(np.isfinite(scales)):
            raise PayloadError("a scale is NaN or infinite")
        count = kept.size * columns
        packed = floats_from(body[split:], packed_bytes(count, self._width), "u1").view(np.uint8)
        codes = unpack(packed, count, self._width).reshape(kept.size, columns)
        _, levels = _quantiser(self._width)
        dealt = np.zeros((rows, columns), np.float32)
        for tile in tiles(kept.size, size=max(1, TILE // max(1, columns))):
            part = kept[tile] if self.bits < 1 else tile
            dealt[part] = np.take(levels, codes[tile])
        for sign in reversed(signs):
            dealt = hadamard(dealt)
            dealt *= sign
        dealt *= scales
        limit = np.finfo(np.float32).max
        return np.clip(dealt, -limit, limit, out=dealt).reshape(-1)[: layout.size]


def _dealt(size: int) -> tuple[int, int]:
    """Return rows and columns: the most rows that waste less than 5% on padding."""
    rows = _LARGEST_ROTATION
    while rows > _SMALLEST_ROTATION and -(-size // rows) * rows > 1.05 * size:
        rows //= 2
    return rows, -(-size // rows)


def hadamard(values: FloatVector) -> FloatVector:
    """Multiply by the Hadamard matrix along the first axis, without normalising.

    Parameters
    ----------
    values : ndarray of float32, shape (rows, columns)
        `rows` is a power of two. Overwritten.

    Returns
    -------
    ndarray of float32, shape (rows, columns)
    """
    rows, columns = values.shape
    spare = np.empty_like(values)
    half = 1
    while half < rows:
        pairs = values.reshape(rows // (2 * half), 2, half, columns)
        mixed = spare.reshape(pairs.shape)
        np.add(pairs[:, 0], pairs[:, 1], out=mixed[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=mixed[:, 1])
        values, spare = spare, values
        half *= 2
    return values


@lru_cache
def _quantiser(bits: int) -> tuple[NDArray[np.uint8], FloatVector]:
    """Return the code of each cell and the level of each code."""
    positive = LEVELS[bits]
    levels = [*(-level for level in reversed(positive)), *positive]
    centres = (np.arange(_CELLS) + 0.5) * (2 * _RANGE / _CELLS) - _RANGE
    edges = [(a + b) / 2 for a, b in pairwise(levels)]
    return np.searchsorted(edges, centres).astype(np.uint8), np.array(levels, np.float32)
