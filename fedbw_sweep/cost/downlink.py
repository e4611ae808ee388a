"""Bytes of the way down where updates to the model are sent, before they are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import numpy as np

from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.sampling import Cohort

HEADER = struct.Struct("<Ii")
"""CRC-32 of the model that the client must end up with; how many updates follow, or -1 for the
whole model."""

LENGTH = struct.Struct("<Q")
"""Bytes of one update, before it."""


def update_bytes_sent(
    config: RunConfig,
    layout: Layout,
    cohorts: Iterable[Cohort],
    update_bytes: Callable[[int], int],
) -> tuple[int, ...]:
    """Count the payload of all messages down in each round, where updates have known sizes.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    cohorts : iterable of Cohort
        Each round's clients.
    update_bytes : callable
        Payload bytes of one encoded update, by how many rounds' change it makes up for.

    Returns
    -------
    tuple of int, one for each round
    """
    whole = 4 * layout.size
    version_of = np.full(config.num_clients, 0 if config.initial_model == "known" else -1)
    totals = []
    for version, cohort in enumerate(cohorts):  # an update before each round but the first
        held = version_of[cohort.clients]
        missed = np.where(held < 0, 0, version - held)
        if config.downlink.catch_up == "chain":
            cost = missed * (LENGTH.size + update_bytes(1))
        else:
            different, place = np.unique(missed, return_inverse=True)
            each = [n and LENGTH.size + update_bytes(n) for n in different.tolist()]
            cost = np.array(each, np.int64)[place]
        sent = np.where((held < 0) | (cost > whole), whole, cost)
        totals.append(int(sent.sum()) + len(cohort) * (HEADER.size + layout.exact_bytes))
        version_of[cohort.replying] = version
    return tuple(totals)


def first_messages(num_clients: int, cohorts: Iterable[Cohort]) -> tuple[int, ...]:
    """Count each round's messages to clients that have never replied.

    They carry what every client is sent once.

    Parameters
    ----------
    num_clients : int
        Clients that exist.
    cohorts : iterable of Cohort
        Each round's clients.

    Returns
    -------
    tuple of int, one for each round
    """
    replied = np.zeros(num_clients, bool)
    counts = []
    for cohort in cohorts:
        counts.append(int(np.count_nonzero(~replied[cohort.clients])))
        replied[cohort.replying] = True
    return tuple(counts)
