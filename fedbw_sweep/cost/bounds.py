"""The bounds that no code beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Spectrum = tuple[tuple[int, int], ArrayLike]
"""A matrix by its shape and singular values."""

LLOYD_MAX_NMSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Least NMSE of a scalar quantiser of Gaussian coordinates at 1 to 4 bits (Max 1960, table I)."""


def gaussian_rate(nmse: float) -> float:
    """Bits per coordinate that independent Gaussian coordinates of one variance need.

    ``R(D) = log2(1 / D) / 2`` (Shannon 1959; Cover and Thomas, theorem 10.3.2), 0 from D = 1 on.
    """
    return math.inf if nmse <= 0 else max(0.0, -math.log2(nmse) / 2)


def unbiased_gaussian_rate(nmse: float) -> float:
    """Bits per coordinate an unbiased code of Gaussian coordinates needs.

    Scaling the optimum's reconstruction by ``1 / (1 - D)`` makes it unbiased and its error
    ``D / (1 - D)``, so ``R = log2(1 + 1 / nmse) / 2``.
    """
    return math.inf if nmse <= 0 else math.log2(1 + 1 / nmse) / 2


def reverse_water_filling(energies: ArrayLike, sizes: ArrayLike, nmse: float) -> float:
    """Bits per coordinate that Gaussian tensors of different variances need.

    Every tensor gets the same distortion per coordinate, or its whole variance where that is less
    (Cover and Thomas, theorem 10.3.3).

    Parameters
    ----------
    energies : array_like, shape (tensors,)
        Sum of squares of each tensor.
    sizes : array_like, shape (tensors,)
        Coordinates of each tensor.
    nmse : float
        Squared error over energy, of all together.

    Returns
    -------
    float
        Mean bits per coordinate.
    """
    size, energy = np.asarray(sizes, float), np.asarray(energies, float)
    size, energy = size[energy > 0], energy[energy > 0]
    if nmse >= 1 or not size.size:
        return 0.0
    if nmse <= 0:
        return math.inf
    variance = energy / size
    low, high = 0.0, float(variance.max())
    for _ in range(200):  # bisection on the water level; exact to float precision
        level = (low + high) / 2
        too_much = np.minimum(variance, level) @ size > nmse * energy.sum()
        low, high = (low, level) if too_much else (level, high)
    bits = np.maximum(0.0, np.log2(variance / high) / 2)
    return float(bits @ size / np.asarray(sizes, float).sum())


def log2_choose(size: int, count: int) -> float:
    """Bits to say which `count` of `size` coordinates are kept, all choices equally likely."""
    lgamma = math.lgamma
    nats = lgamma(size + 1) - lgamma(count + 1) - lgamma(size - count + 1)
    return nats / math.log(2)


def spectral_rate(spectra: Sequence[Spectrum], nmse: float) -> float:
    """Bits per coordinate that matrices need whose singular vectors alone are random.

    A component of singular value s has ``m - k`` and ``n - k`` coordinates after `k` larger ones,
    of energy s**2 on either side, and an error of each side moves the matrix by as much. Components
    are coded where that is worth its bits at the common water level, and left out elsewhere. What
    is known of the vectors besides (see `compression.rotation`) can do with less.

    Parameters
    ----------
    spectra : sequence of (shape, singular values)
        Of each matrix, of shape (m, n), descending; a vector is a matrix with one row.
    nmse : float
        Squared error over energy, of all together.

    Returns
    -------
    float
        Mean bits per coordinate, at an error of at most `nmse`.
    """
    sides, energies = [], []
    for (rows, columns), values in spectra:
        energies.append(np.square(np.asarray(values, float)))
        before = np.arange(energies[-1].size)
        sides.append(np.stack([rows - before, columns - before]))
    coordinates, energy = np.concatenate(sides, axis=1), np.concatenate(energies)
    coordinates, energy = coordinates[:, energy > 0], energy[energy > 0]
    if nmse >= 1 or not energy.size:
        return 0.0
    if nmse <= 0:
        return math.inf
    size = sum(rows * columns for (rows, columns), _ in spectra)

    def spent(level: float) -> tuple[float, float]:
        """Return bits and error at a water level."""
        left = np.minimum(coordinates * level, energy).sum(axis=0)
        bits = (coordinates * np.maximum(0, np.log2(energy / (coordinates * level)) / 2)).sum(0)
        coded = left + 2 * math.log(2) * level * bits < energy
        return float(bits[coded].sum()), float(np.where(coded, left, energy).sum())

    low, high = 0.0, float(energy.max())
    for _ in range(200):  # bisection; where a component is left out, the error jumps
        level = (low + high) / 2
        low, high = (low, level) if spent(level)[1] > nmse * energy.sum() else (level, high)
    return spent(low)[0] / size
