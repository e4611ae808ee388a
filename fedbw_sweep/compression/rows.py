"""Quantised rows: each is coded by the statistics of rows of its own scale."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.coding.decoder import Coded, Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.tables import MAX_INTEGER
from fedbw_sweep.compression.dither import DITHERED_BITS, Noise, fold, noise_contexts, unfold
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.quantiser import (
    BITS,
    CLASSES,
    SHIFT,
    THRESHOLD,
    dequantise,
    quantise,
    quantise_to_rate,
    rate_differences,
    scale_class,
)
from fedbw_sweep.compression.tiles import TILE, tiles


class Rows:
    """The rows of all float arrays of a layout: where they start, how long, in which array."""

    def __init__(self, layout: Layout) -> None:
        shapes = [(1, *t.shape) for t in layout.filled]
        self.per_array = np.array([prod(s[:-1]) for s in shapes], np.int64)
        self.length = np.repeat([s[-1] for s in shapes], self.per_array)
        self.array = np.repeat(np.arange(len(shapes)), self.per_array)
        self.first = np.cumsum(self.per_array) - self.per_array  # row that each array starts with
        self.start = np.cumsum(self.length) - self.length


def put_levels(
    encoder: Encoder,
    values: FloatVector,
    rows: Rows,
    subtract: bool,
    price: float | None = None,
    seed: int | None = None,
) -> None:
    """Quantise and add an update in steps; if asked, leave in it what is lost.

    With a price, levels are chosen by what each will cost: see `quantise_to_rate`. With a seed, of
    `Noise`, each is rounded with subtractive dither.
    """
    bits = BITS if seed is None else DITHERED_BITS
    energy = np.add.reduceat(np.square(values), rows.start)
    of_row = scale_class(energy / rows.length)
    sizes = np.add.reduceat(rows.length, rows.first)
    of_array = scale_class(np.add.reduceat(energy, rows.first) / sizes)
    # An array's rows have classes of their own where that saves the two bits that one costs.
    cost = np.add.reduceat(rows.length * bits[of_row] + 2, rows.first)
    by_row = cost < sizes * bits[of_array]
    classes = np.where(by_row[rows.array], of_row, of_array[rows.array])
    peak = np.maximum(
        np.maximum.reduceat(values, rows.start), -np.minimum.reduceat(values, rows.start)
    )
    sent = peak >= THRESHOLD[classes] if seed is None else peak > 0
    live = np.logical_or.reduceat(sent, rows.first)
    sent |= (live & ~by_row)[rows.array]

    encoder.bits(by_row, 1)
    encoder.bits(live, 1)
    encoder.integers(of_array[live])
    own = (by_row & live)[rows.array]
    encoder.integers(((of_row + 1) * sent)[own], of_array[rows.array][own])
    kept = np.repeat(sent, rows.length)
    length, classes = rows.length[sent], classes[sent]
    part = values[kept]
    if seed is not None:
        noise = Noise(seed).take(len(part))
        levels = np.rint(part + noise).astype(np.int32)
        contexts = noise_contexts(np.repeat(classes.astype(np.uint8), length), noise)
        encoder.integers(fold(levels, noise), contexts)
        if subtract:
            values[kept] = part - (levels - noise)
        return
    levels = quantise(part, np.repeat(THRESHOLD[classes], length))
    contexts = np.repeat(classes.astype(np.uint8), length)
    if price is not None:
        levels = quantise_to_rate(
            part, contexts, SHIFT[contexts], rate_differences(levels, contexts), price
        )
    encoder.integers(np.abs(levels), contexts)
    encoder.bits(levels[levels != 0] < 0, 1)
    if subtract:
        values[kept] = part - dequantise(levels, np.repeat(SHIFT[classes], length))


def add_levels(
    decoder: Decoder, values: FloatVector, layout: Layout, seed: int | None = None
) -> None:
    """Read what `put_levels` added, and add it to `values`, in steps."""
    shapes = [(prod(t.shape[:-1]), t.shape[-1] if t.shape else 1) for t in layout.filled]
    per_array, lengths = np.array(shapes, np.int64).T
    once = np.ones(len(shapes), np.int64)
    by_row, live = (decoder.bits(len(once), 1, "tables", once).astype(bool) for _ in range(2))
    of_array = np.zeros(len(live), np.uint8)
    of_array[live] = decoder.integers(int(live.sum()), CLASSES - 1, None, "tables", once * live)
    classes = np.repeat(np.where(live, of_array + 1, 0).astype(np.uint8), per_array)
    of_rows = by_row & live
    own = decoder.coded(
        int(per_array[of_rows].sum()), CLASSES, np.repeat(of_array[of_rows], per_array[of_rows]),
        "tables", per_array * of_rows,
    )  # fmt: skip
    ends = np.cumsum(per_array)
    for start, count in zip((ends - per_array)[of_rows], per_array[of_rows], strict=True):
        for tile in tiles(int(count), int(start)):
            classes[tile] = own.take(tile.stop - tile.start)
    rows = np.split(classes, ends[:-1])
    counts = lengths * [np.count_nonzero(each) for each in rows]
    contexts = np.empty(counts.sum(), np.uint8)
    for each, length, end, count in zip(rows, lengths, np.cumsum(counts), counts, strict=True):
        sent = each[each > 0]
        sent -= 1
        contexts[end - count : end].reshape(-1, length)[:] = sent[:, None]
    noise = None
    if seed is not None:
        drawn, noise = Noise(seed), Noise(seed)  # once for the contexts, once for the values
        for tile in tiles(len(contexts)):
            contexts[tile] = noise_contexts(contexts[tile], drawn.take(tile.stop - tile.start))
    coded = decoder.coded(len(contexts), MAX_INTEGER, contexts, "values", counts, noise is None)
    arrays = np.split(values, np.cumsum(layout.sizes)[:-1])
    for each, array, length in zip(rows, arrays, lengths.tolist(), strict=True):
        if each.any():
            _add_rows(coded, array.reshape(-1, length), each, noise)


def _add_rows(
    coded: Coded, array: FloatVector, classes: NDArray[np.uint8], noise: Noise | None
) -> None:
    """Add levels to the rows of an array; class 0 stands for none, and the rest count from 1."""
    width = array.shape[1]
    height = max(1, TILE // width)
    for top in range(0, len(array), height):
        block, of_block = array[top : top + height], classes[top : top + height]
        sent = of_block > 0
        shift = SHIFT[of_block[sent] - 1][:, None]
        for columns in tiles(width):
            part = block[:, columns]
            shape = len(shift), part.shape[1]
            levels = coded.take(prod(shape)).reshape(shape)
            if noise is None:
                found = dequantise(levels, shift)
            else:
                found = unfold(levels, noise.take(levels.size).reshape(shape))
            if len(shift) == len(part):
                part += found
            elif len(shift):
                part[sent] += found
