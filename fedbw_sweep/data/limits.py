"""How many clients a text can give a window each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.partition import TooManyError, iid_order, natural_clients, pools
from fedbw_sweep.data.tokens import Rows, Tokenize

Share = Callable[[int], object]
"""Spreads the text over a number of clients; raises `TooManyError` where that cannot be."""


def largest_number(
    cfg: DataConfig,
    corpus: pd.DataFrame,
    train: pd.DataFrame,
    tokenize: Tokenize,
    window: int,
    seed: int,
    share: Share,
    asked: int,
) -> int:
    """Find the largest number of clients of which each has a window.

    More clients may fail where even more do not, since who gets what is drawn: of ``natural`` and
    ``iid`` clients it is the largest number of all. Of ``dirichlet`` clients, which take long to
    draw, it is one that can be had where one more cannot.

    Parameters
    ----------
    cfg : DataConfig
        The partition.
    corpus, train : DataFrame
        All records, and those that clients train on.
    tokenize : callable
        Text to token ids.
    window : int
        Tokens that each client must have.
    seed : int
        The run's seed.
    share : callable
        See `Share`.
    asked : int
        A number of clients that `share` refuses.
    """
    if cfg.partition == "natural":
        texts = train["text"].groupby(train["client"])
        groups = pools(natural_clients(cfg, corpus), cfg.pooled)
        for count, group in enumerate(groups):
            text = "\n".join(line for name in group for line in texts.get_group(name))
            if len(np.asarray(tokenize(text))) < window:
                return count
        return len(groups)
    if cfg.partition == "iid":
        return _largest_iid(train["text"], tokenize, window, iid_order(len(train), seed))
    works, fails = 0, min(asked, len(train) + 1)
    while fails - works > 1:
        middle = (works + fails) // 2
        try:
            share(middle)
            works = middle
        except TooManyError:
            fails = middle
    return works


def _largest_iid(texts: pd.Series[str], tokenize: Tokenize, window: int, order: Rows) -> int:
    """Go down from all records: a client's tokens are the sum of its records', or nearly so."""
    lines = texts.to_numpy(object)
    sizes = np.array([len(np.asarray(tokenize(f"{line}\n"))) for line in lines])
    total = len(np.asarray(tokenize("\n".join([*lines, ""]))))
    slack = 0 if total == sizes.sum() else window // 10 + 2  # tokens may span records
    upto = np.concatenate([[0], np.cumsum(sizes[order])])
    for count in range(min(len(lines), total // max(1, window - slack)), 0, -1):
        small, larger = divmod(len(lines), count)
        ends = np.cumsum(small + (np.arange(count) < larger))
        tokens = np.diff(upto[ends], prepend=0) - 1  # the last line of a client has no end
        if tokens.min() < window - slack:
            continue
        doubtful = np.argsort(tokens) if slack else ()  # the first that is short ends the search
        parts = (np.sort(order[ends[i - 1] if i else 0 : ends[i]]) for i in doubtful)
        if all(len(np.asarray(tokenize("\n".join(lines[part])))) >= window for part in parts):
            return count
    return 0
