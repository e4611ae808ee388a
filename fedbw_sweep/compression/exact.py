"""Arithmetic that gives the same bits on every processor, with every BLAS and number of threads.

Products of matrices of integers are exact in whatever order they are added, as long as no sum
reaches 2**53; powers of two by fractions of an octave are made of integer roots.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import frexp, isqrt, ldexp

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import FloatVector, Ints
from fedbw_sweep.compression.tiles import tiles

Matrix = NDArray[np.float64]

PER_OCTAVE = 128
"""`exp2` counts in fractions of an octave: so many to one."""

_BLOCK = 1 << 16  # numbers of a product made at a time, which stay in the processor's cache

# 2**(60 + i/128) rounded down, exactly: seven integer square roots are one integer 128th root.
_ROOTS = [1 << (60 * PER_OCTAVE + i) for i in range(PER_OCTAVE)]
for _ in range(7):
    _ROOTS = [isqrt(root) for root in _ROOTS]
_FRACTIONS = np.array([ldexp(root, -60) for root in _ROOTS])


def exp2(parts: Ints | int) -> Matrix:
    """Return ``2**(parts / PER_OCTAVE)``."""
    octaves, rest = np.divmod(parts, PER_OCTAVE)
    powers: Matrix = np.ldexp(_FRACTIONS[rest], octaves)
    return powers


def bits_of(terms: int) -> int:
    """Return the bits of two factors of which so many products add up to at most 2**53."""
    return (53 - (terms - 1).bit_length()) // 2


def _magnitudes(matrix: NDArray[np.number], axis: int | None) -> NDArray[np.float64]:
    """Return the largest magnitude along an axis, or of all."""
    largest: NDArray[np.float64] = np.maximum(
        matrix.max(axis, initial=0), -matrix.min(axis, initial=0), dtype=np.float64
    )
    return largest


class Integers:
    """A matrix rounded to integers, all in one unit.

    Parameters
    ----------
    matrix : ndarray, shape (rows, columns)
        Finite numbers; overwritten if they are float64.
    bits : int
        The largest magnitude becomes at most ``2**bits`` units.
    unit : float
        What the numbers are counted in, a power of two.
    largest : float, optional
        The largest magnitude, if it is known.

    Attributes
    ----------
    values : ndarray of float64, shape (rows, columns)
        The integers.
    unit : float
        A power of two.
    """

    def __init__(
        self,
        matrix: NDArray[np.number],
        bits: int,
        unit: float = 1.0,
        *,
        largest: float | None = None,
    ) -> None:
        exponent = frexp(_magnitudes(matrix, None) if largest is None else largest)[1] - bits
        self.bits, self.unit = bits, ldexp(unit, exponent)
        own = matrix if matrix.dtype == np.float64 else np.empty_like(matrix, np.float64)
        scaled = np.multiply(matrix, ldexp(1.0, -exponent), out=own, dtype=np.float64)
        self.values: Matrix = np.rint(scaled, out=scaled)

    def gram(self) -> Matrix:
        """Return the inner products of columns; `bits` are at most `bits_of` the rows."""
        return self.values.T @ self.values * self.unit**2

    def times(self, small: NDArray[np.floating]) -> tuple[Matrix, float]:
        """Return the product with one of shape (columns, any), and the unit it counts in."""
        spare = 53 - self.bits - (len(small) - 1).bit_length()
        right = Integers(small.copy(), spare)
        return self.values @ right.values, self.unit * right.unit


class Multiplier:
    """A matrix, rounded to integers once, that is multiplied by many thin ones.

    Columns of zeros, as those of tokens that did not occur, take no time.

    Parameters
    ----------
    matrix : ndarray of float32, shape (rows, columns)
    """

    def __init__(self, matrix: FloatVector) -> None:
        self.shape, self.bits = matrix.shape, bits_of(max(matrix.shape))
        of_columns = _magnitudes(matrix, 0)
        self._some = of_columns > 0
        self._all = bool(self._some.all())
        some = matrix if self._all else matrix[:, self._some]
        self._matrix = Integers(some, self.bits, largest=of_columns.max(initial=0))

    def times(self, thin: Integers) -> tuple[Matrix, float]:
        """Return the matrix times one of shape (columns, count), and what that counts in."""
        values = thin.values if self._all else thin.values[self._some]
        return self._matrix.values @ values, self._matrix.unit * thin.unit

    def transposed_times(self, thin: Integers) -> tuple[Matrix, float]:
        """Return the transposed matrix times one of shape (rows, count), as `times`."""
        values = self._matrix.values.T @ thin.values
        if not self._all:
            some, values = values, np.zeros((self.shape[1], values.shape[1]))
            values[self._some] = some
        return values, self._matrix.unit * thin.unit


def product_blocks(
    left: NDArray[np.floating], right: NDArray[np.floating], axis: int | None = None
) -> Iterator[tuple[tuple[slice, slice], FloatVector]]:
    """Yield ``left @ right.T`` as float32 by blocks, each with the rows and columns it is of.

    Both are rounded to integers, of 23 bits if they have 65 to 128 columns and more if fewer: about
    as float32 rounds.

    Parameters
    ----------
    left : ndarray, shape (rows, terms)
    right : ndarray, shape (columns, terms)
    axis : int, optional
        1 if each row has a unit of its own, for what is small beside other rows.
    """
    bits = bits_of(left.shape[1])
    terms = left.shape[1]
    limits = [None if axis else _magnitudes(factor, None) for factor in (left, right)]
    width = max(terms, _BLOCK // max(1, terms))
    for columns in tiles(len(right), size=width):
        b, b_units = _rounded(right[columns], bits, limits[1])
        for rows in tiles(len(left), size=max(1, _BLOCK // len(b))):
            a, units = _rounded(left[rows], bits, limits[0])
            values = a @ b.T
            if axis:
                values *= b_units.T
            values *= units if axis else units * b_units
            yield (rows, columns), values.astype(np.float32)


def _rounded(
    factor: NDArray[np.floating], bits: int, largest: NDArray[np.float64] | None
) -> tuple[Matrix, NDArray[np.float64]]:
    """Return integers of so many bits and their units: each row's own, but for one largest."""
    magnitudes = _magnitudes(factor, 1) if largest is None else largest
    exponents = np.frexp(magnitudes)[1].reshape(-1, 1) - bits
    integers: Matrix = np.multiply(factor, np.ldexp(1.0, -exponents), dtype=np.float64)
    return np.rint(integers, out=integers), np.ldexp(1.0, exponents)


