"""Bytes of the way down, before they are sent."""

from __future__ import annotations

import struct

import numpy as np

from fedbw_sweep.compression.base import Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.sampling import sample_clients

HEADER = struct.Struct("<Ii")
"""CRC-32 of the model that the client must end up with; how many updates follow, or `WHOLE`."""


LENGTH = struct.Struct("<Q")
"""Bytes of one update, before it."""


def expected_update_bytes(config: RunConfig, layout: Layout, update_bytes: int) -> list[int]:
    """Estimate the payload of one message of updates in each round, the mean over clients.

    As if each client were sampled independently in each round.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    update_bytes : int
        Of one encoded update.

    Returns
    -------
    list of int, one for each round
    """
    whole = 4 * layout.size
    missed = np.arange(config.rounds)  # before each round
    cost = np.minimum(missed * (LENGTH.size + float(update_bytes)), whole)
    replies = config.clients_per_round / config.num_clients * (1 - config.clients.dropout)
    never = (1 - replies) ** missed
    last_replied = replies * never[:-1] * cost[1:]  # so many rounds ago, from 1 on
    mean = np.cumsum([0.0, *last_replied])[: config.rounds]
    mean += never * (cost if config.initial_model == "known" else whole)
    return [HEADER.size + layout.exact_bytes + round(each) for each in mean.tolist()]


def update_bytes_sent(config: RunConfig, layout: Layout, update_bytes: int) -> list[int]:
    """Count the payload of all messages of updates in each round, where each update has one size.

    Exact: the clients are drawn as the server draws them.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    update_bytes : int
        Of one encoded update.

    Returns
    -------
    list of int, one for each round
    """
    whole = 4 * layout.size
    version_of = np.full(config.num_clients, 0 if config.initial_model == "known" else -1)
    totals = []
    for server_round in range(1, config.rounds + 1):
        clients, dropped = sample_clients(
            config.seed,
            server_round,
            config.num_clients,
            config.clients_per_round,
            config.clients.dropout,
        )
        held = version_of[clients]
        version = server_round - 1  # an update before each round but the first
        cost = (version - held) * (LENGTH.size + update_bytes)
        each = np.where((held < 0) | (cost > whole), whole, cost)
        totals.append(int(each.sum()) + len(clients) * (HEADER.size + layout.exact_bytes))
        version_of[clients[~dropped]] = version
    return totals
