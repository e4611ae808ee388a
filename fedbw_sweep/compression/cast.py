"""Casts: every coordinate as a float of fewer bits (and `Dense`, the uncompressed reference)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.layout import FloatVector, Layout

_TILE = 1 << 16
"""Coordinates worked on at a time: the temporaries of one tile stay in the processor's cache."""


@dataclass(frozen=True)
class Dense(Compressor):
    """Little-endian float32, bare: the reference every compression ratio is taken against.

    Exactly ``4 * layout.size`` bytes: the only method without a frame.
    """

    fixed_size: ClassVar[bool] = True
    codes_weights: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return 4 * layout.size

    def _frame(self, layout: Layout, used: Known) -> bytes:
        return b""

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        return update.astype("<f4", copy=False).tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        return floats_from(body, layout.size, "<f4").astype(np.float32)


@dataclass(frozen=True)
class Float16(Compressor):
    """IEEE half precision (1 sign, 5 exponent, 10 mantissa bits), rounded to nearest even.

    binary16 of IEEE 754-2008; for training Micikevicius et al. 2018, arXiv 1710.03740.

    Values beyond +-65504 saturate there; below 6e-8 they vanish.
    """

    fixed_size: ClassVar[bool] = True
    codes_weights: ClassVar[bool] = True

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return self.FRAME_BYTES + 2 * layout.size

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        codes = np.empty(layout.size, "<u2")
        for start in range(0, layout.size, _TILE):
            part = slice(start, start + _TILE)
            magnitude, sign = _shorten(update[part], mantissa=10, bias=15, largest=65504.0)
            codes[part] = magnitude | sign >> 16
        return codes.tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        return floats_from(body, layout.size, "<f2").astype(np.float32)


@dataclass(frozen=True)
class BFloat16(Compressor):
    """bfloat16 (1 sign, 8 exponent, 7 mantissa bits), rounded to nearest even; keeps the range.

    For training Kalamkar et al. 2019, arXiv 1905.12322.

    Values beyond +-3.39e38 saturate there.
    """

    fixed_size: ClassVar[bool] = True
    codes_weights: ClassVar[bool] = True

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return self.FRAME_BYTES + 2 * layout.size

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        codes = np.empty(layout.size, "<u2")
        for start in range(0, layout.size, _TILE):
            part = slice(start, start + _TILE)
            codes[part] = to_bfloat16(update[part])
        return codes.tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        return from_bfloat16(floats_from(body, layout.size, "<u2").astype(np.uint16))


@dataclass(frozen=True)
class Float8(Compressor):
    """FP8 E4M3 (1 sign, 4 exponent, 3 mantissa bits) with one float32 scale per tensor.

    The scale maps a tensor's largest magnitude to 448, the largest E4M3 number, as FP8 training
    does (Micikevicius et al. 2022, arXiv 2209.05433); without it small updates would vanish. The
    bytes are the E4M3 encoding without infinities that the paper defines.
    """

    fixed_size: ClassVar[bool] = True
    codes_weights: ClassVar[bool] = True
    LARGEST: ClassVar[float] = 448.0

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return self.FRAME_BYTES + 4 * len(layout.floats) + layout.size

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        codes = np.empty(layout.size, np.uint8)
        scales = []
        start = 0
        for spec, tensor in layout.split(update):
            extreme = np.max(np.abs(tensor), initial=0.0)
            # The floor keeps every quotient finite; what it flushes to zero is below 1e-40.
            scale = np.maximum(extreme / np.float32(self.LARGEST), np.finfo(np.float32).tiny)
            scales.append(scale)
            magnitude, sign = _shorten(
                tensor.ravel() / scale, mantissa=3, bias=7, largest=self.LARGEST
            )
            codes[start : start + spec.size] = magnitude | sign >> 24
            start += spec.size
        return np.array(scales, "<f4").tobytes() + codes.tobytes()

    @np.errstate(over="ignore", invalid="ignore")
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        split = 4 * len(layout.floats)
        once = np.ones(len(layout.filled))
        scales = floats_from(body[:split], len(layout.floats), "<f4", "tables", once)
        update = _E4M3[floats_from(body[split:], layout.size, "u1").view(np.uint8)]
        for (_, tensor), scale in zip(layout.split(update), scales, strict=True):
            tensor *= scale
        return update


def to_bfloat16(values: FloatVector) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16 bit patterns, ties to even; saturate at +-3.39e38."""
    bits = values.view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    magnitude += 0x7FFF + (magnitude >> 16 & 1)
    magnitude >>= 16
    codes: NDArray[np.uint32] = np.minimum(magnitude, 0x7F7F) | bits >> 16 & 0x8000
    return codes.astype(np.uint16)


def from_bfloat16(codes: NDArray[np.uint16]) -> FloatVector:
    """Widen bfloat16 bit patterns to float32; exact."""
    bits = codes.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def unit_for(values: FloatVector) -> np.float32:
    """Return the power of two that brings the largest magnitude near 1, within float32."""
    exponent = int(np.frexp(np.max(np.abs(values), initial=0.0))[1])
    return np.float32(2.0 ** min(-exponent, 126))


def _shorten(
    values: FloatVector, mantissa: int, bias: int, largest: float
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Round to a shorter float format, nearest even, subnormals included; saturate at `largest`.

    Adding a power of two that many times larger makes the processor drop the surplus mantissa bits
    and leaves the rounded ones, as an integer, in the low bits of the sum.

    Returns
    -------
    magnitude : ndarray of uint32
        Exponent and mantissa fields of the short format.
    sign : ndarray of uint32
        The sign, at bit 31.
    """
    surplus = 23 - mantissa
    lowest = 128 - bias << 23  # exponent field of the smallest normal number
    bits = values.view(np.uint32)
    magnitude = np.minimum(bits & 0x7FFFFFFF, np.float32(largest).view(np.uint32))
    exponent = np.maximum(magnitude & 0x7F800000, np.uint32(lowest))
    magic = exponent + np.uint32(surplus << 23)
    rounded = (magnitude.view(np.float32) + magic.view(np.float32)).view(np.uint32)
    rounded -= magic
    exponent -= np.uint32(lowest)
    exponent >>= surplus
    sign: NDArray[np.uint32] = bits & np.uint32(0x80000000)
    return rounded + exponent, sign


def _e4m3_table() -> FloatVector:
    exponent, fraction = np.divmod(np.arange(128), 8)
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    positive = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


_E4M3 = _e4m3_table()
