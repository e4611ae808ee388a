"""Integers back from a stream that may be damaged or hostile."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import book, sizes_to_book
from fedbw_sweep.compression.coding.ans import AnsCoder, uniform
from fedbw_sweep.compression.coding.tables import (
    MAX_SYMBOL,
    OCTAVES,
    TOKEN_BASES,
    by_context,
    geometric,
    laplace,
    table_model,
    table_resolution,
    tokenise,
)
from fedbw_sweep.compression.layout import Ints
from fedbw_sweep.compression.tiles import histogram, tiles
from fedbw_sweep.errors import PayloadError

Unsigned = NDArray[np.unsignedinteger[Any]]


def _dtype(bits: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest type of so many bits, at most 32."""
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32


class Coded:
    """Integers as they were read, context by context; `take` returns them in their own order.

    So that hostile counts cost no more than they must, an integer takes no more bytes than its
    limit needs, and is put in order only where it is used.

    Attributes
    ----------
    values : ndarray of unsigned integers, shape (n,)
        The integers, all of context 0 first.
    negative : ndarray of uint8, optional
        Whether each is negative, in their own order and of those that are not zero.
    """

    def __init__(self, values: Unsigned, contexts: NDArray[Any] | None, starts: Ints) -> None:
        self.values = values
        self._contexts, self._next, self._at = contexts, starts, 0
        self.negative: Unsigned | None = None
        self._signs = 0

    def take(self, count: int) -> NDArray[np.int32]:
        """Return the next `count` integers with their signs."""
        taken = np.empty(count, np.int32)
        for tile in tiles(count):
            self._take(taken[tile])
        return taken

    def _take(self, out: NDArray[np.int32]) -> None:
        start = self._at
        self._at += len(out)
        if self._contexts is None:
            out[:] = self.values[start : self._at]
        else:
            contexts = self._contexts[start : self._at]
            ends = self._next + np.bincount(contexts, minlength=len(self._next))
            used = np.flatnonzero(ends > self._next)
            runs = zip(self._next[used].tolist(), ends[used].tolist(), strict=True)
            order = np.argsort(contexts, kind="stable")
            out[order] = np.concatenate([self.values[a:b] for a, b in runs])
            self._next = ends
        if self.negative is not None:
            some = np.flatnonzero(out)
            negative = self.negative[self._signs : self._signs + len(some)]
            self._signs += len(some)
            out[some] *= 1 - 2 * negative.view(np.int8)


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
        words = np.zeros(-(-len(data) // 4), "<u4")
        words.view(np.uint8)[: len(data)] = data
        self._coder = AnsCoder(words.astype(np.uint32, copy=False))

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
        book(part, bits, _by_tensor(costs, order, counts))
        tables = before - self._left() - bits
        book("tables", tables, _by_tensor(np.ones(len(costs)), order, counts))

    def _get(self, count: int, model: Any) -> NDArray[np.int32]:
        symbols: NDArray[np.int32] = self._coder.decode(model, count)
        return symbols

    def _fill(self, out: NDArray[Any], model: Any) -> None:
        for tile in tiles(len(out)):
            out[tile] = self._get(tile.stop - tile.start, model)

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
        self, count: int, width: int, part: str | None = "values", counts: Ints | None = None
    ) -> Unsigned:
        """Read `count` integers of `width` bits; without a part, the caller books them."""
        before = self._left()
        values = np.zeros(count, _dtype(width))
        self._add_bits(values, width)
        if part is not None:
            book(part, before - self._left(), counts)
        return values

    def _add_bits(self, values: NDArray[Any], width: int) -> None:
        """Read the low `width` bits of values where they are zeros."""
        for place in range(width):
            for tile, plane in self._plane(len(values)):
                values[tile] |= plane.astype(values.dtype, copy=False) << place

    def _plane(self, count: int) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Read a bit for each value, tile by tile."""
        for tile in tiles(count):
            size = tile.stop - tile.start
            words = self._get(size // 16, uniform(16)).astype("<u2")
            if rest := size % 16:  # only in the last tile
                words = np.append(words, self._get(1, uniform(rest)).astype("<u2"))
            yield tile, np.unpackbits(words.view(np.uint8), count=size, bitorder="little")

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
        words = np.empty(count * kind.itemsize // 2, "<u2")
        self._fill(words, uniform(16))
        book(part, before - self._left(), counts)
        return words.view(kind.newbyteorder("<")).astype(kind, copy=False)

    def symbols(
        self, size: int, limit: int, part: str = "values", counts: Ints | None = None
    ) -> Unsigned:
        """Read `size` integers in ``[0, limit]``."""
        sizes, before = np.full(min(size, 1), size), self._left()
        symbols = np.zeros(size, _dtype(limit.bit_length()))
        bits = self._symbols(symbols, sizes, np.full_like(sizes, limit))
        if sizes_to_book() is not None:
            costs = _costs(symbols, sizes, bits)
            self._book(part, sum(bits), costs, slice(None), counts, before)
        return symbols

    def _symbols(self, symbols: NDArray[Any], sizes: Ints, limits: Ints) -> list[float]:
        """Read symbols where there are zeros, the first of `sizes` with one table, and so on.

        Returns the bits that those of each table took.
        """
        lengths = self._get(len(sizes), geometric(2))
        slopes = iter(self._get(int(np.count_nonzero(lengths)), uniform(3)))
        ends, bits = np.cumsum(sizes), []
        for size, end, limit, length in zip(sizes, ends, limits, lengths.tolist(), strict=True):
            top = 1 << length >> 1
            last = top + self.uint(max(0, top - 1))
            if last > min(limit, MAX_SYMBOL):
                raise PayloadError(f"a table for symbols to {last}: at most {limit}")
            if last:
                table = self._table(size, last, int(next(slopes)))
                before = self._left()
                self._fill(symbols[end - size : end], table)
                bits.append(before - self._left())
            else:
                bits.append(0.0)
        return bits

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
    ) -> NDArray[np.int32]:
        """Read `size` integers in ``[0, limit]``; see `Encoder.integers`."""
        return self.coded(size, limit, contexts, part, counts).take(size)

    def coded(
        self,
        size: int,
        limit: int,
        contexts: NDArray[Any] | None = None,
        part: str = "values",
        counts: Ints | None = None,
        signed: bool = False,
    ) -> Coded:
        """Read `size` integers in ``[0, limit]``, then the signs of those that are not zero."""
        every = np.array([size]) if contexts is None else histogram(contexts)
        starts = np.cumsum(every) - every
        values = np.zeros(size, _dtype(limit.bit_length() + 1))  # room for what is out of range
        if not size:
            return Coded(values, contexts, starts)
        before, sizes = self._left(), every[every > 0]
        shifts = self._get(len(sizes), geometric(1)).astype(np.int64)
        if shifts.max() >= max(1, limit.bit_length()):
            raise PayloadError(f"{shifts.max()} bits as they are, of integers to {limit}")
        plain = self._left()
        runs = list(zip(np.cumsum(sizes).tolist(), sizes.tolist(), shifts.tolist(), strict=True))
        for end, run, shift in runs:
            self._add_bits(values[end - run : end], shift)
        plain -= self._left()
        tokens = np.zeros(size, np.uint8)
        bits = self._symbols(tokens, sizes, tokenise(limit >> shifts)[0])
        plain += self._left()
        bases = TOKEN_BASES.astype(values.dtype)
        for end, run, shift in runs:
            for tile in tiles(run, end - run):
                values[tile] |= bases[tokens[tile]] << shift
        for width, count in enumerate(histogram(tokens)[16:].reshape(-1, 4).sum(axis=1), 2):
            if count:
                self._add_rest(values, tokens, width, int(count), sizes, shifts)
        plain -= self._left()
        if values.max() > limit:
            raise PayloadError(f"{values.max()} is out of range: at most {limit}")
        order = None
        if sizes_to_book() is not None:
            order, _ = by_context(contexts, size)
            costs = _costs(tokens, sizes, bits) + np.repeat(shifts, sizes)
            costs += np.where(tokens < 16, 0, tokens.astype(np.int64) // 4 - 2)
            self._book(part, plain + sum(bits), costs, order, counts, before)
        coded = Coded(values, contexts, starts)
        if signed:
            before = self._left()
            coded.negative = self.bits(int(np.count_nonzero(values)), 1, None)
            if order is not None:
                book(part, before - self._left(), _by_tensor(values > 0, order, counts))
        return coded

    def _add_rest(
        self,
        values: NDArray[Any],
        tokens: NDArray[np.uint8],
        width: int,
        count: int,
        sizes: Ints,
        shifts: Ints,
    ) -> None:
        """Read the bits that the tokens of one width leave open."""
        ends = np.append(0, np.cumsum(sizes))
        for low in range(0, width, 8):
            rest = self.bits(count, min(8, width - low), None)
            at = 0
            for tile in tiles(len(tokens)):
                found = np.flatnonzero(tokens[tile] >> 2 == width + 2)
                some = rest[at : at + len(found)].astype(values.dtype) << low
                at += len(found)
                if shifts.any():
                    within = np.diff(np.clip(ends, tile.start, tile.stop))
                    some <<= np.repeat(shifts, within)[found].astype(values.dtype)
                values[tile][found] |= some


def _by_tensor(amounts: NDArray[Any], order: Any, counts: Ints | None) -> NDArray[np.float64]:
    """Add amounts up by tensor, of which each has so many; see `Decoder._book`."""
    sizes = sizes_to_book()
    assert sizes is not None
    tensors = np.arange(len(sizes), dtype=np.int32)
    owners = np.repeat(tensors, sizes if counts is None else counts)[order]
    return np.asarray(np.bincount(owners, amounts, len(sizes)), np.float64)


def _costs(symbols: Unsigned, sizes: Ints, bits: list[float]) -> NDArray[np.float64]:
    """Divide the bits of each stretch among its symbols, by ideal code length."""
    costs = np.zeros(len(symbols))
    for total, size, end in zip(bits, sizes, np.cumsum(sizes), strict=True):
        part = symbols[end - size : end]
        lengths = np.log2((size + 1) / np.maximum(np.bincount(part), 1))[part]
        costs[end - size : end] = lengths * (total / lengths.sum())
    return costs
