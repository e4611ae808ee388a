"""Integers back from a stream that may be damaged or hostile."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import book, sizes_to_book
from fedbw_sweep.compression.coding.ans import AnsCoder, uniform
from fedbw_sweep.compression.coding.tables import (
    MAX_SYMBOL,
    OCTAVES,
    Symbols,
    by_context,
    geometric,
    laplace,
    table_model,
    table_resolution,
    tokenise,
)
from fedbw_sweep.compression.layout import Ints
from fedbw_sweep.errors import PayloadError


class Decoder:
    """Reads what an `Encoder` packed, from bytes that may be damaged or hostile.

    What is read is booked under a `part` (see `base.book`). `counts` says how many of the values
    are each tensor's, those of one after another's; if not given, each coordinate has one.

    Parameters
    ----------
    data : memoryview
        What `Encoder.finish` returned.

    Raises
    ------
    PayloadError
        Here and in every method: if the stream cannot be one that `Encoder` makes.
    """

    def __init__(self, data: memoryview) -> None:
        if len(data) and data[-1] == 0:
            raise PayloadError("the entropy-coded stream ends in a zero byte")
        words = np.frombuffer(bytes(data) + b"\0" * (-len(data) % 4), "<u4")
        self._coder = AnsCoder(words.astype(np.uint32))

    def finish(self) -> None:
        """Refuse a stream that goes on after its last value, or ended before it."""
        if not self._coder.is_empty():
            raise PayloadError("the entropy-coded stream does not end where its values do")

    def _left(self) -> float:
        """Return the information still to be read, in bits."""
        words, state = self._coder.pos()
        return 32 * int(words) + log2(max(1, int(state)))

    def _book(
        self,
        part: str,
        bits: float,
        costs: NDArray[np.float64],
        order: Any,
        counts: Ints | None,
        before: float,
    ) -> None:
        """Book the bits of values, divided as they cost, and all else read as their tables.

        `costs` are in another order; `before` is what was left before all that was read.
        """
        sizes = sizes_to_book()
        if sizes is None:
            return
        tensors = np.arange(len(sizes), dtype=np.int32)
        owners = np.repeat(tensors, sizes if counts is None else counts)[order]
        book(part, bits, np.bincount(owners, costs, len(sizes)))
        tables = before - self._left() - bits
        book("tables", tables, np.bincount(owners, minlength=len(sizes)))

    def _get(self, count: int, model: Any) -> Symbols:
        symbols: Symbols = self._coder.decode(model, count)
        return symbols

    def uint(self, limit: int) -> int:
        """Read one integer in ``[0, limit]``."""
        value = 0
        for shift in range(0, limit.bit_length(), 16):
            width = min(16, limit.bit_length() - shift)
            value |= int(self._coder.decode(uniform(width))) << shift
        if value > limit:
            raise PayloadError(f"{value} is out of range: at most {limit}")
        return value

    def bits(
        self, count: int, width: int, part: str = "values", counts: Ints | None = None
    ) -> Ints:
        """Read `count` integers of `width` bits."""
        before = self._left()
        values = self._bits(count, width)
        book(part, before - self._left(), counts)
        return values

    def _bits(self, count: int, width: int) -> Ints:
        values = np.zeros(count, np.int64)
        full, rest = divmod(count, 16)
        for place in range(width):
            words = self._get(full, uniform(16)).astype("<u2")
            if rest:
                words = np.append(words, self._get(1, uniform(rest)).astype("<u2"))
            plane = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
            values |= plane.astype(np.int64) << place
        return values

    def floats(
        self,
        count: int,
        dtype: str = "float32",
        part: str = "values",
        counts: Ints | None = None,
    ) -> NDArray[np.floating[Any]]:
        """Read `count` float32 or float16 numbers, which may be NaN or infinite."""
        kind = np.dtype(dtype)
        before = self._left()
        words = self._get(count * kind.itemsize // 2, uniform(16)).astype("<u2")
        book(part, before - self._left(), counts)
        return words.view(kind.newbyteorder("<")).astype(kind)

    def symbols(
        self, size: int, limit: int, part: str = "values", counts: Ints | None = None
    ) -> Symbols:
        """Read `size` integers in ``[0, limit]``."""
        sizes, before = np.full(min(size, 1), size), self._left()
        symbols, bits = self._symbols(sizes, np.full_like(sizes, limit))
        if sizes_to_book() is not None:
            costs = _costs(symbols, sizes, bits)
            self._book(part, sum(bits), costs, slice(None), counts, before)
        return symbols

    def _symbols(self, sizes: Ints, limits: Ints) -> tuple[Symbols, list[float]]:
        """Read symbols, the first of `sizes` with one table, the next with another, and so on.

        Returned with the bits that those of each table took.
        """
        lengths = self._get(len(sizes), geometric(2))
        slopes = iter(self._get(int(np.count_nonzero(lengths)), uniform(3)))
        parts, bits = [np.zeros(0, np.int32)], []
        for size, limit, length in zip(sizes, limits, lengths.tolist(), strict=True):
            top = 1 << length >> 1
            last = top + self.uint(max(0, top - 1))
            if last > min(limit, MAX_SYMBOL):
                raise PayloadError(f"a table for symbols to {last}: at most {limit}")
            if last:
                table = self._table(size, last, int(next(slopes)))
                before = self._left()
                parts.append(self._get(size, table))
                bits.append(before - self._left())
            else:
                parts.append(np.zeros(size, np.int32))
                bits.append(0.0)
        return np.concatenate(parts), bits

    def _table(self, size: int, last: int, slope: int) -> Any:
        resolution = int(table_resolution(np.array(size), np.array(last)))
        span = OCTAVES << resolution
        steps = self._get(last + 1, laplace(span, slope)) - span
        levels = span + np.cumsum(steps, dtype=np.int64)
        if levels.min() < 0 or levels.max() > span:
            raise PayloadError("a table of probabilities leaves its range")
        return table_model(levels, resolution)

    def integers(
        self,
        size: int,
        limit: int,
        contexts: NDArray[Any] | None = None,
        part: str = "values",
        counts: Ints | None = None,
    ) -> Ints:
        """Read `size` integers in ``[0, limit]``; see `Encoder.integers`."""
        values = np.zeros(size, np.int64)
        if not size:
            return values
        before = self._left()
        order, sizes = by_context(contexts, size)
        shifts = self._get(len(sizes), geometric(1)).astype(np.int64)
        plain = self._left()
        low = [
            self._bits(n, shift) for n, shift in zip(sizes, shifts.tolist(), strict=True) if shift
        ]
        plain -= self._left()
        tokens, bits = self._symbols(sizes, tokenise(limit >> shifts)[0])
        plain += self._left()
        large = np.flatnonzero(tokens >= 16)
        high = tokens.astype(np.int64)
        widths = high[large] // 4 - 2
        high[large] = (high[large] - 4 - 4 * widths) << widths
        for width in np.flatnonzero(np.bincount(widths)):
            of_width = large[widths == width]
            high[of_width] |= self._bits(len(of_width), int(width))
        plain -= self._left()
        if sizes_to_book() is not None:
            costs = _costs(tokens, sizes, bits) + np.repeat(shifts, sizes)
            costs[large] += widths
            self._book(part, plain + sum(bits), costs, order, counts, before)
        if low:
            shift = np.repeat(shifts, sizes)
            high <<= shift
            high[shift > 0] |= np.concatenate(low)
        if high.max() > limit:
            raise PayloadError(f"{high.max()} is out of range: at most {limit}")
        values[order] = high
        return values


def _costs(symbols: Symbols, sizes: Ints, bits: list[float]) -> NDArray[np.float64]:
    """Divide the bits of each stretch among its symbols, by ideal code length."""
    costs = np.zeros(len(symbols))
    for total, size, end in zip(bits, sizes, np.cumsum(sizes), strict=True):
        part = symbols[end - size : end]
        lengths = np.log2((size + 1) / np.maximum(np.bincount(part), 1))[part]
        costs[end - size : end] = lengths * (total / lengths.sum())
    return costs
