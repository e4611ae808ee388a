"""Lossless: the float32 bits themselves, at the cost of their entropy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor, Known
from fedbw_sweep.compression.coding.decoder import Coded, Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.tiles import histogram, tiles

_COMMON = 1 << 12
"""An exponent rarer than this shares its tables of bytes with all other rare ones."""


@dataclass(frozen=True)
class Lossless(Compressor):
    """Exponents and the bytes of mantissas, entropy coded apart; decodes to the very same bits.

    As ZipNN does with weights (Hershcovitch et al. 2024, arXiv 2411.05239), with tables in place of
    its Huffman codes.

    Exponents are coded with a table per tensor, then the sign and the mantissa, as three bytes,
    with tables by exponent: an update is a difference of two float32 weights, so the smaller it is
    the more of its last bits are zero.
    """

    codes_weights: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        bits = update.view(np.uint32)
        exponents = (bits >> 23).astype(np.uint8)
        encoder = Encoder()
        for part in _tensors(layout, exponents):
            encoder.symbols(part)
        # The sign takes the place of the exponent's lowest bit, above the mantissa.
        rest = bits & 0x7FFFFF | bits >> 8 & 0x800000
        order, groups = _by_exponent(exponents)
        octets = rest[order].astype("<u4").view(np.uint8).reshape(-1, 4)
        for group in groups:
            for place in range(3):
                encoder.symbols(octets[group, place])
        return encoder.finish()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        decoder = Decoder(body)
        exponents = np.empty(layout.size, np.uint8)
        alone = np.zeros(len(layout.filled), np.int64)
        own = [part for part in _tensors(layout, exponents) if part.size]
        for number, part in enumerate(own):
            alone[number] = part.size
            part[:] = decoder.symbols(part.size, 255, counts=alone)
            alone[number] = 0
        keys = _keys(exponents)
        counts = np.array([histogram(part) for part in _tensors(layout, keys) if part.size])
        sizes = counts.reshape(-1, 256).sum(axis=0)
        starts = np.cumsum(sizes) - sizes
        rest = np.zeros((layout.size, 4), np.uint8)
        for key in np.flatnonzero(sizes):
            group = slice(starts[key], starts[key] + sizes[key])
            for place in range(3):
                octets = decoder.symbols(int(sizes[key]), 255, counts=counts[:, key])
                rest[group, place] = octets
        decoder.finish()
        coded = Coded(rest.view("<u4").reshape(-1), keys, starts)
        bits = np.empty(layout.size, np.uint32)
        for tile in tiles(layout.size):
            part = coded.take(tile.stop - tile.start).view(np.uint32)
            sign = part & 0x800000
            part ^= sign ^ sign << 8 ^ exponents[tile].astype(np.uint32) << 23
            bits[tile] = part
        return bits.view(np.float32)


def _tensors(layout: Layout, values: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the part of each tensor, as views."""
    return np.split(values, np.cumsum([tensor.size for tensor in layout.floats])[:-1])


def _keys(exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the group of each exponent: itself if it is common, else that of all rare ones."""
    # 255 is the exponent of no finite number.
    keys = np.where(histogram(exponents) >= _COMMON, np.arange(256), 255).astype(np.uint8)
    of_each: NDArray[np.uint8] = keys[exponents]
    return of_each


def _by_exponent(exponents: NDArray[np.uint8]) -> tuple[NDArray[np.intp], list[slice]]:
    """Return an order that sorts by exponent, the rare ones last, and where each group is."""
    keys = _keys(exponents)
    ends = np.cumsum(histogram(keys)).tolist()
    return np.argsort(keys, kind="stable"), [slice(a, b) for a, b in pairwise([0, *ends])]
