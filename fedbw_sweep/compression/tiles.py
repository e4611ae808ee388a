"""Long vectors a tile at a time: temporaries stay in the processor's cache, and small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import Ints

TILE = 1 << 14
"""Numbers worked on at a time."""


def tiles(count: int, start: int = 0, size: int = TILE) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that make up ``[start, start + count)``."""
    stop = start + count
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def histogram(values: NDArray[Any]) -> Ints:
    """Return how often each of 0 to 255 occurs among integers below 256; shape (256,)."""
    counts = np.zeros(256, np.int64)
    for tile in tiles(len(values)):
        counts += np.bincount(values[tile], minlength=256)
    return counts
