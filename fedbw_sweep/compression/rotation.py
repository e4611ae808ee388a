"""Coordinates in which an update lies in few: first the directions in which the model has moved.

Both ends know the initial model and the one that the client received. What has moved the model so
far moves it on: the leading singular directions of the difference hold much of a matrix's next
update. An orthogonal transform makes them its first rows and columns, so that a method which codes
rows by their own statistics spends its bits there. The transform is sent by neither end and changes
no error. CAFe (arXiv 2512.22623) subtracts a prediction from the update, and GradESTC (arXiv
2601.10491) keeps a basis of a client's own gradients up to date by sending it; here both ends
compute the basis of what they hold anyway, for clients that take part rarely.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.exact import (
    Integers,
    Matrix,
    bits_of,
    inverse_of_upper,
    orthonormalised,
    reflections,
)
from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.tiles import tiles

DIRECTIONS = 64
"""Most singular directions that become the first coordinates, on each side of a matrix."""

_LEAST = 16  # rows of a matrix that has any
_ITERATIONS = 2  # of the subspace that they span
_BLOCK = 1 << 16  # numbers worked on at a time
_LIMIT = float(np.finfo(np.float32).max)


class Moved:
    """What a matrix has moved, rounded to integers block by block where it is multiplied.

    Parameters
    ----------
    received, initial : ndarray of float32, shape (rows, columns)
        At most as many rows as columns.

    Attributes
    ----------
    directions : int
        How many of its singular directions are used: none where nothing has moved, or the matrix
        has few rows.
    """

    def __init__(self, received: FloatVector, initial: FloatVector) -> None:
        self.received, self.initial, self.shape = received, initial, received.shape
        self.bits = bits_of(max(self.shape))
        largest = [np.abs(block).max() for _, block in self._blocks()]
        self._largest = float(max(largest))
        used = self.shape[0] >= _LEAST and 0 < self._largest < np.inf
        self.directions = min(DIRECTIONS, self.shape[0] // 2) if used else 0

    def _blocks(self) -> Iterator[tuple[slice, FloatVector]]:
        with np.errstate(over="ignore"):
            for rows in tiles(self.shape[0], size=max(1, _BLOCK // self.shape[1])):
                yield rows, self.received[rows] - self.initial[rows]

    def times(self, thin: Integers) -> Integers:
        """Return the product with one of shape (columns, count)."""
        product = np.empty((self.shape[0], thin.values.shape[1]))
        for rows, block in self._blocks():
            whole = Integers(block, self.bits, largest=self._largest)
            product[rows] = whole.values @ thin.values
        return Integers(product, self.bits, whole.unit * thin.unit)

    def transposed_times(self, thin: Integers) -> Integers:
        """Return the product of the transposed with one of shape (rows, count)."""
        product = np.zeros((self.shape[1], thin.values.shape[1]))
        for rows, block in self._blocks():
            whole = Integers(block, self.bits, largest=self._largest)
            product += whole.values.T @ thin.values[rows]
        return Integers(product, self.bits, whole.unit * thin.unit)


class Orthogonal:
    """A product of reflections, ``I - V T V'`` (Schreiber and Van Loan 1989).

    Parameters
    ----------
    basis : ndarray of float64, shape (size, count)
        Its first columns, up to sign: orthonormal, or zeros where any will do. Overwritten.
    """

    def __init__(self, basis: Matrix) -> None:
        self._bits = bits_of(len(basis))
        self._normals = Integers(reflections(basis), self._bits)
        square = self._normals.gram()
        # With rounded normals too it is orthogonal, if V'V = inv(T) + inv(T)'.
        half = np.triu(square, 1) + np.diag(np.diagonal(square) / 2)
        self._triangle = inverse_of_upper(half)

    def turn(self, matrix: NDArray[np.float32], back: bool) -> None:
        """Multiply, in place, a matrix of `size` rows by the transposed one; `back` by itself."""
        of_side = self._triangle if back else self._triangle.T
        triangle = Integers(of_side.copy(), bits_of(len(of_side)))
        for columns in tiles(matrix.shape[1], size=max(1, _BLOCK // len(matrix))):
            block = matrix[:, columns]
            whole = Integers(block, self._bits)
            seen = self._normals.values.T @ whole.values * (self._normals.unit * whole.unit)
            changed, unit = triangle.times(seen)
            lost, scale = self._normals.times(changed * unit)
            np.clip(block - lost * scale, -_LIMIT, _LIMIT, out=block, casting="same_kind")


class Rotation:
    """The change of coordinates of one matrix.

    Parameters
    ----------
    moved : Moved
        That has directions.
    """

    def __init__(self, moved: Moved) -> None:
        count = moved.directions
        draws = np.random.PCG64(0).random_raw(moved.shape[1] * count) >> np.uint64(57)
        right = draws.reshape(-1, count) - 63.5
        for _ in range(_ITERATIONS):
            seen = moved.times(Integers(right, moved.bits))
            right = orthonormalised(moved.transposed_times(seen))
        left = orthonormalised(moved.times(Integers(right.copy(), moved.bits)))
        self._sides = Orthogonal(left), Orthogonal(right)

    def turn(self, matrix: FloatVector, back: bool = False) -> None:
        """Change the coordinates of a matrix in place, or change them back."""
        for view, side in zip((matrix, matrix.T), self._sides, strict=True):
            side.turn(view, back)
