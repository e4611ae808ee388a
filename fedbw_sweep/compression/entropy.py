"""The entropy layer: integers to nearly as few bits as their statistics allow, and back.

Everything goes through one asymmetric-numeral-systems coder (Duda 2013, arXiv 1311.2540, as
implemented by ``constriction``). Probabilities are integers that sum to 2**24, made by integer
arithmetic alone, so that both ends agree bit for bit on any machine. Tables of probabilities
travel inside the stream, as rounded logarithms of the counts.

A decoder reads whatever it is given: each read is bounded by what the caller expects, garbage
decodes to values within those bounds, and `Decoder.finish` refuses a stream that does not end
exactly where its last value does.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt, log2, prod
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Ints, Layout, book, sizes_to_book
from fedbw_sweep.errors import PayloadError

Symbols = NDArray[np.int32]

TOTAL = 1 << 24
"""What the integer probabilities of one table sum to: the coder's own precision."""
MAX_SYMBOL = (1 << 16) - 1
MAX_INTEGER = (1 << 31) - 1

_OCTAVES = 23  # a table holds counts down to 2**-23 of the largest; rarer ones keep 2**-24
_MAX_RESOLUTION = 5  # levels of a table: at most 2**5 to the octave
_SLOPES = 8

# Bits of one difference between a table's levels at each slope: so many per step, and at least.
_STEP_BITS = 2.0 ** np.arange(_SLOPES) / 32
_STEP_START = np.log2((1 + 2**-_STEP_BITS) / (1 - 2**-_STEP_BITS))

# 2**(20 + i/32) rounded down, exactly: five integer square roots are one integer 32nd root.
_ROOTS = [1 << (640 + i) for i in range(32)]
for _ in range(5):
    _ROOTS = [isqrt(root) for root in _ROOTS]
_FRACTIONS = np.array(_ROOTS, np.int64)


def _exp2(e: Ints) -> Ints:
    """2**(20 + e/32) rounded down, for integers 0 <= e <= 23 * 32."""
    powers: Ints = _FRACTIONS[e & 31] << (e >> 5)
    return powers


def integer_probabilities(weights: Ints) -> Ints:
    """Scale weights to integers of at least 1 that sum to `TOTAL`, by integer arithmetic alone."""
    weights = weights >> max(0, int(weights.sum()).bit_length() - 38)  # the product fits 63 bits
    rest = TOTAL - len(weights)
    shares = weights * rest // max(1, int(weights.sum()))
    shares[np.argmax(weights)] += rest - shares.sum()
    return shares + 1


def _categorical(weights: Ints) -> Any:
    """Return the coder's model of `weights`, one per symbol (at least two).

    The coder gives every symbol 1 and shares the rest by ``floor(cumulative * rest / sum)``. With
    floats that are integers and sum to the rest, nothing is ever rounded.
    """
    shares = integer_probabilities(weights) - 1
    return constriction.stream.model.Categorical(shares.astype(np.float64), perfect=False)


@lru_cache(maxsize=16)
def _uniform(width: int) -> Any:
    return constriction.stream.model.Uniform(1 << width)


