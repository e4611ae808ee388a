"""The coder and its models of probability: all that is known of ``constriction``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import constriction
import numpy as np

from fedbw_sweep.compression.layout import Ints

AnsCoder = constriction.stream.stack.AnsCoder
"""A stack of 32-bit words: what is encoded last is decoded first."""

TOTAL = 1 << 24
"""What the integer probabilities of one table sum to: the coder's own precision."""


def integer_probabilities(weights: Ints) -> Ints:
    """Scale weights to integers of at least 1 that sum to `TOTAL`, by integer arithmetic alone."""
    weights = weights >> max(0, int(weights.sum()).bit_length() - 38)  # the product fits 63 bits
    rest = TOTAL - len(weights)
    shares = weights * rest // max(1, int(weights.sum()))
    shares[np.argmax(weights)] += rest - shares.sum()
    return shares + 1


def categorical(weights: Ints) -> Any:
    """Return the coder's model of `weights`, one per symbol (at least two).

    The coder gives every symbol 1 and shares the rest by ``floor(cumulative * rest / sum)``. With
    floats that are integers and sum to the rest, nothing is ever rounded.
    """
    shares = integer_probabilities(weights) - 1
    return constriction.stream.model.Categorical(shares.astype(np.float64), perfect=False)


@lru_cache(maxsize=16)
def uniform(width: int) -> Any:
    """Return the coder's model of integers of `width` bits, all as probable."""
    return constriction.stream.model.Uniform(1 << width)
