"""Subtractive dither: rounding whose error is the same for every value, and 0 on average.

Noise that is uniform over a step is added to a value before it is rounded; the decoder draws the
same noise and subtracts it. The error is then uniform over a step and independent of the value
(Schuchman 1964), so that the errors of many clients average away (UVeQFed, Shlezinger et al. 2021,
arXiv 2006.03262).
"""

from __future__ import annotations

from math import ceil, e, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.quantiser import CLASSES
from fedbw_sweep.compression.tiles import tiles

DITHERED_ERROR = 1 / 12
"""Squared error of a coordinate, in squared steps, whatever its scale."""

_FINE = 12
"""Scale classes, of up to 3 steps' rms, in which the noise tells much of a level."""

_PARTS = 16
"""Kinds of noise that such a class has, by magnitude."""


class Noise:
    """Uniform noise in (-1/2, 1/2), the same on every machine.

    Parameters
    ----------
    seed : int
        From 0 to 2**32 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._stream = np.random.PCG64(seed)

    def take(self, count: int) -> FloatVector:
        """Return the next `count` numbers: odd multiples of 2**-24, never 0."""
        taken = np.empty(count, np.float32)
        for tile in tiles(count):
            words = self._stream.random_raw(tile.stop - tile.start) >> np.uint64(41)
            taken[tile] = (words + 0.5) * 2.0**-23 - 0.5
        return taken


def noise_contexts(classes: NDArray[np.uint8], noise: FloatVector) -> NDArray[np.uint8]:
    """Return what levels are coded by: their class of scale and, where it tells much, the noise.

    A small value with noise near 0 is nearly always rounded to 0; with noise near one half, it is
    rounded to 0 or to the level on the noise's side.
    """
    kinds = (np.abs(noise) * (2 * _PARTS)).astype(np.uint8)
    return np.where(classes < _FINE, _PARTS * classes + kinds, (_PARTS - 1) * _FINE + classes)


def fold(levels: NDArray[np.int32], noise: FloatVector) -> NDArray[np.int32]:
    """Return levels as whole numbers from 0, those on the noise's side before the others."""
    along = np.where(noise < 0, -levels, levels)
    return np.where(along > 0, 2 * along - 1, -2 * along)


def unfold(folded: NDArray[np.int32], noise: FloatVector) -> FloatVector:
    """Return values, in steps, from what `fold` returned."""
    half = (folded >> 1) + (folded & 1)
    along = np.where(folded & 1, half, -half)
    return np.where(noise < 0, -along, along).astype(np.float32) - noise


def _dithered_bits() -> NDArray[np.float32]:
    """Return the bits that a level of each class takes, given its noise, for a Laplacian."""
    bits = np.empty(CLASSES, np.float32)
    noise = (np.arange(256) + 0.5)[:, None] / 256 - 0.5
    for at, scale in enumerate(2 ** (np.arange(CLASSES) / 2 - 4.5)):
        if scale > 4:  # the noise tells nothing: the entropy of the density
            bits[at] = log2(2 * e * scale)
            continue
        most = ceil(20 * scale) + 1
        edges = np.arange(-most, most + 2) - 0.5 - noise
        tail = np.exp(-np.abs(edges) / scale) / 2
        chance = np.maximum(np.diff(np.where(edges < 0, tail, 1 - tail)), 1e-300)
        bits[at] = -(chance * np.log2(chance)).sum(axis=1).mean()
    return bits


DITHERED_BITS = _dithered_bits()


def dithered_cost(mean_square: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bits and the squared error of a coordinate, in steps, by its mean square."""
    at = np.log2(np.maximum(mean_square, 2.0**-40)) + 8
    bits = np.interp(at, np.arange(CLASSES), DITHERED_BITS) + np.maximum(0, at - CLASSES) / 2
    return bits * np.exp2(np.minimum(at, 0)), np.full_like(bits, DITHERED_ERROR)
