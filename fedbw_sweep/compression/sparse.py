"""Sparse updates: a few coordinates travel, the rest are zero.

A payload is the positions (see `coding.positions`) and the values, entropy coded together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction
from math import lgamma, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor, Known
from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.positions import decode_indices, encode_indices
from fedbw_sweep.compression.layout import FloatVector, Ints, Layout
from fedbw_sweep.compression.tiles import TILE, tiles
from fedbw_sweep.errors import ConfigError, PayloadError

VALUE_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "2bit": 2, "sign": 1}
"""How kept values may travel, and the bits that one takes at most."""

_SPLITS = 4
"""Steps of Lloyd's algorithm: more move the two levels by less than a hundredth."""


def _check_density(density: object) -> None:
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:  # type: ignore[operator]
        raise ConfigError("density", density, "a number in (0, 1]: the fraction that is kept")


def _check_values(values: object, allowed: Collection[str] = VALUE_BITS) -> None:
    if values not in allowed:
        raise ConfigError("values", values, f"one of {', '.join(allowed)}")


def kept_count(density: float, size: int) -> int:
    """Return ``max(1, floor(density * size))`` for the density as it is written in decimal.

    ``floor(0.29 * 100)`` is 28 in floating point; here it is 29. Of nothing, nothing is kept.
    """
    return min(size, max(1, int(Fraction(str(density)) * size)))


def largest(magnitudes: FloatVector, count: int) -> Ints:
    """Return the ascending indices of the `count` largest; among equals the first are taken."""
    candidates = np.arange(0)
    # A sample finds a threshold that a few too many pass, so that few need sorting. Its stride is
    # odd, for columns to be sampled alike.
    sample = magnitudes[:: magnitudes.size >> 16 | 1]
    rank = int(1.2 * count * sample.size / magnitudes.size) + 32
    if rank < sample.size // 4:
        floor = np.partition(sample, -rank)[-rank]
        candidates = np.flatnonzero(magnitudes >= floor)
    if candidates.size < count:
        candidates = np.arange(magnitudes.size)
    passed = magnitudes[candidates]
    threshold = np.partition(passed, -count)[-count]
    above = passed > threshold
    ties = np.flatnonzero(passed == threshold)[: count - np.count_nonzero(above)]
    above[ties] = True
    indices: Ints = candidates[above]
    return indices


def two_magnitudes(magnitudes: FloatVector) -> FloatVector:
    """Return two levels for magnitudes, ascending, by Lloyd's algorithm from their mean."""
    split = magnitudes.mean(dtype=np.float64)
    for _ in range(_SPLITS):
        above = magnitudes > split
        if not above.any():  # they are all equal
            return np.full(2, split, np.float32)
        low, high = (magnitudes[part].mean(dtype=np.float64) for part in (~above, above))
        split = (low + high) / 2
    return np.array([low, high], np.float32)


def _encode_values(encoder: Encoder, values: FloatVector, kind: str) -> None:
    """Add kept values; all but fp32 are relative to the largest (the mean, for signs)."""
    if kind == "fp32":
        encoder.floats(values)
    if kind == "fp32" or not values.size:
        return
    magnitudes = np.abs(values)
    if kind == "2bit":
        levels = two_magnitudes(magnitudes)
        encoder.floats(levels)
        encoder.bits(np.signbit(values).astype(np.int64), 1)
        encoder.integers((magnitudes > levels.mean(dtype=np.float64)).astype(np.int64))
        return
    scale = magnitudes.mean(dtype=np.float64) if kind == "sign" else magnitudes.max()
    encoder.floats(np.array([scale], np.float32))
    unit = np.float64(scale) or np.float64(1)  # values that are all zero have no scale
    if kind == "fp16":
        encoder.floats((values / unit).astype(np.float16))
        return
    encoder.bits(np.signbit(values).astype(np.int64), 1)
    if kind == "int8":
        encoder.integers(np.rint(magnitudes * (127 / unit)).astype(np.int64))


