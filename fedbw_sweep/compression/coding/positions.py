"""The positions of the coordinates of an update that are kept."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.tables import floor_log2, run_starts
from fedbw_sweep.compression.layout import Ints, Layout
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


def _spacing(counts: Ints, lengths: Ints) -> Ints:
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
    kept = np.add.reduceat(counts, run_starts(lines))
    gaps = decoder.integers(len(contexts), int(length.max()), contexts, "indices", kept)
    ends = np.cumsum(1 + gaps)
    first = run_starts(counts)
    before = np.append(0, ends)[first]
    line = np.repeat(np.arange(len(length)), counts)
    position = ends - 1 - before[line]
    if np.any(position >= length[line]):
        raise PayloadError("a position lies outside its matrix")
    matrix = np.repeat(np.arange(len(rows)), lines)[line]
    line -= run_starts(lines)[matrix]
    row, col = np.where(across[matrix], (position, line), (line, position))
    indices: Ints = run_starts(rows * cols)[matrix] + row * cols[matrix] + col
    return indices
