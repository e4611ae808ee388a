"""Tables of probabilities from rounded logarithms, and the symbols that stand for integers."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.ans import categorical
from fedbw_sweep.compression.layout import Ints

Symbols = NDArray[np.int32]

MAX_SYMBOL = (1 << 16) - 1
MAX_INTEGER = (1 << 31) - 1

OCTAVES = 23  # a table holds counts down to 2**-23 of the largest; rarer ones keep 2**-24
_MAX_RESOLUTION = 5  # levels of a table: at most 2**5 to the octave

# 2**(20 + i/32) rounded down, exactly: five integer square roots are one integer 32nd root.
_ROOTS = [1 << (640 + i) for i in range(32)]
for _ in range(5):
    _ROOTS = [isqrt(root) for root in _ROOTS]
_FRACTIONS = np.array(_ROOTS, np.int64)


def exp2(e: Ints) -> Ints:
    """2**(20 + e/32) rounded down, for integers 0 <= e <= 23 * 32."""
    powers: Ints = _FRACTIONS[e & 31] << (e >> 5)
    return powers


@lru_cache(maxsize=2)
def geometric(halving: int) -> Any:
    """Return a model of integers in [0, 31], whose probability halves every so many."""
    return categorical(exp2(np.maximum(0, OCTAVES * 32 - np.arange(32) * 32 // halving)))


@lru_cache(maxsize=64)
def laplace(span: int, slope: int) -> Any:
    """Return a model of differences in [-span, span], halving every 32 / 2**slope steps."""
    distance = np.abs(np.arange(-span, span + 1)) << slope
    return categorical(exp2(np.maximum(0, OCTAVES * 32 - distance)))


def table_model(levels: Ints, resolution: int) -> Any:
    """Return the model of a table of rounded logarithms; level 0 is a symbol that never occurs."""
    weights = exp2(np.minimum(levels << (5 - resolution), OCTAVES * 32))
    return categorical(np.where(levels > 0, weights, 0))


def by_context(contexts: NDArray[Any] | None, size: int) -> tuple[Any, Ints]:
    """Return an order of values by context, and how many have each of those that occur."""
    if contexts is None:
        return slice(None), np.full(min(size, 1), size)
    sizes = np.bincount(contexts, minlength=1)
    return np.argsort(contexts.astype(np.uint8), kind="stable"), sizes[sizes > 0]


def floor_log2(values: NDArray[Any]) -> Ints:
    """Floor of log2, exact for positive integers below 2**53."""
    exponents: Ints = np.frexp(values)[1].astype(np.int64)
    return exponents - 1


def tokenise(values: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Return tokens (exact below 16, then four to the octave), and where and how wide the rest is.

    The token of a large integer says its octave and the two bits below the leading one.
    """
    large = np.flatnonzero(values >= 16)
    widths = floor_log2(values[large]) - 2
    tokens = values.copy()
    tokens[large] = 4 * widths + (values[large] >> widths) + 4
    return tokens, large, widths


def _token_bases() -> NDArray[np.uint32]:
    tokens = np.arange(256)
    widths = np.clip(tokens // 4 - 2, 0, 28)
    large = (tokens - 4 - 4 * widths).astype(np.int64) << widths
    return np.where(tokens < 16, tokens, large).astype(np.uint32)


TOKEN_BASES = _token_bases()
"""The least integer of each token; there are 124, for integers up to `MAX_INTEGER`."""


def table_resolution(sizes: Ints, last: Ints) -> Ints:
    """Return log2 of the levels to the octave in tables for so many symbols, up to the last.

    Finer levels fit better and cost more: the two balance near n / (25 * symbols) = 4**r.
    """
    octave = floor_log2(sizes // (25 * (last + 1)))
    return np.minimum(_MAX_RESOLUTION, (octave + 2) // 2)


def run_starts(sizes: Ints) -> Ints:
    """Where each of consecutive runs of `sizes` begins."""
    return np.cumsum(sizes, dtype=np.int64) - sizes
