"""The quantised low-rank part of a matrix: its components, its rank, what its entries are coded by.

Local updates of matrices are close to low rank. What a component costs and what it saves are both
known before it is coded, so each matrix takes the rank at which error plus price of bits is least.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    rate_differences,
)

_COARSENESS = 2.8, 3.5
"""Step of the factors in rms of the residual, where that is coarser than the step of the update.

A residual that is coded anyway corrects the factors' rounding, which then costs least in all when
its error is nearly that of the residual: ``step**2 / 12`` against ``rms**2``. The second is for
factors that descend, here and below.
"""

_PRICE = 0.8 * SLOPE, 0.4 * SLOPE
"""Error that a bit of a component is worth: contexts make it cheaper than `BITS` reckons."""

_LOOK = 64  # components sought at first for a step of one rms; in proportion to its inverse
_REFITS = 2  # of each factor, to suit the other as it was rounded
_DESCENTS = 8  # to a target; the more, the fewer bits
_CHUNKS = 1, 2, 4, 8, 16, 32  # components after which rows' energies are looked at anew
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
    """

    def __init__(self, shape: tuple[int, ...], coarseness: int, gain: Ints) -> None:
        self.shape, self.coarseness, self.gain = shape, coarseness, gain
        self.step = np.float32(2 ** (coarseness / 2))
        # The entries of a unit vector of n have mean square 1 / n.
        spread = np.array([[_rounded_log2(n)] for n in shape])
        self.classes = np.clip(gain + 8 - spread, 0, CLASSES - 1)  # of scale: (2, rank)
        self.threshold, self.shift = THRESHOLD[self.classes], SHIFT[self.classes]
        self.shrink = np.exp2(-0.5 * gain).astype(np.float32)
        self.levels = np.zeros((sum(shape), len(gain)), np.int32)  # the left above the right
        self.parts = self.levels[: shape[0]], self.levels[shape[0] :]

    def unit(self, side: int) -> FloatVector:
        """Return one factor with the gains divided out."""
        factor = dequantise(self.parts[side], self.shift[side])
        factor *= self.shrink
        return factor

    def fit(self, side: int, matrix: FloatVector) -> None:
        """Quantise the factor that, given the other, best completes the transposed matrix."""
        other = self.unit(1 - side)
        gram = other.T @ other
        gram.flat[:: len(gram) + 1] += 1e-5
        inverse: FloatVector = np.linalg.inv(gram).astype(np.float32)
        best: FloatVector = matrix.T @ other @ (inverse / self.step)
        self.parts[side][:] = quantise(best, self.threshold[side])

    def descend(
        self, side: int, matrix: FloatVector, contexts: Ints, extra_bits: FloatVector, price: float
    ) -> None:
        """Choose each entry of a factor anew, given all others: where error and bits cost least.

        Parameters
        ----------
        side : int
            0 for the left factor.
        matrix : ndarray, shape (entries of the other factor, entries of this one)
            What the product should be.
        contexts : ndarray of int, shape (entries, rank)
            What each entry will be coded by.
        extra_bits, price
            See `quantise_to_rate`.
        """
        other = self.unit(1 - side)
        gram = other.T @ other
        gram.flat[:: len(gram) + 1] += 1e-5
        aim = other.T @ (matrix / self.step)  # (rank, entries)
        shift, levels = self.shift[side], self.parts[side]
        values = np.ascontiguousarray(dequantise(levels, shift).T)
        for j in range(len(gram)):
            free = values[j] + (aim[j] - gram[j] @ values) / gram[j, j]
            levels[:, j] = quantise_to_rate(
                free, contexts[:, j], shift[j], extra_bits, price / gram[j, j]
            )
            values[j] = dequantise(levels[:, j], shift[j])

    def product(self) -> FloatVector:
        """Return the matrix in steps of the update."""
        right = dequantise(self.parts[1], self.shift[1]) * self.step
        matrix: FloatVector = self.unit(0) @ right.T
        return matrix


