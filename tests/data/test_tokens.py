"""Tokens cut into windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.data.federate import federate
from fedbw_sweep.data.tokens import windows
from tests.data.texts import LENGTH, text_config


def test_tokens_per_byte_counts_utf8_bytes(rows: Path) -> None:
    def characters(text: str) -> list[int]:
        return [ord(character) for character in text]

    text = federate(text_config(rows), 2, LENGTH, 1, characters)
    # "record 000 says häß ☃" and a newline: 22 characters, 26 bytes; no newline after the last.
    assert text.heldout_tokens_per_byte == (30 * 22 - 1) / (30 * 26 - 1)
    assert max(tokens.max() for tokens in text.clients) == ord("☃")


@given(n=st.integers(0, 200), length=st.integers(1, 70))
def test_windows_predict_every_token_but_the_first_once(n: int, length: int) -> None:
    tokens = np.arange(n, dtype=np.int32)
    cut = windows(tokens, length)
    count = max(0, (n - 1) // length)
    assert cut.shape == (count, length + 1)
    assert cut.dtype == np.int32
    np.testing.assert_array_equal(cut[:, 1:].ravel(), np.arange(1, 1 + count * length))
    np.testing.assert_array_equal(cut[:, :-1].ravel(), np.arange(count * length))
