"""What the entries of a low-rank part are expected to be, which chooses what they are coded by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.tables import Symbols, run_starts
from fedbw_sweep.compression.exact import Multiplier
from fedbw_sweep.compression.factors import Factors, divide, levels_of
from fedbw_sweep.compression.layout import Ints
from fedbw_sweep.compression.quantiser import CLASSES, rate_differences
from fedbw_sweep.compression.tiles import TILE, tiles

_CHUNKS = 1, 2, 4, 8, 16, 32  # components after which rows' energies are looked at anew
_DESCENTS = 8  # to a target; the more, the fewer bits

_PRIOR = 4  # components that what is expected of a row's place counts as

_SHARES = np.repeat([94, 63, 42, 31, 20, 8, 3], [1, 1, 2, 4, 8, 16, 32])
"""Of the energy, in 1024ths, in each of the leading directions of a context: found by trying."""


def expected_energy(rows: int, leading: int) -> Ints:
    """Return the mean square that is expected of each row, 2**16 for the mean over all.

    Parameters
    ----------
    rows : int
    leading : int
        How many of the first ones are directions of a context; 0 if all are alike.

    Returns
    -------
    ndarray of int64, shape (rows,)
    """
    shares = _SHARES[:leading]
    energy = np.full(rows, (1024 - shares.sum()) * (rows << 6) // max(1, rows - leading))
    energy[:leading] = shares * (rows << 6)
    return energy.astype(np.int64)


class Contexts:
    """What both ends know of the factors' entries, a chunk of components at a time.

    An entry is expected to be of its component's scale, times that of its row in the components
    before, or, before there are many, of a row at its place. All by integers: it chooses tables of
    probabilities.
    """

    def __init__(self, parts: list[Factors]) -> None:
        sides = [n for part in parts for n in part.shape]
        self.rank = np.array([len(part.gain) for part in parts for _ in (0, 1)], np.int64)
        self.most = int(self.rank.max(initial=0))
        self.classes = np.zeros((len(sides), self.most), np.uint8)
        for i, part in enumerate(parts):
            self.classes[2 * i : 2 * i + 2, : len(part.gain)] = part.classes
        self.first = np.cumsum([0, *sides])  # row that each side starts with
        # Of rows, 2**16 for each one as expected, at first as if some had been seen.
        priors = [expected_energy(n, part.leading) for part in parts for n in part.shape]
        self.energy = _PRIOR * np.concatenate([np.zeros(0, np.int64), *priors])

    def chunks(self) -> Iterator[slice]:
        """Yield the components of each chunk."""
        bounds = [0, *(c for c in _CHUNKS if c < self.most), self.most]
        yield from (slice(a, b) for a, b in pairwise(bounds) if a < b)

    def of(self, chunk: slice) -> NDArray[np.uint8]:
        """Return the contexts of a chunk, matrix by matrix and row by row."""
        self._chunk = chunk
        contexts = np.empty(self._wide() @ np.diff(self.first), np.uint8)
        self._class = np.empty_like(contexts)
        for rows, side, width, entries in self._tiles():
            own = np.repeat(side * self.most + chunk.start - run_starts(width), width)
            own += np.arange(len(own))
            of_entries = self.classes.ravel()[own]
            ratio = self.energy[rows] // ((chunk.start + _PRIOR) << 8)
            excess = np.frexp(ratio * 181 >> 7)[1] - 9  # log2 of ratio / 256, rounded
            expected = of_entries + np.repeat(excess, width)
            contexts[entries] = np.minimum(np.maximum(expected, 0), CLASSES - 1)
            self._class[entries] = of_entries
        return contexts

    def learn(self, levels: Ints | Symbols) -> None:
        """Take note of the last chunk's entries, in the same order."""
        for rows, _, width, entries in self._tiles():
            square = np.minimum(np.abs(levels[entries]), 1 << 15).astype(np.int64) ** 2 << 24
            square >>= self._class[entries]
            some = width > 0
            self.energy[rows][some] += np.add.reduceat(square, run_starts(width)[some])

    def _wide(self) -> Ints:
        """Return how many components of the last chunk each side has."""
        wide: Ints = np.clip(self.rank - self._chunk.start, 0, self._chunk.stop - self._chunk.start)
        return wide

    def _tiles(self) -> Iterator[tuple[slice, Ints, Ints, slice]]:
        """Yield tiles of rows, each row's side and width, and where the tile's entries are."""
        wide, at = self._wide(), 0
        for rows in tiles(len(self.energy), size=max(1, TILE // int(wide.max(initial=1)))):
            within = np.diff(np.clip(self.first, rows.start, rows.stop))
            side = np.repeat(np.arange(len(within)), within)
            width = wide[side]
            entries = slice(at, at := at + int(width.sum()))
            if entries.start < at:
                yield rows, side, width, entries


def refine(parts: list[Factors], matrices: list[Multiplier], scale: float, price: float) -> None:
    """Descend, matrix by matrix and factor by factor, to where error and bits cost least."""
    for _ in range(_DESCENTS):
        known = Contexts(parts)
        of_parts = [np.empty(part.levels.shape, np.intp) for part in parts]
        for chunk in known.chunks():
            divide(known.of(chunk), [contexts[:, chunk] for contexts in of_parts])
            known.learn(levels_of(parts, chunk))
        extra_bits = rate_differences(
            levels_of(parts), np.concatenate([each.ravel() for each in of_parts])
        )
        for part, matrix, contexts in zip(parts, matrices, of_parts, strict=True):
            for side, own in enumerate(np.split(contexts, part.shape[:1])):
                part.descend(side, matrix, scale, own, extra_bits, price)
