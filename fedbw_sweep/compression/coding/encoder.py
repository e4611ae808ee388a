"""Integers to nearly as few bits as their statistics allow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.ans import AnsCoder, uniform
from fedbw_sweep.compression.coding.tables import (
    OCTAVES,
    Symbols,
    by_context,
    floor_log2,
    geometric,
    laplace,
    run_starts,
    table_model,
    table_resolution,
    tokenise,
)
from fedbw_sweep.compression.layout import Ints

_SLOPES = 8

# Bits of one difference between a table's levels at each slope: so many per step, and at least.
_STEP_BITS = 2.0 ** np.arange(_SLOPES) / 32
_STEP_START = np.log2((1 + 2**-_STEP_BITS) / (1 - 2**-_STEP_BITS))


class Encoder:
    """Collects integers and packs them into one byte string.

    Each method has its mirror in `Decoder`, to be called in the same order with the same bounds.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Symbols | int, Any]] = []

    def finish(self) -> bytes:
        """Return the packed stream; the encoder is spent."""
        coder = AnsCoder()
        while self._parts:  # the coder is a stack: what goes in last comes out first
            coder.encode_reverse(*self._parts.pop())
        return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))

    def _put(self, values: NDArray[Any], model: Any) -> None:
        self._parts.append((np.ascontiguousarray(values, np.int32), model))

    def uint(self, value: int, limit: int) -> None:
        """Add one integer in ``[0, limit]`` as it is, in the bits that `limit` has."""
        for shift in range(0, limit.bit_length(), 16):
            width = min(16, limit.bit_length() - shift)
            self._parts.append((value >> shift & 0xFFFF, uniform(width)))

    def bits(self, values: NDArray[Any], width: int) -> None:
        """Add the low `width` bits of integers as they are: ``width * n`` bits in all."""
        for place in range(width):
            plane = (values >> place & 1).astype(np.uint8)
            packed = np.packbits(plane, bitorder="little").tobytes()
            full, rest = divmod(len(values), 16)
            words = np.frombuffer(packed + b"\0", "<u2", count=full + (rest > 0))
            self._put(words[:full], uniform(16))
            if rest:
                self._put(words[full:], uniform(rest))

    def floats(self, values: NDArray[np.floating[Any]]) -> None:
        """Add float32 or float16 numbers as they are."""
        little_endian = values.astype(values.dtype.newbyteorder("<"))
        self._put(little_endian.view("<u2"), uniform(16))

    def symbols(self, values: NDArray[Any]) -> None:
        """Add integers in ``[0, MAX_SYMBOL]`` at the cost of their entropy and a small table."""
        if values.size:
            self._symbols(values, np.array([values.size]))

    def _symbols(self, values: NDArray[Any], sizes: Ints) -> None:
        """Add symbols, the first of `sizes` with one table, the next with another, and so on.

        A table is the last symbol that occurs and then, for each symbol up to that, the change in
        the rounded logarithm of its count. If the last is 0, the symbols need no coding.
        """
        width, ends = int(values.max()) + 1, np.cumsum(sizes)
        parts = [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        counts = np.array([np.bincount(part, minlength=width) for part in parts])
        last = width - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)
        resolution = table_resolution(sizes, last)
        span = OCTAVES << resolution
        octaves = np.log2(np.maximum(counts, 1) / counts.max(axis=1, keepdims=True)) + OCTAVES
        levels = np.rint(octaves * (1 << resolution)[:, None]).astype(np.int64)
        levels = np.where(counts, np.maximum(levels, 1), 0)
        steps = np.diff(levels, prepend=span[:, None])
        steps[np.arange(width) > last[:, None]] = 0
        size = np.abs(steps).sum(axis=1)[:, None] * _STEP_BITS + (last[:, None] + 1) * _STEP_START
        slope = np.argmin(size, axis=1)

        self._put(floor_log2(last) + 1, geometric(2))
        self._put(slope[last > 0], uniform(3))
        for i in np.flatnonzero(last):
            top = 1 << int(last[i]).bit_length() - 1
            self.uint(int(last[i]) - top, top - 1)
            self._put(steps[i, : last[i] + 1] + span[i], laplace(int(span[i]), int(slope[i])))
            self._put(parts[i], table_model(levels[i, : last[i] + 1], int(resolution[i])))

    def integers(self, values: NDArray[Any], contexts: NDArray[Any] | None = None) -> None:
        """Add integers in ``[0, MAX_INTEGER]`` at the cost of their entropy and small tables.

        Low bits in which their distribution is flat travel as they are. Of the rest, numbers below
        16 have a probability each and larger ones share one by the quarter of an octave.

        Parameters
        ----------
        values : ndarray of int, shape (n,)
            The integers; small ones should be the frequent ones.
        contexts : ndarray of int, shape (n,), optional
            Integers below 256: which table each is coded with. The decoder must know it already.
        """
        if not values.size:
            return
        order, sizes = by_context(contexts, values.size)
        high = values[order]
        means = np.add.reduceat(high, run_starts(sizes)) // sizes
        shifts = np.maximum(0, floor_log2(means) - 3)
        self._put(shifts, geometric(1))
        for shift, end, size in zip(shifts.tolist(), np.cumsum(sizes), sizes, strict=True):
            if shift:
                self.bits(high[end - size : end], shift)
        if shifts.any():
            high = high >> np.repeat(shifts, sizes)
        tokens, large, widths = tokenise(high)
        self._symbols(tokens, sizes)
        for width in np.flatnonzero(np.bincount(widths)):
            self.bits(high[large[widths == width]], int(width))
