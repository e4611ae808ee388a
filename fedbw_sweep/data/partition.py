"""Who has which training records."""

from __future__ import annotations

import warnings
from contextlib import redirect_stderr
from io import StringIO
from itertools import pairwise

import numpy as np
import pandas as pd

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.tokens import ClientTokens, Rows
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import require
from fedbw_sweep.seeding import rng_for, seed_for


class TooManyError(Exception):
    """More clients than can be given a window each; says why, and which setting is at fault."""

    def __init__(self, why: str, key: str = "num_clients") -> None:
        super().__init__(why)
        self.key = key


def divide(
    cfg: DataConfig,
    corpus: pd.DataFrame,
    train: pd.DataFrame,
    num_clients: int,
    seed: int,
    min_records: int,
) -> tuple[tuple[str, ...], list[Rows]]:
    """Name the clients and say which rows of `train` each one holds, in corpus order.

    Raises
    ------
    TooManyError
        If there are fewer clients, or records, than are asked for.
    ConfigError
        If the records lack what the partition goes by.
    """
    names = tuple(map(str, range(num_clients)))
    if cfg.partition == "natural":
        eligible = natural_clients(cfg, corpus)
        groups = pools(eligible, cfg.pooled)
        if num_clients > len(groups):
            pooled = "" if cfg.pooled == 1 else f", data.pooled={cfg.pooled} of them to a client"
            raise TooManyError(
                f"{len(eligible)} are the natural clients with at least "
                f"data.min_characters={cfg.min_characters} characters, of "
                f"{corpus['client'].nunique()}{pooled}; lower either"
            )
        groups = groups[:num_clients]
        more = f" and {cfg.pooled - 1} more" if cfg.pooled > 1 else ""
        names = tuple(f"{group[0]}{more}" for group in groups)
        numbers = {name: i for i, group in enumerate(groups) for name in group}
        number = train["client"].map(numbers).fillna(-1)
        owner = number.to_numpy(np.int64)
        by_owner = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[by_owner], np.arange(num_clients + 1))
        return names, [by_owner[start:end] for start, end in pairwise(bounds)]
    if num_clients > len(train):
        raise TooManyError(f"there are {len(train)} training records")
    if cfg.partition == "iid":
        return names, [
            np.sort(part) for part in np.array_split(iid_order(len(train), seed), num_clients)
        ]
    if train["label"].isna().any():
        raise ConfigError(
            "data.label_column", cfg.label_column, "dirichlet needs a label for every record"
        )
    require("data.partition", "dirichlet")
    # Imported late: 2 s that nothing else need wait for.
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = pd.factorize(train["label"], sort=True)[0].astype(np.int64)
    partitioner = DirichletPartitioner(
        num_clients,
        "label",
        cfg.alpha,
        min_partition_size=min_records,
        shuffle=False,
        seed=seed_for(seed, "partition"),
    )
    partitioner.dataset = Dataset.from_dict({"row": np.arange(len(train)), "label": labels})
    try:
        # Progress bars, and a warning for each repeated Dirichlet draw.
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(i) for i in range(num_clients)]
    except ValueError:
        raise TooManyError(
            f"no draw gave each of {num_clients} clients {min_records} records; "
            "raise it or lower num_clients",
            key="data.alpha",
        ) from None
    return names, [np.sort(part[:]["row"]) for part in parts]


def iid_order(records: int, seed: int) -> Rows:
    """Draw the order of which each ``iid`` client gets an equal part."""
    return rng_for(seed, "partition").permutation(records)


def natural_clients(cfg: DataConfig, corpus: pd.DataFrame) -> tuple[str, ...]:
    """Name the natural clients, in the order in which they are chosen.

    In one fixed order whatever the seed and `min_characters`, so that more clients are the same
    ones and some more, and runs that differ in their seed are paired: same people, other draws.
    """
    characters = corpus["text"].str.len().groupby(corpus["client"]).sum()
    if characters.empty:
        raise ConfigError(
            "data.partition",
            cfg.partition,
            "needs records that say whose they are: set data.client_column, or use iid",
        )
    order = rng_for(0, "natural clients").permutation(len(characters))
    in_order = characters.iloc[order]
    return tuple(in_order.index[in_order >= cfg.min_characters])


def pools(names: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    """Group so many natural clients to a client, in order; leave out what fills none."""
    return [names[start : start + size] for start in range(0, len(names) - size + 1, size)]


def check_sizes(
    cfg: DataConfig, clients: ClientTokens, names: tuple[str, ...], sequence_length: int
) -> None:
    """Refuse a partition that leaves a client without a full window.

    Raises
    ------
    TooManyError
        Naming the first such client.
    """
    window = sequence_length + 1
    sizes = np.diff(clients.ends, prepend=0)
    if sizes.min() >= window:
        return
    short = int(np.argmax(sizes < window))
    remedy = {
        "natural": "raise data.min_characters",
        "iid": "lower num_clients",
        "dirichlet": "raise data.alpha, lower num_clients",
    }[cfg.partition]
    raise TooManyError(
        f"client {names[short]} gets {sizes[short]} training tokens, fewer than the {window} of "
        f"one window; {remedy} or lower sequence_length"
    )