def _decode_values(
    decoder: Decoder, counts: Ints, kind: str
) -> Callable[[slice], NDArray[np.floating[Any]]]:
    """Read the kept values, so many of each tensor that is not empty; return those of a slice."""
    count = int(counts.sum())
    if kind == "fp32":
        return decoder.floats(count, counts=counts).__getitem__
    if not count:
        return np.zeros(0, np.float32).__getitem__
    scales = decoder.floats(2 if kind == "2bit" else 1, part="tables", counts=counts)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise PayloadError(f"{scales} are not scales")
    scale = float(scales[0])
    if kind == "fp16":
        relative = decoder.floats(count, "float16", counts=counts)
        if not np.all(np.abs(relative) <= 1):
            raise PayloadError("a value exceeds the largest value")
        return lambda part: relative[part] * np.float64(scale)
    negative = decoder.bits(count, 1, counts=counts).view(np.int8)
    if kind == "2bit":
        larger = decoder.coded(count, 1, counts=counts).values
        return lambda part: (1 - 2 * negative[part]) * scales[larger[part]]
    if kind == "sign":
        return lambda part: (1 - 2 * negative[part]) * np.float64(scale)
    magnitudes = decoder.coded(count, 127, counts=counts).values
    return lambda part: (1 - 2 * negative[part].astype(np.int64)) * magnitudes[part] * (scale / 127)


class _Sparse(Compressor):
    """What `TopK` and `Threshold` share: all but the choice of coordinates."""

    values: str

    @abstractmethod
    def _keep(self, magnitudes: FloatVector) -> Ints:
        """Return the ascending indices of the coordinates to send."""

    def _most(self, size: int) -> int:
        """Return how many of `size` coordinates are sent at most."""
        return size

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        if not update.size:
            return b""
        encoder = Encoder()
        indices = self._keep(np.abs(update))
        order = encode_indices(encoder, indices, layout)
        _encode_values(encoder, update[indices[order]], self.values)
        return encoder.finish()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        decoder = Decoder(body)
        update = np.zeros(0, np.float32)
        if layout.size:
            indices, kept = decode_indices(decoder, layout, self._most(layout.size))
            values = _decode_values(decoder, kept, self.values)
            update = np.zeros(layout.size, np.float32)
            for tile in tiles(len(indices)):
                update[indices[tile]] = values(tile)
        decoder.finish()
        return update


@dataclass(frozen=True)
class TopK(_Sparse):
    """Keep the coordinates of largest magnitude (Aji and Heafield 2017, arXiv 1704.05021).

    Biased: use with error feedback. Zeros are never sent.

    Parameters
    ----------
    density : float
        Fraction of all coordinates that is kept, in (0, 1]: ``max(1, floor(density * size))``.
    values : {"fp32", "fp16", "int8", "2bit", "sign"}
        How the kept values travel. ``sign`` sends their signs and their mean magnitude, ``2bit``
        their signs and which of two magnitudes is nearer.
    """

    density: float = 0.1
    values: str = "fp32"

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_values(self.values)

    def expected_bytes(self, layout: Layout) -> int:
        """Size with positions spread evenly, ``log2 C(n, k)`` bits; they cluster and cost less."""
        n, k = layout.size, self._most(layout.size)
        positions = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)
        return self.FRAME_BYTES + round((positions + k * VALUE_BITS[self.values]) / 8)

    def _keep(self, magnitudes: FloatVector) -> Ints:
        indices = largest(magnitudes, self._most(magnitudes.size))
        return indices[magnitudes[indices] > 0]

    def _most(self, size: int) -> int:
        return kept_count(self.density, size)


@dataclass(frozen=True)
class Ternary(TopK):
    """Sparse ternary compression, STC (Sattler et al. 2019, arXiv 1903.02891).

    The largest coordinates are kept and each becomes plus or minus their mean magnitude, the mean
    over the kept ones: `TopK` with signs for values. Biased: use with error feedback.

    Parameters
    ----------
    density : float
        Fraction of all coordinates that is kept, in (0, 1].
    """

    values: str = field(default="sign", init=False)


