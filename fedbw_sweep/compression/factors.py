"""The quantised low-rank part of a matrix: its components, its rank, what its entries are coded by.

Local updates of matrices are close to low rank. What a component costs and what it saves are both
known before it is coded, so each matrix takes the rank at which error plus price of bits is least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.exact import PER_OCTAVE, Integers, Multiplier, exp2, product_blocks
from fedbw_sweep.compression.layout import FloatVector, Ints
from fedbw_sweep.compression.quantiser import (
    BITS,
    CLASSES,
    ERROR,
    SHIFT,
    SLOPE,
    THRESHOLD,
    dequantise,
    quantise,
    quantise_to_rate,
)
from fedbw_sweep.compression.tiles import TILE, tiles

_COARSENESS = 2.8, 3.5
"""Step of the factors in rms of the residual, where that is coarser than the step of the update.

A residual that is coded anyway corrects the factors' rounding, which then costs least in all when
its error is nearly that of the residual: ``step**2 / 12`` against ``rms**2``. The second is for
factors that descend, here and below.
"""

_PRICE = 0.8 * SLOPE, 0.4 * SLOPE
"""Error that a bit of a component is worth: contexts make it cheaper than `BITS` reckons."""

_LOOK = 64  # components sought at first for a step of one rms; in proportion to its inverse
OVERSAMPLING = 16  # components sought beyond the most that are used
_FITS = 2, 3  # of each factor, to suit the other as it was rounded; the second as above
_VALUE_BITS = 26  # of a factor's entries as it descends
MAX_GAIN = 127
MAX_COARSENESS = 63


def _rounded_log2(n: int) -> int:
    """Nearest integer to log2, by integer arithmetic."""
    return ((2 * n * n).bit_length() - 1) // 2


class Factors:
    """The low-rank part of one matrix, laid so that it has no more rows than columns.

    In steps of the update it is ``2**(coarseness/2) * sum_j left_j right_j^T / 2**(gain_j/2)``.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    coarseness : int
        Half-octaves by which the factors' step exceeds the update's.
    gain : ndarray of int, shape (rank,)
        Half-octaves of each singular value, in steps of the factors, descending.
    leading : int
        How many of the first rows and columns are directions in which much is expected.
    """

    def __init__(
        self, shape: tuple[int, ...], coarseness: int, gain: Ints, leading: int = 0
    ) -> None:
        self.shape, self.coarseness, self.gain = shape, coarseness, gain
        self.leading = leading
        self.step = np.float32(exp2(coarseness * PER_OCTAVE // 2))
        # The entries of a unit vector of n have mean square 1 / n.
        spread = np.array([[_rounded_log2(n)] for n in shape])
        self.classes = np.clip(gain + 8 - spread, 0, CLASSES - 1)  # of scale: (2, rank)
        self.threshold, self.shift = THRESHOLD[self.classes], SHIFT[self.classes]
        with np.errstate(over="ignore"):  # of a forged gain; a decoder refuses what comes of it
            self.shrink = exp2(-gain * PER_OCTAVE // 2).astype(np.float32)
        self.levels = np.zeros((sum(shape), len(gain)), np.int32)  # the left above the right
        self.parts = self.levels[: shape[0]], self.levels[shape[0] :]

    def unit(self, side: int) -> FloatVector:
        """Return one factor with the gains divided out."""
        return self._times(side, self.shrink)

    def _times(self, side: int, scale: FloatVector | np.float32) -> FloatVector:
        """Return one factor times a scale."""
        levels, shift = self.parts[side], self.shift[side]
        factor = np.empty(levels.shape, np.float32)
        for rows in tiles(len(levels), size=max(1, TILE // max(1, len(shift)))):
            np.multiply(dequantise(levels[rows], shift), scale, out=factor[rows])
        return factor

    def fit(self, side: int, matrix: Multiplier, scale: float) -> None:
        """Quantise the factor that, given the other, best completes `matrix` times `scale`."""
        other = Integers(self.unit(1 - side), matrix.bits)
        inverse = np.linalg.inv(_regular(other.gram()))
        # The left side is the shorter: the inverse is multiplied there.
        if side:
            values, unit = other.times(inverse)
            values, unit = matrix.transposed_times(Integers(values, matrix.bits, unit))
        else:
            values, unit = matrix.times(other)
            values, unit = Integers(values, matrix.bits, unit).times(inverse)
        values *= unit * scale / self.step
        self.parts[side][:] = quantise(values.astype(np.float32), self.threshold[side])

    def descend(
        self,
        side: int,
        matrix: Multiplier,
        scale: float,
        contexts: Ints,
        extra_bits: FloatVector,
        price: float,
    ) -> None:
        """Choose each entry of a factor anew, given all others: where error and bits cost least.

        Parameters
        ----------
        side : int
            0 for the left factor.
        matrix, scale
            What the product should be: `matrix` times `scale`, in steps of the update.
        contexts : ndarray of int, shape (entries, rank)
            What each entry will be coded by.
        extra_bits, price
            See `quantise_to_rate`.
        """
        other = Integers(self.unit(1 - side), matrix.bits)
        square = _regular(other.gram())
        shift, levels = self.shift[side], self.parts[side]
        values = dequantise(levels, shift).astype(np.float64)  # (entries, rank)
        # Half of what the squared error falls by as an entry grows.
        slope, unit = matrix.transposed_times(other) if side else matrix.times(other)
        slope *= unit * scale / self.step
        predicted, unit = Integers(values.copy(), _VALUE_BITS).times(square)
        slope -= predicted * unit
        for j in range(len(square)):
            free = (values[:, j] + slope[:, j] / square[j, j]).astype(np.float32)
            levels[:, j] = quantise_to_rate(
                free, contexts[:, j], shift[j], extra_bits, price / square[j, j]
            )
            change = dequantise(levels[:, j], shift[j]) - values[:, j]
            moved = np.flatnonzero(change)
            slope[moved] -= change[moved, None] * square[j]
            values[moved, j] += change[moved]

    def product(self, across: bool) -> Iterator[tuple[tuple[slice, slice], FloatVector]]:
        """Yield the matrix in steps of the update, or its transpose, by blocks."""
        factors = self.unit(0), self._times(1, self.step)
        return product_blocks(*(factors[::-1] if across else factors))


def _regular(square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keep the inner products of unit vectors away from a singular matrix; changes them."""
    square.flat[:: len(square) + 1] += 1e-5
    return square


