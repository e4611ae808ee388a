"""Every random draw has a name: a generator per (purpose, client, round), no global state."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def seed_for(run_seed: int, *name: str | int) -> int:
    """Derive a 128-bit seed from the run's seed and the name of one draw.

    Parameters
    ----------
    run_seed : int
        The run's ``seed``.
    *name : str or int
        What the draw is for, e.g. ``"client", 3, 7`` for client 3 in round 7.

    Returns
    -------
    int
        A seed in ``[0, 2**128)``, the same on every machine and in every process.
    """
    text = "/".join(str(part) for part in (run_seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def rng_for(run_seed: int, *name: str | int) -> np.random.Generator:
    """Return the generator of one named draw; see `seed_for` for the arguments."""
    return np.random.Generator(np.random.PCG64(seed_for(run_seed, *name)))


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
