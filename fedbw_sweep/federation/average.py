"""The weighted mean of a round's uploads, summed in the clients' order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import FloatVector

CHUNK = 2**16
"""Coordinates added at a time, so that they stay in a core's cache."""


class WeightedMean:
    """Sums decoded uploads as they come; float64, so that the sum hardly rounds.

    Arrays that are not floating point have no mean: those of the client with the most training
    sequences are taken.

    Parameters
    ----------
    size : int
        Coordinates of an upload.
    """

    def __init__(self, size: int) -> None:
        self.total: NDArray[np.float64] = np.zeros(size)
        self.weight = 0
        self.exact = b""
        self._most = 0

    def add(self, upload: FloatVector, exact: bytes, weight: int, examples: int) -> None:
        """Take one client's upload.

        Parameters
        ----------
        upload : ndarray of float32, shape (size,)
            Its decoded update, or its weights.
        exact : bytes
            Its arrays that are not floating point.
        weight : int
            Its weight in the mean.
        examples : int
            Its training sequences.
        """
        for start in range(0, self.total.size, CHUNK):
            piece = slice(start, start + CHUNK)
            self.total[piece] += upload[piece] * np.float64(weight)
        self.weight += weight
        if examples > self._most:
            self._most, self.exact = examples, exact

    def take(self) -> NDArray[np.float64]:
        """Return the mean, in the memory of the sum."""
        self.total /= self.weight
        return self.total
