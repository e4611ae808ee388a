"""The dead-zone quantiser of one coordinate: its design, and the choice of levels by their bits."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.tables import Symbols
from fedbw_sweep.compression.layout import FloatVector, Ints

CLASSES = 36
"""Classes of scale, half an octave apart: class c has an rms near ``2**(c/2 - 4)`` steps."""

SLOPE = log(2) / 6
"""Error that a bit is worth, in squared steps: what it buys from a fine uniform quantiser."""


def _design() -> tuple[NDArray[np.float32], ...]:
    """Return each class's threshold, bits and squared error a coordinate.

    For a Laplacian the best quantiser at a given slope has equal bins beyond a dead zone, each
    reconstructed at its mean (Sullivan 1996, IEEE Trans. Inf. Theory 42(5)). The threshold t at
    which zero and one cost the same obeys ``t**2 - mean**2 = SLOPE * bits between them``.
    """
    scale = 2 ** (np.arange(CLASSES) / 2 - 4.5)  # of the magnitude's exponential distribution
    ratio = np.exp(-1 / scale)  # of one bin's probability to that of the bin before
    mean = scale - ratio / (1 - ratio)  # within a bin, from where it starts
    threshold = np.full(CLASSES, 0.5)
    for _ in range(60):
        sent = np.exp(-threshold / scale)
        odds = 2 * (1 - sent) / (sent * (1 - ratio))
        threshold = (threshold + np.sqrt(mean**2 + SLOPE * np.maximum(0, np.log2(odds)))) / 2
    threshold = np.minimum(threshold, 1.4)
    sent = np.exp(-threshold / scale)
    bits = -sent * np.log2(np.maximum(sent, 1e-300)) - (1 - sent) * np.log2(1 - sent)
    bits += sent * (1 - np.log2(1 - ratio) + ratio / (1 - ratio) / scale / log(2))
    unsent = 2 * scale**2 - sent * (threshold**2 + 2 * scale * threshold + 2 * scale**2)
    error = unsent + sent * (scale**2 - ratio / (1 - ratio) ** 2)
    return tuple(a.astype(np.float32) for a in (threshold, bits, error))


THRESHOLD, BITS, ERROR = _design()

# fmt: off
SHIFT = np.array([
    0.44419, 0.4625, 0.48838, 0.52466, 0.25129, 0.09176, 0.01945, -0.00786, -0.01515, -0.0148,
    -0.01216, -0.0093, -0.00687, -0.00499, -0.00358, -0.00256, -0.00182, -0.00129, -0.00092,
    -0.00065, -0.00046, -0.00032, -0.00023, -0.00016, -0.00012, -0.00008, -0.00006, -0.00004,
    -0.00003, -0.00002, -0.00001, -0.00001, -0.00001, -0.00001, 0.0, 0.0,
], np.float32)
# fmt: on
"""Each class's reconstruction beyond its level: ``THRESHOLD + mean - 1`` of `_design`.

Written out, for the decoder to know them to the bit: exponentials differ between processors.
"""


def scale_class(mean_square: NDArray[np.floating[Any]]) -> Ints:
    """Return the class of rows by their mean square, in squared steps."""
    octaves: Ints = np.rint(np.log2(np.maximum(mean_square, 2.0**-8))).astype(np.int64)
    return np.minimum(octaves + 8, CLASSES - 1)


def quantise(values: FloatVector, threshold: FloatVector) -> NDArray[np.int32]:
    """Round values, in steps, to bins of width 1 that begin at their threshold; broadcasts."""
    bins = np.abs(values)
    bins += 1 - threshold
    return np.copysign(np.maximum(bins, 0, out=bins), values, out=bins).astype(np.int32)


def dequantise(levels: Ints | Symbols, shift: FloatVector) -> FloatVector:
    """Return the reconstruction of each level, in steps; broadcasts."""
    values = levels.astype(np.float32)
    values += np.sign(values) * shift
    return values


_RATED = 64  # magnitudes from here on are not counted each


def rate_differences(levels: Ints | Symbols, classes: NDArray[np.integer[Any]]) -> FloatVector:
    """Return how many bits a magnitude takes beyond the one below, as these levels have it.

    Returns
    -------
    ndarray of float32, shape (CLASSES, magnitudes)
        In each class; the difference between 0 and 1 includes the sign. The last, of all that
        are larger too, is 0.
    """
    kinds = np.minimum(np.abs(levels), _RATED) + (_RATED + 1) * classes.astype(np.int64)
    counts = np.bincount(kinds, minlength=CLASSES * (_RATED + 1)) + 0.3
    bits = -np.log2(counts).reshape(CLASSES, _RATED + 1)
    bits[:, 1:] += 1
    extra_bits: FloatVector = np.diff(bits).astype(np.float32)
    extra_bits[:, -1] = 0
    return extra_bits


def quantise_to_rate(
    values: FloatVector,
    classes: NDArray[np.integer[Any]],
    shift: FloatVector,
    extra_bits: FloatVector,
    price: float,
) -> NDArray[np.int32]:
    """Round values, in steps, to where squared error plus price of bits is least.

    Parameters
    ----------
    values : ndarray, shape (n,)
        In steps.
    classes, shift : ndarray, shape (n,), or one for all
        The values' classes, and how far beyond their level they are reconstructed.
    extra_bits : ndarray, shape (CLASSES, magnitudes)
        What `rate_differences` returned.
    price : float
        Error that a bit is worth, in squared steps.
    """
    magnitudes = np.abs(values)
    below = np.floor(magnitudes)
    penalty = price / 2 * extra_bits[classes, np.minimum(below, _RATED - 1).astype(np.intp)]
    levels = below + (magnitudes > below + 0.5 + shift + penalty)
    # From 0 to 1 is further than between others.
    some = magnitudes > (1 + shift) / 2 + price / 2 * extra_bits[classes, 0] / (1 + shift)
    rounded: NDArray[np.int32] = np.copysign(np.maximum(levels, 1) * some, values).astype(np.int32)
    return rounded
