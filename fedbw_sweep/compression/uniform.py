"""Uniform quantisation of blocks of coordinates to 8, 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.cast import from_bfloat16
from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.tiles import tiles
from fedbw_sweep.errors import ConfigError

_TILE = 1 << 18
"""Coordinates worked on at a time, so that their temporaries stay in the processor's cache."""

_LARGEST_BFLOAT16 = np.float32(2.0**128 - 2.0**120)
_LARGEST = np.float32(0.98 * 2.0**128)
"""Greater magnitudes become this one: a level above theirs would not be finite."""


@dataclass(frozen=True)
class Uniform(Compressor):
    """Equally spaced levels, with one bfloat16 scale for each block of coordinates.

    Blocks keep an outlier's harm to its neighbours (Dettmers et al. 2022, arXiv 2110.02861).

    Nearest rounding puts the coordinate of largest magnitude on the lowest of the two's complement
    levels ``-2**(bits-1) .. 2**(bits-1) - 1``, with a negative scale where it is positive: all
    levels are used and zero stays zero. At 4 bits that leaves 22% less squared error than levels
    that are symmetric about zero; at 2 bits, 70% less. Stochastic rounding needs symmetric levels
    and is unbiased given the block's scale (Alistarh et al. 2017, arXiv 1610.02132).

    Parameters
    ----------
    bits : int
        Bits of one coordinate: 8, 4 or 2.
    block : int
        Coordinates that share a scale; adds ``16 / block`` bits to each.
    rounding : str
        ``"nearest"``, or ``"stochastic"``.
    """

    bits: int = 8
    block: int = 128
    rounding: str = "nearest"
    fixed_size: ClassVar[bool] = True
    codes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2) or type(self.bits) is not int:
            raise ConfigError("bits", self.bits, "8, 4 or 2")
        if type(self.block) is not int or not 1 <= self.block <= _TILE:
            raise ConfigError("block", self.block, f"an integer from 1 to {_TILE}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ConfigError("rounding", self.rounding, "nearest or stochastic")

    @property
    def unbiased(self) -> bool:
        """See `Compressor`."""
        return self.rounding == "stochastic"

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return (
            self.FRAME_BYTES + 2 * self._blocks(layout.size) + packed_bytes(layout.size, self.bits)
        )

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _tiles(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Yield the coordinates of each tile, and its blocks."""
        blocks = _TILE // self.block
        for first in range(0, self._blocks(size), blocks):
            stop = min(size, (first + blocks) * self.block)
            yield slice(first * self.block, stop), slice(first, first + blocks)

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> tuple[memoryview, ...]:
        half = 1 << self.bits - 1
        extremes = _extremes(update, self.block)
        larger, smaller = np.maximum(*extremes), np.minimum(*extremes)
        if larger.max(initial=0) > _LARGEST:
            return self._encode(np.clip(update, -_LARGEST, _LARGEST), layout, rng, known)
        if self.rounding == "nearest":
            # A byte has no level 128 for the smaller to be rounded to; fewer bits are clipped.
            steps = np.maximum(larger / half, smaller / 127.49)
            steps = np.copysign(steps, np.subtract(*extremes))
        else:
            steps = larger / (half - 1.001)  # with the draw still below half
        scales = _scale_codes(steps, half)
        factors = np.reciprocal(from_bfloat16(scales))
        codes = np.empty(layout.size, np.int8)
        scratch = np.empty(min(layout.size, _TILE), np.float32)
        for part, of_part in self._tiles(layout.size):
            scaled = scratch[: part.stop - part.start]
            _per_block(update[part], factors[of_part], self.block, out=scaled)
            if self.rounding == "stochastic":
                scaled += rng.random(scaled.size, np.float32)
                np.floor(scaled, out=scaled)
            else:
                np.rint(scaled, out=scaled)
            codes[part] = scaled
        if self.bits < 8:
            np.clip(codes, -half, half - 1, out=codes)
        return scales.data, pack(codes.view(np.uint8), self.bits).data

    @np.errstate(over="ignore", invalid="ignore")
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        size, split = layout.size, 2 * self._blocks(layout.size)
        scales = from_bfloat16(
            floats_from(body[:split], self._blocks(size), "<u2", "tables").astype(np.uint16)
        )
        packed = floats_from(body[split:], packed_bytes(size, self.bits), "u1").view(np.uint8)
        codes = unpack(packed, size, self.bits)
        if self.bits < 8:  # two's complement of `bits` bits to that of eight
            half = np.uint8(1 << self.bits - 1)
            codes ^= half
            codes -= half
        update = np.empty(size, np.float32)
        for part, of_part in self._tiles(size):
            update[part] = codes[part].view(np.int8)
            _per_block(update[part], scales[of_part], self.block, out=update[part])
        return update


@dataclass(frozen=True)
class QSGD(Compressor):
    """Stochastic rounding to multiples of a bucket's norm, entropy coded; unbiased.

    Alistarh et al. 2017, arXiv 1610.02132. A coordinate becomes ``sign * k * norm / levels`` with
    ``k`` one of the two integers around ``levels * |x| / norm``, at random so that the mean is
    ``x``. The paper codes the integers by Elias; here each costs its empirical entropy. A bucket's
    ``norm / levels`` travels as a bfloat16, and the rounding is relative to what travels.

    Parameters
    ----------
    levels : int
        Positive levels up to the norm. With the square root of `bucket` the error is about as large
        as the update; it falls with the square of the levels.
    bucket : int
        Coordinates that share a norm.
    """

    levels: int = 16
    bucket: int = 512

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 1 <= self.levels <= 1 << 14:
            raise ConfigError("levels", self.levels, f"an integer from 1 to {1 << 14}")
        if type(self.bucket) is not int or not 1 <= self.bucket <= _TILE:
            raise ConfigError("bucket", self.bucket, f"an integer from 1 to {_TILE}")

    @property
    def unbiased(self) -> bool:
        """See `Compressor`."""
        return True

    @property
    def expands(self) -> bool:
        """See `Compressor`: the error is nearly ``sqrt(2 * bucket / pi) / levels - 1`` of it."""
        return 4 * self.levels**2 < self.bucket

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        if not update.size:
            return b""
        starts = np.arange(0, update.size, self.bucket)
        norms = np.sqrt(np.add.reduceat(np.square(update, dtype=np.float64), starts))
        steps = _scale_codes(np.minimum(norms, _LARGEST_BFLOAT16) / self.levels, self.levels)
        scaled = np.empty_like(update)
        _per_block(update, np.reciprocal(from_bfloat16(steps)), self.bucket, out=scaled)
        scaled += rng.random(update.size, np.float32)
        np.clip(np.floor(scaled, out=scaled), -self.levels, self.levels, out=scaled)
        integers = scaled.astype(np.int32)
        encoder = Encoder()
        encoder.symbols(np.where(integers > 0, 2 * integers - 1, -2 * integers))
        return steps.tobytes() + encoder.finish()

    @np.errstate(over="ignore", invalid="ignore")
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        buckets = -(-layout.size // self.bucket)
        codes = floats_from(body[: 2 * buckets], buckets, "<u2", "tables")
        steps = from_bfloat16(codes.astype(np.uint16))
        decoder = Decoder(body[2 * buckets :])
        symbols = decoder.symbols(layout.size, 2 * self.levels)
        decoder.finish()
        update = np.empty(layout.size, np.float32)
        for tile in tiles(layout.size):
            part = symbols[tile].astype(np.int32)
            update[tile] = np.where(part & 1, part + 1, -part)
        update *= np.float32(0.5)
        _per_block(update, steps, self.bucket, out=update)
        return update


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the low `bits` (1 to 8) of each code.

    Bits are cut into fields of 4, 2 and 1 (so 7 is 4 + 2 + 1), packed one after the other. Of the
    ``n`` bytes of a field, byte ``i`` holds codes ``i, i + n, i + 2n, ...`` from its low bits up,
    so that whole planes are shifted at once.

    Parameters
    ----------
    codes : ndarray of uint8, shape (size,)
        Bits above the lowest `bits` are ignored.
    bits : int
        Bits of each code that are kept.

    Returns
    -------
    ndarray of uint8, shape (packed_bytes(size, bits),)
    """
    if bits == 8:
        return codes
    packed = np.zeros(packed_bytes(codes.size, bits), np.uint8)
    at = 0
    for shift, width in _fields(bits):
        count = -(-codes.size * width // 8)
        field = packed[at : at + count]
        for plane in range(8 // width if count else 0):
            part = codes[plane * count :][:count]
            low = (part >> shift if shift else part) & (1 << width) - 1
            # NumPy multiplies bytes eight times faster than it shifts them to the left.
            field[: part.size] |= low * np.uint8(1 << plane * width)
        at += count
    return packed


def unpack(packed: NDArray[np.uint8], size: int, bits: int) -> NDArray[np.uint8]:
    """Undo `pack`: return `size` codes from ``packed_bytes(size, bits)`` bytes."""
    if bits == 8:
        return packed
    codes = np.zeros(size, np.uint8)
    at = 0
    for shift, width in _fields(bits):
        count = -(-size * width // 8)
        field = packed[at : at + count]
        for plane in range(8 // width if count else 0):
            part = codes[plane * count :][:count]
            part |= (field[: part.size] >> plane * width & (1 << width) - 1) * (1 << shift)
        at += count
    return codes


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of `size` packed codes."""
    return sum(-(-size * width // 8) for _, width in _fields(bits))


def _fields(bits: int) -> list[tuple[int, int]]:
    """Return the shift and width of each power of two that `bits` is the sum of."""
    return [(bits & (width - 1), width) for width in (1, 2, 4, 8) if bits & width]


def _extremes(values: FloatVector, block: int) -> tuple[FloatVector, FloatVector]:
    """Return the largest magnitude among each block's negative numbers, and among its positive.

    As integers, the bits of positive floats sort upwards, and above all negative ones where the
    sign bit is a sign; where it is not, the most negative float is above all others. Integers are
    compared twice as fast, for none of them is NaN.
    """
    starts = np.arange(0, values.size, block)
    negative = np.maximum.reduceat(values.view(np.uint32), starts).view(np.float32)
    positive = np.maximum.reduceat(values.view(np.int32), starts).view(np.float32)
    return np.maximum(-negative, 0), np.maximum(positive, 0)


def _scale_codes(steps: NDArray[np.floating], half: int) -> NDArray[np.uint16]:
    """Return steps as little-endian bfloat16, rounded away from zero: nothing falls outside.

    Magnitudes stay between the smallest whose reciprocal is finite and the largest whose lowest
    level, `half` of them, is.
    """
    bits = steps.astype(np.float32).view(np.uint32)
    smallest = np.finfo(np.float32).tiny.view(np.uint32)
    largest = (_LARGEST_BFLOAT16 / np.float32(half)).view(np.uint32)
    magnitude = np.clip(bits & 0x7FFFFFFF, smallest, largest)
    codes: NDArray[np.uint32] = (magnitude + 0xFFFF | bits & 0x80000000) >> 16
    return codes.astype("<u2")


def _per_block(values: FloatVector, factors: FloatVector, block: int, out: FloatVector) -> None:
    """Multiply each block of `values` by its own factor; the last block may be short."""
    whole = values.size // block * block
    shape = (-1, block)
    np.multiply(
        values[:whole].reshape(shape),
        factors[: whole // block, None],
        out=out[:whole].reshape(shape),
    )
    np.multiply(values[whole:], factors[whole // block :], out=out[whole:])