@lru_cache(maxsize=2)
def _geometric(halving: int) -> Any:
    """Return a model of integers in [0, 31], whose probability halves every so many."""
    return _categorical(_exp2(np.maximum(0, _OCTAVES * 32 - np.arange(32) * 32 // halving)))


@lru_cache(maxsize=64)
def _laplace(span: int, slope: int) -> Any:
    """Return a model of differences in [-span, span], halving every 32 / 2**slope steps."""
    distance = np.abs(np.arange(-span, span + 1)) << slope
    return _categorical(_exp2(np.maximum(0, _OCTAVES * 32 - distance)))


def _table_model(levels: Ints, resolution: int) -> Any:
    """Return the model of a table of rounded logarithms; level 0 is a symbol that never occurs."""
    weights = _exp2(np.minimum(levels << (5 - resolution), _OCTAVES * 32))
    return _categorical(np.where(levels > 0, weights, 0))


def _by_context(contexts: NDArray[Any] | None, size: int) -> tuple[Any, Ints]:
    """Return an order of values by context, and how many have each of those that occur."""
    if contexts is None:
        return slice(None), np.full(min(size, 1), size)
    sizes = np.bincount(contexts, minlength=1)
    return np.argsort(contexts.astype(np.uint8), kind="stable"), sizes[sizes > 0]


def _octave(values: NDArray[Any]) -> Ints:
    """Floor of log2, exact for positive integers below 2**53."""
    exponents: Ints = np.frexp(values)[1].astype(np.int64)
    return exponents - 1


def _tokens(values: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Return tokens (exact below 16, then four to the octave), and where and how wide the rest is.

    The token of a large integer says its octave and the two bits below the leading one.
    """
    large = np.flatnonzero(values >= 16)
    widths = _octave(values[large]) - 2
    tokens = values.copy()
    tokens[large] = 4 * widths + (values[large] >> widths) + 4
    return tokens, large, widths


def _resolution(sizes: Ints, last: Ints) -> Ints:
    """Return log2 of the levels to the octave in tables for so many symbols, up to the last.

    Finer levels fit better and cost more: the two balance near n / (25 * symbols) = 4**r.
    """
    octave = _octave(sizes // (25 * (last + 1)))
    return np.minimum(_MAX_RESOLUTION, (octave + 2) // 2)


class Encoder:
    """Collects integers and packs them into one byte string.

    Each method has its mirror in `Decoder`, to be called in the same order with the same bounds.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Symbols | int, Any]] = []

    def finish(self) -> bytes:
        """Return the packed stream; the encoder is spent."""
        coder = constriction.stream.stack.AnsCoder()
        while self._parts:  # the coder is a stack: what goes in last comes out first
            coder.encode_reverse(*self._parts.pop())
        return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))

    def _put(self, values: NDArray[Any], model: Any) -> None:
        self._parts.append((np.ascontiguousarray(values, np.int32), model))

    def uint(self, value: int, limit: int) -> None:
        """Add one integer in ``[0, limit]`` as it is, in the bits that `limit` has."""
        for shift in range(0, limit.bit_length(), 16):
            width = min(16, limit.bit_length() - shift)
            self._parts.append((value >> shift & 0xFFFF, _uniform(width)))

    def bits(self, values: NDArray[Any], width: int) -> None:
        """Add the low `width` bits of integers as they are: ``width * n`` bits in all."""
        for place in range(width):
            plane = (values >> place & 1).astype(np.uint8)
            packed = np.packbits(plane, bitorder="little").tobytes()
            full, rest = divmod(len(values), 16)
            words = np.frombuffer(packed + b"\0", "<u2", count=full + (rest > 0))
            self._put(words[:full], _uniform(16))
            if rest:
                self._put(words[full:], _uniform(rest))

    def floats(self, values: NDArray[np.floating[Any]]) -> None:
        """Add float32 or float16 numbers as they are."""
        little_endian = values.astype(values.dtype.newbyteorder("<"))
        self._put(little_endian.view("<u2"), _uniform(16))

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
        resolution = _resolution(sizes, last)
        span = _OCTAVES << resolution
        octaves = np.log2(np.maximum(counts, 1) / counts.max(axis=1, keepdims=True)) + _OCTAVES
        levels = np.rint(octaves * (1 << resolution)[:, None]).astype(np.int64)
        levels = np.where(counts, np.maximum(levels, 1), 0)
        steps = np.diff(levels, prepend=span[:, None])
        steps[np.arange(width) > last[:, None]] = 0
        size = np.abs(steps).sum(axis=1)[:, None] * _STEP_BITS + (last[:, None] + 1) * _STEP_START
        slope = np.argmin(size, axis=1)

        self._put(_octave(last) + 1, _geometric(2))
        self._put(slope[last > 0], _uniform(3))
        for i in np.flatnonzero(last):
            top = 1 << int(last[i]).bit_length() - 1
            self.uint(int(last[i]) - top, top - 1)
            self._put(steps[i, : last[i] + 1] + span[i], _laplace(int(span[i]), int(slope[i])))
            self._put(parts[i], _table_model(levels[i, : last[i] + 1], int(resolution[i])))

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
        order, sizes = _by_context(contexts, values.size)
        high = values[order]
        means = np.add.reduceat(high, _starts(sizes)) // sizes
        shifts = np.maximum(0, _octave(means) - 3)
        self._put(shifts, _geometric(1))
        for shift, end, size in zip(shifts.tolist(), np.cumsum(sizes), sizes, strict=True):
            if shift:
                self.bits(high[end - size : end], shift)
        if shifts.any():
            high = high >> np.repeat(shifts, sizes)
        tokens, large, widths = _tokens(high)
        self._symbols(tokens, sizes)
        for width in np.flatnonzero(np.bincount(widths)):
            self.bits(high[large[widths == width]], int(width))


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
        self._coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))

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
            value |= int(self._coder.decode(_uniform(width))) << shift
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
            words = self._get(full, _uniform(16)).astype("<u2")
            if rest:
                words = np.append(words, self._get(1, _uniform(rest)).astype("<u2"))
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
        words = self._get(count * kind.itemsize // 2, _uniform(16)).astype("<u2")
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
        lengths = self._get(len(sizes), _geometric(2))
        slopes = iter(self._get(int(np.count_nonzero(lengths)), _uniform(3)))
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
        resolution = int(_resolution(np.array(size), np.array(last)))
        span = _OCTAVES << resolution
        steps = self._get(last + 1, _laplace(span, slope)) - span
        levels = span + np.cumsum(steps, dtype=np.int64)
        if levels.min() < 0 or levels.max() > span:
            raise PayloadError("a table of probabilities leaves its range")
        return _table_model(levels, resolution)

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
        order, sizes = _by_context(contexts, size)
        shifts = self._get(len(sizes), _geometric(1)).astype(np.int64)
        plain = self._left()
        low = [
            self._bits(n, shift) for n, shift in zip(sizes, shifts.tolist(), strict=True) if shift
        ]
        plain -= self._left()
        tokens, bits = self._symbols(sizes, _tokens(limit >> shifts)[0])
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


def _starts(sizes: Ints) -> Ints:
    """Where each of consecutive runs of `sizes` begins."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def _line_bits(counts: Ints, lengths: Ints) -> NDArray[np.float64]:
    """Bits of `counts` positions in lines of `lengths` and of the counts themselves, roughly."""
    rest = lengths - counts
    kept = counts * np.log2(lengths / np.maximum(counts, 1))
    bits: NDArray[np.float64] = kept + rest * np.log2(lengths / np.maximum(rest, 1))
    return bits + np.log2(1 + counts)


_CLASSES = 64


def _density(kept: Ints, lines: Ints) -> Ints:
    """Context of a line's count: 0 if its matrix has none, else by octave of the matrix's mean."""
    return np.where(kept > 0, 1 + _octave(1 + 16 * kept // lines), 0)


def _spacing(counts: Ints, lengths: Ints) -> Ints:
    """Context of a gap: by octave of its line's mean gap; lone positions have their own."""
    return _octave(lengths // np.maximum(counts, 1)) + np.where(counts == 1, _CLASSES // 2, 0)


def _matrices(layout: Layout) -> Ints:
    """Rows and columns of each float array that is not empty, leading axes merged into rows."""
    shapes = [(1, *t.shape) for t in layout.filled]
    return np.array([(prod(s[:-1]), s[-1]) for s in shapes], np.int64).reshape(-1, 2)


def encode_indices(encoder: Encoder, indices: Ints, layout: Layout) -> Ints:
    """Add the sorted positions of the coordinates of an update that are kept.

    Kept coordinates cluster by matrix and, within one, by row or by column. Each matrix is cut
    into lines along whichever clusters more; a count per line and the gaps within lines are coded,
    each by the frequencies of its kind.

    Parameters
    ----------
    encoder : Encoder
        Where they are added.
    indices : ndarray of int64, shape (k,)
        Distinct positions in the layout's vector, ascending.
    layout : Layout
        The arrays the vector is made of; it has at least one coordinate.

    Returns
    -------
    ndarray of int64, shape (k,)
        The order in which `decode_indices` will return `indices`.
    """
    rows, cols = _matrices(layout).T
    starts = _starts(rows * cols)
    matrix = np.searchsorted(starts, indices, side="right") - 1
    row, col = np.divmod(indices - starts[matrix], cols[matrix])

    def bits(lines: Ints, lengths: Ints, line: Ints) -> NDArray[np.float64]:
        counts = np.bincount(_starts(lines)[matrix] + line, minlength=lines.sum())
        return np.add.reduceat(_line_bits(counts, np.repeat(lengths, lines)), _starts(lines))

    across = bits(cols, rows, col) < bits(rows, cols, row)
    lines, lengths = np.where(across, (cols, rows), (rows, cols))
    line, position = np.where(across[matrix], (col, row), (row, col))
    line += _starts(lines)[matrix]
    order = np.argsort(line * lengths.max() + position)
    line, position = line[order], position[order]
    counts = np.bincount(line, minlength=lines.sum())

    density = _density(np.add.reduceat(counts, _starts(lines)), lines)
    encoder.bits(across.astype(np.int64), 1)
    encoder.symbols(density)
    contexts = np.repeat(density, lines)
    encoder.integers(counts[contexts > 0], contexts[contexts > 0])
    gaps = np.diff(position, prepend=-1) - 1
    first = _starts(counts)[counts > 0]
    gaps[first] = position[first]
    encoder.integers(gaps, np.repeat(_spacing(counts, np.repeat(lengths, lines)), counts))
    return order


def decode_indices(decoder: Decoder, layout: Layout) -> Ints:
    """Read distinct positions in the order that `encode_indices` returned; see there."""
    rows, cols = _matrices(layout).T
    once = np.ones(len(rows), np.int64)
    across = decoder.bits(len(rows), 1, "indices", once).astype(bool)
    lines, lengths = np.where(across, (cols, rows), (rows, cols))
    density = decoder.symbols(len(rows), _CLASSES - 1, "indices", once)
    contexts = np.repeat(density, lines)
    length = np.repeat(lengths, lines)
    counts = np.zeros(len(length), np.int64)
    used = contexts > 0
    counts[used] = decoder.integers(
        int(used.sum()), int(length.max()), contexts[used], "indices", lines * (density > 0)
    )
    if np.any(counts > length):
        raise PayloadError("more positions than coordinates")
    contexts = np.repeat(_spacing(counts, length), counts)
    kept = np.add.reduceat(counts, _starts(lines))
    gaps = decoder.integers(len(contexts), int(length.max()), contexts, "indices", kept)
    ends = np.cumsum(1 + gaps)
    first = _starts(counts)
    before = np.append(0, ends)[first]
    line = np.repeat(np.arange(len(length)), counts)
    position = ends - 1 - before[line]
    if np.any(position >= length[line]):
        raise PayloadError("a position lies outside its matrix")
    matrix = np.repeat(np.arange(len(rows)), lines)[line]
    line -= _starts(lines)[matrix]
    row, col = np.where(across[matrix], (position, line), (line, position))
    indices: Ints = _starts(rows * cols)[matrix] + row * cols[matrix] + col
    return indices
