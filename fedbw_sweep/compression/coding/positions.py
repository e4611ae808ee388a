"""The positions of the coordinates of an update that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.decoder import Coded, Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.tables import floor_log2, run_starts
from fedbw_sweep.compression.layout import Ints, Layout
from fedbw_sweep.compression.tiles import tiles
from fedbw_sweep.errors import PayloadError


def _line_bits(counts: Ints, lengths: Ints) -> NDArray[np.float64]:
    """Bits of `counts` positions in lines of `lengths` and of the counts themselves, roughly."""
    rest = lengths - counts
    kept = counts * np.log2(lengths / np.maximum(counts, 1))
    bits: NDArray[np.float64] = kept + rest * np.log2(lengths / np.maximum(rest, 1))
    return bits + np.log2(1 + counts)


_CLASSES = 64


def _density(kept: Ints, lines: Ints) -> Ints:
    """Context of a line's count: 0 if its matrix has none, else by octave of the matrix's mean."""
    return np.where(kept > 0, 1 + floor_log2(1 + 16 * kept // lines), 0)


def _spacing(counts: NDArray[np.integer[Any]], lengths: Ints) -> Ints:
    """Context of a gap: by octave of its line's mean gap; lone positions have their own."""
    return floor_log2(lengths // np.maximum(counts, 1)) + np.where(counts == 1, _CLASSES // 2, 0)


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
    starts = run_starts(rows * cols)
    matrix = np.searchsorted(starts, indices, side="right") - 1
    row, col = np.divmod(indices - starts[matrix], cols[matrix])

    def bits(lines: Ints, lengths: Ints, line: Ints) -> NDArray[np.float64]:
        counts = np.bincount(run_starts(lines)[matrix] + line, minlength=lines.sum())
        return np.add.reduceat(_line_bits(counts, np.repeat(lengths, lines)), run_starts(lines))

    across = bits(cols, rows, col) < bits(rows, cols, row)
    lines, lengths = np.where(across, (cols, rows), (rows, cols))
    line, position = np.where(across[matrix], (col, row), (row, col))
    line += run_starts(lines)[matrix]
    order = np.argsort(line * lengths.max() + position)
    line, position = line[order], position[order]
    counts = np.bincount(line, minlength=lines.sum())

    density = _density(np.add.reduceat(counts, run_starts(lines)), lines)
    encoder.bits(across.astype(np.int64), 1)
    encoder.symbols(density)
    contexts = np.repeat(density, lines)
    encoder.integers(counts[contexts > 0], contexts[contexts > 0])
    gaps = np.diff(position, prepend=-1) - 1
    first = run_starts(counts)[counts > 0]
    gaps[first] = position[first]
    encoder.integers(gaps, np.repeat(_spacing(counts, np.repeat(lengths, lines)), counts))
    return order


def decode_indices(decoder: Decoder, layout: Layout, most: int) -> tuple[Ints, Ints]:
    """Read distinct positions in the order that `encode_indices` returned; see there.

    Parameters
    ----------
    decoder : Decoder
        Where they are read.
    layout : Layout
        The arrays the vector is made of; it has at least one coordinate.
    most : int
        How many positions there may be.

    Returns
    -------
    indices : ndarray of int32 or int64, shape (k,)
        The positions: int32 where the layout's size allows.
    kept : ndarray of int64, shape (len(layout.filled),)
        How many of them each array has.

    Raises
    ------
    PayloadError
        If there are more, or one lies outside its array.
    """
    rows, cols = _matrices(layout).T
    once = np.ones(len(rows), np.int64)
    across = decoder.bits(len(rows), 1, "indices", once).astype(bool)
    lines, lengths = np.where(across, (cols, rows), (rows, cols))
    density = decoder.symbols(len(rows), _CLASSES - 1, "indices", once)
    longest = int(lengths.max())
    contexts = np.repeat(density, lines)
    coded = decoder.coded(
        int(lines[density > 0].sum()), longest, contexts[contexts > 0], "indices",
        lines * (density > 0),
    )  # fmt: skip
    counts = np.zeros(len(contexts), np.int32)
    for tile in tiles(len(counts)):
        used = contexts[tile] > 0
        counts[tile][used] = coded.take(int(np.count_nonzero(used)))
    matrices = np.append(0, np.cumsum(lines))
    kept: Ints = np.array([counts[a:b].sum(dtype=np.int64) for a, b in pairwise(matrices)])
    if kept.sum() > most:
        raise PayloadError(f"{kept.sum()} coordinates, more than the density allows")

    contexts = np.empty(kept.sum(), np.uint8)
    at = 0
    for tile, matrix in _line_tiles(matrices):
        if np.any(counts[tile] > lengths[matrix]):
            raise PayloadError("more positions than coordinates")
        spacing = _spacing(counts[tile], lengths[matrix]).astype(np.uint8)
        of_tile = np.repeat(spacing, counts[tile])
        contexts[at : at + len(of_tile)] = of_tile
        at += len(of_tile)
    coded = decoder.coded(len(contexts), longest, contexts, "indices", kept)
    indices: NDArray[Any] = np.empty(len(contexts), np.int32 if layout.size < 1 << 31 else np.int64)
    first = run_starts(rows * cols)
    at = 0
    for tile, matrix in _line_tiles(matrices):
        for line, position in _in_lines(coded, np.cumsum(counts[tile], dtype=np.int64)):
            own = matrix[line]
            if np.any(position >= lengths[own]):
                raise PayloadError("a position lies outside its matrix")
            line += tile.start - matrices[own]
            row, col = np.where(across[own], (position, line), (line, position))
            indices[at : at + len(own)] = first[own] + row * cols[own] + col
            at += len(own)
    return indices, kept


def _line_tiles(first: Ints) -> Iterator[tuple[slice, Ints]]:
    """Yield tiles of all lines, each with the matrix of every line; matrices start at `first`."""
    for tile in tiles(int(first[-1])):
        within = np.diff(np.clip(first, tile.start, tile.stop)).astype(np.int64)
        yield tile, np.repeat(np.arange(len(within)), within)


def _in_lines(gaps: Coded, ends: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield line and position in it of each gap; lines have theirs up to `ends`."""
    begun = 0  # where the positions of a line go on that an earlier tile has begun
    for tile in tiles(int(ends[-1])):
        first, last = np.searchsorted(ends, [tile.start + 1, tile.stop]).tolist()
        lines = slice(first, last + 1)
        clipped = np.clip(ends[lines], tile.start, tile.stop)
        within = np.diff(clipped, prepend=tile.start).astype(np.int64)
        sums = np.cumsum(gaps.take(tile.stop - tile.start) + 1, dtype=np.int64)
        before = np.append(0, sums)[run_starts(within)]
        before[0] -= begun
        position = sums - 1 - np.repeat(before, within)
        begun = int(position[-1]) + 1 if ends[lines][-1] > tile.stop else 0
        yield np.repeat(np.arange(lines.start, lines.stop), within), position
