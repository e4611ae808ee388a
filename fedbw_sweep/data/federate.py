"""Text: where it comes from, what is held out of it, and how the rest is spread over clients.

The corpus is split first and partitioned second. A record (a speech, a paragraph, a row) is marked
as training or held-out text once, before anything is known about clients, so that held-out text is
in no client's training text whatever the number of clients, the partition or the seed, and the
held-out loss of every run of a sweep is over the same tokens.
"""

from __future__ import annotations

import math

import numpy as np

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.heldout import heldout_set
from fedbw_sweep.data.partition import check_sizes, divide
from fedbw_sweep.data.tokens import ClientTokens, FederatedText, Tokenize


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
    corpus = load_corpus(cfg)
    heldout_text = "\n".join(corpus["text"][corpus["heldout"]])
    heldout_tokens = np.asarray(tokenize(heldout_text), np.int32)
    train = corpus[~corpus["heldout"]].reset_index(drop=True)
    tokens_per_record = len(heldout_tokens) / corpus["heldout"].sum()
    two_windows = math.ceil(2 * (sequence_length + 1) / max(tokens_per_record, 1))
    names, rows = divide(cfg, corpus, train, num_clients, seed, two_windows)
    texts = train["text"].to_numpy(object)
    clients = ClientTokens.of(
        [np.asarray(tokenize("\n".join(texts[part])), np.int32) for part in rows]
    )
    check_sizes(cfg, clients, names, sequence_length)
    return FederatedText(
        clients=clients,
        client_names=names,
        heldout=heldout_set(cfg, heldout_tokens, sequence_length),
        heldout_tokens_per_byte=len(heldout_tokens) / len(heldout_text.encode()),
    )