def product(left: NDArray[np.floating], right: NDArray[np.floating]) -> FloatVector:
    """Return ``left @ right.T``, a unit to each row; see `product_blocks`."""
    whole = np.empty((len(left), len(right)), np.float32)
    for block, values in product_blocks(left, right, 1):
        whole[block] = values
    return whole


def inverse_of_upper(triangle: Matrix) -> Matrix:
    """Return the inverse of an upper triangular matrix, with sums that NumPy makes itself."""
    inverse = np.diag(1 / np.diagonal(triangle))
    for j in range(1, len(triangle)):
        terms = inverse[:j, :j] * triangle[:j, j]
        inverse[:j, j] = terms.sum(axis=1) * -inverse[j, j]
    return inverse


def orthonormalised(columns: Integers) -> Matrix:
    """Return columns of unit length that span what the given ones do, in turn.

    By the Cholesky factor of their inner products. A column that all before it span, but for less
    than 1e-5 of it, becomes zeros.

    Parameters
    ----------
    columns : Integers, shape (rows, count)
        Of at most `bits_of` the rows.
    """
    square = columns.gram()
    rest, triangle = square.copy(), np.zeros_like(square)
    for j, whole in enumerate(np.diagonal(square)):
        if rest[j, j] <= 1e-10 * whole:
            triangle[j, j] = np.inf
            continue
        triangle[j, j:] = rest[j, j:] / np.sqrt(rest[j, j])
        rest[j + 1 :, j + 1 :] -= triangle[j, j + 1 :, None] * triangle[j, j + 1 :]
    values, unit = columns.times(inverse_of_upper(triangle))
    return values * unit


def reflections(basis: Matrix) -> Matrix:
    """Return the normals of reflections whose product has a basis as its first columns, up to sign.

    As Ballard et al. (2014) find Householder's vectors of what is orthonormal already.

    Parameters
    ----------
    basis : ndarray of float64, shape (rows, count)
        Orthonormal columns, then zeros, if any; at most as many as rows. Overwritten.

    Returns
    -------
    ndarray of float64, shape (rows, count)
        Lower trapezoidal.
    """
    count = basis.shape[1]
    top = basis[:count]
    for j in range(count):
        top[j, j] += np.copysign(1.0, top[j, j])
        top[j + 1 :, j] /= top[j, j]
        top[j + 1 :, j + 1 :] -= top[j + 1 :, j, None] * top[j, j + 1 :]
    inverse = inverse_of_upper(np.triu(top))
    basis[:count] = np.tril(top, -1) + np.eye(count)
    below = Integers(basis[count:].copy(), bits_of(len(basis)))
    values, unit = below.times(inverse)
    basis[count:] = values * unit
    return basis


@np.errstate(over="ignore", invalid="ignore")  # what a decoder makes of it, it checks
def orthonormal(columns: FloatVector) -> FloatVector:
    """Return an orthonormal basis of columns, no fewer where they depend on each other.

    By Householder's reflections (1958), with sums that NumPy makes itself, in one thread.

    Parameters
    ----------
    columns : ndarray of float32, shape (rows, count)
        At most as many as rows.
    """
    rest = columns.T.astype(np.float64)  # a row for each column
    basis = np.eye(*rest.shape)
    normals = []
    for j in range(len(rest)):
        normal = rest[j].copy()
        normal[:j] = 0
        normal[j] += np.copysign(np.sqrt(np.square(normal).sum()), normal[j])
        normal *= np.sqrt(2 / (np.square(normal).sum() or 1))
        rest[j:] -= (rest[j:] * normal).sum(axis=1, keepdims=True) * normal
        normals.append(normal)
    for normal in reversed(normals):
        basis -= (basis * normal).sum(axis=1, keepdims=True) * normal
    return basis.T.astype(np.float32)