class Spectrum:
    """Leading singular components of a matrix, found when asked for, at any scale."""

    def __init__(self, matrix: FloatVector, sketch: FloatVector) -> None:
        flat = matrix.ravel(order="K")
        self.matrix, self.sketch, self.energy = matrix, sketch, float(np.dot(flat, flat))
        self.most = min(len(matrix), sketch.shape[1])
        self._known: dict[int, tuple[FloatVector, NDArray[np.float64]]] = {}

    def leading(self, count: int) -> tuple[FloatVector, NDArray[np.float64]]:
        """Return left singular vectors times values, and values, by a randomised SVD.

        Halko et al. 2011, arXiv 0909.4061, with half a power iteration.
        """
        if count not in self._known:
            sketch = self.sketch[: self.matrix.shape[1], :count]
            right = self.matrix.T @ np.linalg.qr(self.matrix @ sketch)[0]
            squares, rotation = np.linalg.eigh(right.T @ right)
            squares = np.maximum(squares[::-1], squares[-1] * 1e-9 + 1e-30)
            left = self.matrix @ (right @ (rotation[:, ::-1] / np.sqrt(squares)))
            values = np.sqrt(np.square(left).sum(axis=0), dtype=np.float64)
            self._known[count] = left, values
        return self._known[count]

    def quantise(self, matrix: FloatVector, scale: float, descends: bool) -> Factors:
        """Return the low-rank part of `matrix`, which is this one times `scale`, in steps."""
        for count in (min(max(8, int(_LOOK * scale)), self.most), self.most):
            left, values = self.leading(count)
            values = values * scale
            above = values[: np.count_nonzero(values > 1)]
            rank, coarseness = choose_rank(above, self.energy * scale**2, matrix.shape, descends)
            if 3 * rank < 2 * count:
                break
        octaves = np.log2(values[:rank]) - coarseness / 2
        gain = np.clip(np.rint(2 * octaves), 0, MAX_GAIN).astype(np.int64)
        part = Factors(matrix.shape, coarseness, np.minimum.accumulate(gain))
        start = left[:, :rank] * (np.float32(scale) / part.step)
        part.parts[0][:] = quantise(start, part.threshold[0])
        part.fit(1, matrix)
        for _ in range(_REFITS):
            part.fit(0, matrix.T)
            part.fit(1, matrix)
        return part


