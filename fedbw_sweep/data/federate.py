"""Text: where it comes from, what is held out of it, and how the rest is spread over clients.

The corpus is split first and partitioned second. A record (a speech, a paragraph, a row) is marked
as training or held-out text once, before anything is known about clients, so that held-out text is
in no client's training text whatever the number of clients, the partition or the seed, and the
held-out loss of every run of a sweep is over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.heldout import heldout_set
from fedbw_sweep.data.limits import largest_number
from fedbw_sweep.data.partition import TooManyError, check_sizes, divide
from fedbw_sweep.data.tokens import ClientTokens, FederatedText, Tokenize, Tokens
from fedbw_sweep.errors import ConfigError


def federate(
    cfg: DataConfig, num_clients: int, sequence_length: int, seed: int, tokenize: Tokenize
) -> FederatedText:
    """Spread the configured corpus over clients.

    Parameters
    ----------
    cfg : DataConfig
        Corpus, partition and held-out part.
    num_clients : int
        Clients to make.
    sequence_length : int
        Tokens predicted per window.
    seed : int
        The run's seed: draws the ``iid`` and ``dirichlet`` partitions. ``natural`` draws nothing.
    tokenize : callable
        Text to token ids. A client's records are joined by newlines before.

    Raises
    ------
    ConfigError
        If the corpus cannot be loaded, or cannot give this many clients a window each.
    """
    split = _split(cfg, sequence_length, tokenize)
    corpus, train, two_windows = split.corpus, split.train, split.two_windows

    def share(count: int) -> tuple[tuple[str, ...], ClientTokens]:
        names, rows = divide(cfg, corpus, train, count, seed, two_windows)
        clients = ClientTokens.of(
            [np.asarray(tokenize(text), np.int32) for text in _joined(train, rows)]
        )
        check_sizes(cfg, clients, names, sequence_length)
        return names, clients

    try:
        names, clients = share(num_clients)
    except TooManyError as error:
        window = sequence_length + 1
        most = largest_number(cfg, corpus, train, tokenize, window, seed, share, num_clients)
        if error.key == "data.alpha":
            raise ConfigError(error.key, cfg.alpha, f"{error}; {most} can be had") from None
        raise ConfigError("num_clients", num_clients, f"at most {most}: {error}") from None
    return FederatedText(
        clients=clients,
        client_names=names,
        heldout=heldout_set(cfg, split.heldout_tokens, sequence_length),
        heldout_tokens_per_byte=len(split.heldout_tokens) / split.heldout_bytes,
    )


def client_texts(
    cfg: DataConfig, num_clients: int, sequence_length: int, seed: int, tokenize: Tokenize
) -> Iterator[str]:
    """Yield each client's training text, whose tokens `federate` returns.

    Arguments and errors are those of `federate`, whose checks it leaves out.
    """
    split = _split(cfg, sequence_length, tokenize)
    _, rows = divide(cfg, split.corpus, split.train, num_clients, seed, split.two_windows)
    return _joined(split.train, rows)


@dataclass(frozen=True)
class _Split:
    """A corpus, and what of it is held out."""

    corpus: pd.DataFrame
    train: pd.DataFrame
    heldout_tokens: Tokens
    heldout_bytes: int
    two_windows: int  # records that are likely to be two windows


def _split(cfg: DataConfig, sequence_length: int, tokenize: Tokenize) -> _Split:
    corpus = load_corpus(cfg)
    heldout_text = "\n".join(corpus["text"][corpus["heldout"]])
    heldout_tokens = np.asarray(tokenize(heldout_text), np.int32)
    tokens_per_record = len(heldout_tokens) / corpus["heldout"].sum()
    two_windows = math.ceil(2 * (sequence_length + 1) / max(tokens_per_record, 1))
    train = corpus[~corpus["heldout"]].reset_index(drop=True)
    return _Split(corpus, train, heldout_tokens, len(heldout_text.encode()), two_windows)


def _joined(train: pd.DataFrame, rows: Iterable[Any]) -> Iterator[str]:
    texts = train["text"].to_numpy(object)
    return ("\n".join(texts[part]) for part in rows)