@dataclass(frozen=True)
class Threshold(_Sparse):
    """Keep every coordinate whose magnitude reaches a threshold (Strom 2015).

    Biased: use with error feedback. How much is sent follows the update.

    Parameters
    ----------
    threshold : float
        Smallest magnitude that is sent, above 0, in the units of the weights.
    values : {"fp32", "fp16", "int8", "2bit", "sign"}
        As of `TopK`.
    """

    threshold: float = 1e-3
    values: str = "fp32"

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 < self.threshold < float("inf"):
            raise ConfigError("threshold", self.threshold, "a finite magnitude above 0")
        _check_values(self.values)

    def _keep(self, magnitudes: FloatVector) -> Ints:
        return np.flatnonzero((magnitudes >= self.threshold) & (magnitudes > 0))


def random_subset(seed: int, size: int, count: int) -> NDArray[np.bool_]:
    """Say which of `size` are `count` drawn at random, the same on any machine.

    They are the first distinct ones of a stream of raw PCG-64 output, which NumPy never changes.
    Where that is more than half, it draws those that are left out.
    """
    if 2 * count > size:
        return np.logical_not(left_out := random_subset(seed, size, size - count), out=left_out)
    drawn, missing, stream = np.zeros(size, bool), count, np.random.PCG64(seed)
    while missing:  # as many draws cannot be too many
        uniform = (stream.random_raw(min(missing, TILE)) >> np.uint64(12)) * 2.0**-52
        places = (uniform * size).astype(np.int64)
        new = np.unique(places[~drawn[places]])
        drawn[new] = True
        missing -= len(new)
    return drawn


@dataclass(frozen=True)
class RandK(Compressor):
    """Keep coordinates chosen at random (Konecny et al. 2016, arXiv 1610.05492).

    Positions cost four bytes in all: both ends draw them from a seed in the payload.

    Parameters
    ----------
    density : float
        Fraction of all coordinates that is kept, in (0, 1]: ``max(1, floor(density * size))``.
    values : {"fp32", "fp16", "int8", "sign"}
        How the kept values travel. ``sign`` sends their signs and their mean magnitude.
    unbiased : bool
        Whether the decoder multiplies by size / kept, which makes the expected update exact up to
        the rounding of `values`. With error feedback it must not, unless half are kept: the
        residual would grow.
    """

    density: float = 0.01
    values: str = "fp32"
    unbiased: bool = True

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_values(self.values, [kind for kind in VALUE_BITS if kind != "2bit"])
        if not isinstance(self.unbiased, bool):
            raise ConfigError("unbiased", self.unbiased, "true or false")

    @property
    def expands(self) -> bool:
        """See `Compressor`: the error is ``1 / density - 1`` of the update."""
        return self.unbiased and self.density < 1 / 2

    def expected_bytes(self, layout: Layout) -> int:
        """Size in bytes to within a few, less what int8 values gain from entropy coding."""
        kept = kept_count(self.density, layout.size)
        return self.FRAME_BYTES + 4 + kept * VALUE_BITS[self.values] // 8

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        encoder = Encoder()
        seed = int(rng.integers(1 << 32))
        encoder.uint(seed, (1 << 32) - 1)
        kept = random_subset(seed, layout.size, kept_count(self.density, layout.size))
        _encode_values(encoder, update[kept], self.values)
        return encoder.finish()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        decoder = Decoder(body)
        count = kept_count(self.density, layout.size)
        kept = random_subset(decoder.uint((1 << 32) - 1), layout.size, count)
        read = _decode_values(decoder, layout.count(kept), self.values)
        decoder.finish()
        gain = layout.size / count if self.unbiased and count else 1.0
        limit = np.finfo(np.float32).max  # values that the gain takes beyond it stay there
        update = np.zeros(layout.size, np.float32)
        at = 0
        for tile in tiles(layout.size):
            of_tile = kept[tile]
            values = read(slice(at, at := at + int(np.count_nonzero(of_tile))))
            if not np.isfinite(values).all():
                raise PayloadError("a value is NaN or infinite")
            update[tile][of_tile] = np.clip(values * np.float64(gain), -limit, limit)
        return update
