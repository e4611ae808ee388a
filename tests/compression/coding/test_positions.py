"""Positions of kept coordinates: all come back, and cost little more than theory says."""

from __future__ import annotations

from math import comb, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.positions import decode_indices, encode_indices
from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.testing import layout_of


def index_bytes(indices: np.ndarray, layout: Layout) -> int:
    encoder = Encoder()
    order = encode_indices(encoder, indices, layout)
    data = encoder.finish()
    decoder = Decoder(memoryview(data))
    decoded, _ = decode_indices(decoder, layout, layout.size)
    assert np.array_equal(decoded, indices[order])
    decoder.finish()
    return len(data)


def test_scattered_indices_cost_little_more_than_the_combinatorial_bound() -> None:
    layout = layout_of((500, 200), (100_000,))
    indices = np.sort(np.random.default_rng(4).choice(200_000, 2000, replace=False))
    bound = log2(comb(200_000, 2000)) / 8
    assert bound < index_bytes(indices, layout) < 1.06 * bound


@pytest.mark.parametrize("by_column", [False, True])
def test_indices_in_a_few_rows_or_columns_cost_much_less(by_column: bool) -> None:
    # 2000 of 200,000 in 20 of 500 rows (or columns): at most log2 C(500,20) + log2 C(8000,2000).
    rng = np.random.default_rng(5)
    lines, places = rng.choice(500, 20, replace=False), rng.choice(8000, 2000, replace=False)
    mask = np.zeros((500, 400), bool)
    mask[lines[places // 400], places % 400] = True
    indices = np.flatnonzero(mask.T if by_column else mask)
    bound = (log2(comb(500, 20)) + log2(comb(8000, 2000))) / 8
    shape = (400, 500) if by_column else (500, 400)
    assert index_bytes(indices, layout_of(shape)) < 1.1 * bound + 30
    assert bound < 0.6 * log2(comb(200_000, 2000)) / 8


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=5),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_any_indices_of_any_layout_come_back(
    shapes: list[list[int]], density: float, seed: int
) -> None:
    layout = layout_of((1,), *map(tuple, shapes))
    index_bytes(np.flatnonzero(np.random.default_rng(seed).random(layout.size) < density), layout)
