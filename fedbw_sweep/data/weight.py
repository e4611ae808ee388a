"""What the training text itself weighs: what sending it would cost in place of training apart."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

MOST_BYTES = 64_000_000
"""Bytes of text above which it is not compressed: that takes a second for each million."""

ZSTD_LEVEL = 19


@dataclass(frozen=True)
class TextWeight:
    """Bytes of all clients' training text.

    Attributes
    ----------
    text_bytes : int
        In UTF-8.
    text_bytes_xz, text_bytes_zstd : int or None
        Each client's compressed by itself, as ``xz`` and ``zstd -19`` do; None if it is too much.
    """

    text_bytes: int
    text_bytes_xz: int | None
    text_bytes_zstd: int | None


def weigh(texts: Iterable[str]) -> TextWeight:
    """Weigh clients' texts, each of which one client would send.

    Parameters
    ----------
    texts : iterable of str
        One for each client.
    """
    each, whole = list[bytes](), 0
    for text in texts:
        each.append(text.encode())
        whole += len(each[-1])
        if whole > MOST_BYTES:  # then it is only counted
            each.clear()
    if whole > MOST_BYTES:
        return TextWeight(whole, None, None)
    zstd = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    return TextWeight(
        whole,
        sum(len(lzma.compress(text)) for text in each),
        sum(zstd.compress(text).size for text in each),
    )
