"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.seeding import rng_for


def sample_clients(
    run_seed: int, server_round: int, num_clients: int, count: int, dropout: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw a round's clients, each client equally likely.

    Parameters
    ----------
    run_seed : int
        The run's ``seed``.
    server_round : int
        The round, from 1.
    num_clients, count : int
        Clients that exist, and how many of them are sampled.
    dropout : float
        Chance of each that it never replies.

    Returns
    -------
    clients : ndarray of int64, shape (count,)
        Their numbers, ascending.
    dropped : ndarray of bool, shape (count,)
        Which of them never reply.
    """
    sampled = rng_for(run_seed, "sample", server_round).choice(num_clients, count, replace=False)
    return np.sort(sampled), dropped_out(run_seed, server_round, count, dropout)


def dropped_out(run_seed: int, server_round: int, count: int, dropout: float) -> NDArray[np.bool_]:
    """Draw which of a round's `count` clients never reply; see `sample_clients`."""
    return rng_for(run_seed, "dropout", server_round).random(count) < dropout