def _cost(mean_square: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bits and squared error of one coefficient, in its own steps, by its mean square."""
    at = np.log2(np.maximum(mean_square, 2.0**-40)) + 8
    grid = np.arange(CLASSES)
    bits = np.interp(at, grid, BITS) + np.maximum(0, at - CLASSES) / 2
    return bits, np.where(at < 0, mean_square, np.interp(at, grid, ERROR))


def choose_rank(
    values: NDArray[np.float64], energy: float, shape: tuple[int, int], descends: bool
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
    """
    size = prod(shape)
    rest = np.maximum(energy - np.append(0, np.cumsum(values**2)), 0) / size  # (most + 1,)
    half_octaves = np.rint(2 * np.log2(np.maximum(1, _COARSENESS[descends] * np.sqrt(rest))))
    half_octaves = np.minimum(half_octaves, MAX_COARSENESS)
    # Few coarsenesses occur; at each, what the components up to every rank cost together.
    kinds, kind = np.unique(half_octaves, return_inverse=True)
    step = 2 ** (kinds[:, None] / 2)
    bits, error = np.zeros((2, len(kinds), len(rest)))
    for n in shape:
        each_bits, each_error = _cost(np.square(values / step) / n)
        bits[:, 1:] += n * np.cumsum(each_bits, axis=1)
        error[:, 1:] += n * np.cumsum(each_error, axis=1) * step**2
    ranks = np.arange(len(rest))
    bits, error = bits[kind, ranks], error[kind, ranks]
    rest_bits, rest_error = _cost(rest + error / size)
    cost = size * rest_error + _PRICE[descends] * (size * rest_bits + bits + 4 * ranks)
    rank = int(np.argmin(cost))
    return rank, int(half_octaves[rank])


class Contexts:
    """What both ends know of the factors' entries, a chunk of components at a time.

    An entry is expected to be of its component's scale, times that of its row in the components
    before. All by integers: it chooses tables of probabilities.
    """

    def __init__(self, parts: list[Factors]) -> None:
        sides = [n for part in parts for n in part.shape]
        self.rank = np.repeat([len(part.gain) for part in parts for _ in (0, 1)], sides)
        self.most = int(self.rank.max(initial=0))
        self.classes = np.zeros((len(sides), self.most), np.int64)
        for i, part in enumerate(parts):
            self.classes[2 * i : 2 * i + 2, : len(part.gain)] = part.classes
        self.side = np.repeat(np.arange(len(sides)), sides)
        self.energy = np.zeros(len(self.side), np.int64)  # of rows, 2**16 for each one as expected

    def chunks(self) -> Iterator[slice]:
        """Yield the components of each chunk."""
        bounds = [0, *(c for c in _CHUNKS if c < self.most), self.most]
        yield from (slice(a, b) for a, b in pairwise(bounds) if a < b)

    def of(self, chunk: slice) -> NDArray[np.uint8]:
        """Return the contexts of a chunk, matrix by matrix and row by row."""
        self._width = np.clip(self.rank - chunk.start, 0, chunk.stop - chunk.start)
        start = np.cumsum(self._width) - self._width
        entry = np.repeat(self.side * self.most + chunk.start - start, self._width)
        entry += np.arange(len(entry))
        self._class = self.classes.ravel()[entry]
        prior = 4
        ratio = (self.energy + (prior << 16)) // ((chunk.start + prior) << 8)
        excess = np.frexp(ratio * 181 >> 7)[1] - 9  # log2 of ratio / 256, rounded
        expected: Ints = self._class + np.repeat(excess, self._width)
        return np.minimum(np.maximum(expected, 0), CLASSES - 1).astype(np.uint8)

    def learn(self, levels: Ints) -> None:
        """Take note of the last chunk's entries, in the same order."""
        square = np.minimum(np.abs(levels), 1 << 15).astype(np.int64) ** 2 << 24 >> self._class
        some = self._width > 0
        start = (np.cumsum(self._width) - self._width)[some]
        self.energy[some] += np.add.reduceat(square, start)


def levels_of(parts: list[Factors], chunk: slice = slice(None)) -> Ints:
    """Return the entries of components, matrix by matrix and row by row."""
    return np.concatenate([part.levels[:, chunk].ravel() for part in parts])


def divide(values: NDArray[Any], blocks: list[NDArray[Any]]) -> None:
    """Fill blocks with what `levels_of` joins."""
    at = 0
    for block in blocks:
        block[:] = values[at : at + block.size].reshape(block.shape)
        at += block.size


def refine(parts: list[Factors], matrices: list[FloatVector], price: float) -> None:
    """Descend, matrix by matrix and factor by factor, to where error and bits cost least."""
    for _ in range(_DESCENTS):
        known = Contexts(parts)
        of_parts = [np.empty(part.levels.shape, np.intp) for part in parts]
        for chunk in known.chunks():
            divide(known.of(chunk), [contexts[:, chunk] for contexts in of_parts])
            known.learn(levels_of(parts, chunk))
        extra_bits = rate_differences(
            levels_of(parts), np.concatenate([each.ravel() for each in of_parts])
        )
        for part, matrix, contexts in zip(parts, matrices, of_parts, strict=True):
            left, right = np.split(contexts, [len(matrix)])
            part.descend(0, matrix.T, left, extra_bits, price)
            part.descend(1, matrix, right, extra_bits, price)
