"""Every random draw has a name: a generator per (purpose, client, round), no global state."""

from __future__ import annotations

import hashlib

import numpy as np


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
