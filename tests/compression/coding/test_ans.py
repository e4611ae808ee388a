"""The coder: exactly our integer probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.coding.ans import TOTAL, categorical, integer_probabilities, uniform
from fedbw_sweep.compression.coding.encoder import Encoder


def reference_decode(data: bytes, probabilities: list[int], count: int) -> list[int]:
    """Decode by the textbook: streaming ANS, 64-bit state, 32-bit words, integers only."""
    words = list(np.frombuffer(data + b"\0" * (-len(data) % 4), "<u4"))
    state = 0
    while words and state < 1 << 32:
        state = state << 32 | int(words.pop())
    bounds = np.append(0, np.cumsum(probabilities))
    symbols = []
    for _ in range(count):
        quantile = state % TOTAL
        symbol = int(np.searchsorted(bounds, quantile, side="right")) - 1
        state = (state // TOTAL) * probabilities[symbol] + quantile - int(bounds[symbol])
        if state < 1 << 32 and words:
            state = state << 32 | int(words.pop())
        symbols.append(symbol)
    assert not words
    assert state == 0
    return symbols


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 1 << 43), min_size=2, max_size=300),
    st.lists(st.integers(0, 299), max_size=60),
)
def test_the_coder_uses_exactly_our_integer_probabilities(
    weights: list[int], symbols: list[int]
) -> None:
    # Had the coder rounded any float on the way, integer arithmetic could not follow it.
    table = np.array(weights, np.int64)
    values = np.array([s % len(weights) for s in symbols], np.int64)
    encoder = Encoder()
    encoder._put(values, categorical(table))
    probabilities = integer_probabilities(table)
    assert probabilities.sum() == TOTAL
    assert probabilities.min() >= 1
    decoded = reference_decode(encoder.finish(), probabilities.tolist(), len(values))
    assert decoded == values.tolist()


@pytest.mark.parametrize("width", [1, 3, 15, 16])
def test_raw_bits_have_equal_integer_probabilities(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << width, 50)
    encoder = Encoder()
    encoder._put(values, uniform(width))
    equal = [TOTAL >> width] * (1 << width)
    assert reference_decode(encoder.finish(), equal, 50) == values.tolist()