def most_rank(shape: tuple[int, ...]) -> int:
    """Return the highest rank at which factors have at most 5/4 of the matrix's entries."""
    return min(*shape, 5 * prod(shape) // (4 * sum(shape)))


class Spectrum:
    """Leading singular components of a matrix, found when asked for, at any scale."""

    def __init__(self, matrix: FloatVector, sketch: NDArray[np.int8], max_rank: int) -> None:
        self.shape, self.sketch = matrix.shape, sketch
        self.energy = float(np.einsum("ij,ij->", matrix, matrix))
        self.matrix = Multiplier(matrix)
        self.max_rank, self.most = max_rank, min(len(matrix), sketch.shape[1])
        self._known: dict[int, tuple[Integers, NDArray[np.float64], NDArray[np.float64]]] = {}

    def leading(self, count: int) -> tuple[Integers, NDArray[np.float64], NDArray[np.float64]]:
        """Return singular values, and what right vectors times values are the product of.

        By a randomised SVD (Halko et al. 2011, arXiv 0909.4061). LAPACK is given matrices of
        `count` rows only.

        Returns
        -------
        combined : Integers, shape (columns, count)
        rotation : ndarray, shape (count, count)
        values : ndarray, shape (count,)
            Descending.
        """
        if count not in self._known:
            bits = self.matrix.bits
            sketch = Integers(self.sketch[: self.shape[1], :count], bits)
            values, unit = self.matrix.times(sketch)
            seen = Integers(values, bits, unit)
            # Orthonormal, but for directions of next to nothing.
            square = seen.gram()
            square.flat[:: count + 1] += 1e-12 * square.trace() + 1e-30
            values, unit = seen.times(np.linalg.inv(np.linalg.cholesky(square)).T)
            values, unit = self.matrix.transposed_times(Integers(values, bits, unit))
            combined = Integers(values, bits, unit)
            squares, rotation = np.linalg.eigh(combined.gram())
            # The basis lacks what lies evenly in all other directions, of vectors too.
            lacking = max(0.0, self.energy - squares.sum()) / self.shape[1]
            singular = np.sqrt(np.maximum(squares[::-1], 0) + lacking)
            self._known[count] = combined, rotation[:, ::-1], singular
        return self._known[count]

    def quantise(self, scale: float, descends: bool, cost: Cost, leading: int) -> Factors:
        """Return the low-rank part of the matrix times `scale`, in steps.

        See `choose_rank` and `Factors`.
        """
        count, most = min(max(8, int(_LOOK * scale)), self.most), most_rank(self.shape)
        while True:
            combined, rotation, values = self.leading(count)
            values = values * scale
            above = values[: min(self.max_rank, most, np.count_nonzero(values > 1))]
            rank, coarseness = choose_rank(
                above, self.energy * scale**2, self.shape, descends, cost
            )
            if 3 * rank < 2 * count or count == self.most:
                break
            count = min(2 * count, self.most)
        octaves = np.log2(values[:rank]) - coarseness / 2
        gain = np.clip(np.rint(2 * octaves), 0, MAX_GAIN).astype(np.int64)
        part = Factors(self.shape, coarseness, np.minimum.accumulate(gain), leading)
        if not rank:
            return part
        right, unit = combined.times(rotation[:, :rank])
        right *= unit * scale / part.step
        part.parts[1][:] = quantise(right.astype(np.float32), part.threshold[1])
        for side in (0, 1) * _FITS[descends]:
            part.fit(side, self.matrix, scale)
        return part


Cost = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Returns the bits and the squared error of a coordinate, in its own steps, by its mean square."""


def dead_zone_cost(
    mean_square: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a `Cost`'s bits and squared error for the quantiser with a dead zone."""
    at = np.log2(np.maximum(mean_square, 2.0**-40)) + 8
    grid = np.arange(CLASSES)
    bits = np.interp(at, grid, BITS) + np.maximum(0, at - CLASSES) / 2
    return bits, np.where(at < 0, mean_square, np.interp(at, grid, ERROR))


def choose_rank(
    values: NDArray[np.float64],
    energy: float,
    shape: tuple[int, int],
    descends: bool,
    cost: Cost = dead_zone_cost,
) -> tuple[int, int]:
    """Return the rank at which error plus price of bits is least, and the factors' coarseness.

    Parameters
    ----------
    values : ndarray, shape (most,)
        Singular values in steps, descending.
    energy : float
        Squared norm of the matrix, in squared steps.
    shape : tuple of int
        Rows and columns.
    descends : bool
        Whether the factors will.
    cost : Cost
        Of what the low-rank part leaves.
    """
    size = prod(shape)
    rest = np.maximum(energy - np.append(0, np.cumsum(values**2)), 0) / size  # (most + 1,)
    half_octaves = np.rint(2 * np.log2(np.maximum(1, _COARSENESS[descends] * np.sqrt(rest))))
    half_octaves = np.minimum(half_octaves, MAX_COARSENESS)
    # Few coarsenesses occur; at each, what the components up to every rank cost together.
    kinds, kind = np.unique(half_octaves, return_inverse=True)
    step = 2 ** (kinds[:, None] / 2)
    sides = np.reshape(shape, (2, 1, 1))
    each_bits, each_error = dead_zone_cost(np.square(values / step) / sides)  # (sides, kinds, most)
    bits, error = np.zeros((2, len(kinds), len(rest)))
    np.cumsum((sides * each_bits).sum(axis=0), axis=1, out=bits[:, 1:])
    np.cumsum((sides * each_error).sum(axis=0) * step**2, axis=1, out=error[:, 1:])
    ranks = np.arange(len(rest))
    bits, error = bits[kind, ranks], error[kind, ranks]
    rest_bits, rest_error = cost(rest + error / size)
    total = size * rest_error + _PRICE[descends] * (size * rest_bits + bits + 4 * ranks)
    rank = int(np.argmin(total))
    return rank, int(half_octaves[rank])


def levels_of(parts: list[Factors], chunk: slice = slice(None)) -> Ints:
    """Return the entries of components, matrix by matrix and row by row."""
    return np.concatenate([part.levels[:, chunk].ravel() for part in parts])


def divide(values: NDArray[Any], blocks: list[NDArray[Any]]) -> None:
    """Fill blocks with what `levels_of` joins."""
    at = 0
    for block in blocks:
        block[:] = values[at : at + block.size].reshape(block.shape)
        at += block.size
