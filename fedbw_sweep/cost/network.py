"""Bytes -> seconds: how long messages take on a network, and on which a method pays off.

Time is a function of recorded bytes and of nothing that is measured on this machine but the codecs'
own seconds, so that no run has to be repeated for another network.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.seeding import rng_for

if TYPE_CHECKING:
    import pandas as pd

BITS_PER_MBIT = 10**6


def slowdowns(network: NetworkConfig, clients: int) -> NDArray[np.float64]:
    """Draw how many times as long as the median client each client takes to send or receive.

    Log-normal with median 1, ``exp(spread * z)``. A client's draw depends on its number alone: it
    has the same links in every run, so that methods are compared on the same network.

    Parameters
    ----------
    network : NetworkConfig
    clients : int
        How many there are, from client 0 on.

    Returns
    -------
    ndarray of float64, shape (clients,)
    """
    return np.exp(network.spread * rng_for(0, "network").standard_normal(clients))


def message_seconds(
    network: NetworkConfig, uplink: ArrayLike, payload_bytes: ArrayLike, client: ArrayLike
) -> NDArray[np.float64]:
    """Time each message from its first bit sent to its last received: latency, then its bits.

    Parameters
    ----------
    network : NetworkConfig
    uplink : array_like of bool, shape (messages,)
        Whether it goes to the server.
    payload_bytes, client : array_like of int, shape (messages,)
        Its payload and its client's number.

    Returns
    -------
    ndarray of float64, shape (messages,)
    """
    numbers = np.asarray(client, np.int64)
    rate = np.where(np.asarray(uplink, bool), network.uplink_mbit_s, network.downlink_mbit_s)
    bits = 8 * np.asarray(payload_bytes, np.float64)
    slowdown = slowdowns(network, int(numbers.max(initial=-1)) + 1)[numbers]
    seconds: NDArray[np.float64] = network.latency_s + slowdown * bits / (BITS_PER_MBIT * rate)
    return seconds


def round_seconds(network: NetworkConfig, messages: pd.DataFrame) -> pd.Series:
    """Time the communication of each round: that of its slowest client, down and then up.

    Clients send and receive at the same time, each over links of its own; the server's are never
    the bottleneck. Training comes in between and is not included.

    Parameters
    ----------
    network : NetworkConfig
    messages : pandas.DataFrame
        Rows of ``messages.parquet`` with their ``run_id``.

    Returns
    -------
    pandas.Series of float64
        Seconds by ``run_id`` and ``round``.
    """
    seconds = message_seconds(
        network, messages["direction"] == "uplink", messages["payload_bytes"], messages["client"]
    )
    keys = ["run_id", "round", "client"]
    by_client = messages[keys].assign(seconds=seconds).groupby(keys, observed=True)["seconds"].sum()
    return by_client.groupby(["run_id", "round"], observed=True).max()


def run_seconds(network: NetworkConfig, runs: pd.DataFrame, messages: pd.DataFrame) -> pd.DataFrame:
    """Time the communication of runs.

    Parameters
    ----------
    network : NetworkConfig
    runs : pandas.DataFrame
        ``run_id`` and ``rounds_to_target``, missing where the target was not reached.
    messages : pandas.DataFrame
        Rows of ``messages.parquet`` with their ``run_id``.

    Returns
    -------
    pandas.DataFrame
        ``round_seconds`` in the mean, ``communication_seconds`` in all and ``seconds_to_target``,
        by ``run_id``.
    """
    by_round = round_seconds(network, messages).reset_index(name="seconds")
    last = runs.set_index("run_id")["rounds_to_target"]
    # Of no messages, pandas makes all columns text.
    until = by_round["round"].astype(int) <= by_round["run_id"].map(last).astype("Int64").fillna(-1)
    total = by_round.groupby("run_id", observed=True)["seconds"]
    to_target = by_round["seconds"].where(until, 0.0).groupby(by_round["run_id"], observed=True)
    return (
        runs[["run_id"]]
        .set_index("run_id")
        .assign(
            round_seconds=total.mean(),
            communication_seconds=total.sum(),
            seconds_to_target=to_target.sum().where(last.notna()),
        )
    )


def link_bytes(messages: pd.DataFrame) -> pd.Series:
    """Return what crosses one client's link in a round: the mean message down plus that up.

    Parameters
    ----------
    messages : pandas.DataFrame
        Rows of ``messages.parquet`` with their ``run_id``.

    Returns
    -------
    pandas.Series of float64
        Payload bytes by ``run_id``.
    """
    keys = ["run_id", "direction"]
    by_direction = messages.groupby(keys, observed=True)["payload_bytes"].mean()
    return by_direction.groupby("run_id", observed=True).sum()


def codec_seconds(timing: pd.DataFrame, rounds: pd.DataFrame) -> pd.Series:
    """Return how long coding holds up a round, in the mean.

    Clients encode at the same time, each once; the server decodes one reply after the other.

    Parameters
    ----------
    timing : pandas.DataFrame
        Rows of ``timing.csv`` with their ``run_id``.
    rounds : pandas.DataFrame
        Rows of ``rounds.csv``.

    Returns
    -------
    pandas.Series of float64
        Seconds by ``run_id``, measured where the runs were done.
    """
    both = timing.merge(rounds[["run_id", "round", "clients"]], on=["run_id", "round"])
    trained = both[both["clients"] > 0]
    seconds = trained["encode_seconds"] / trained["clients"] + trained["decode_seconds"]
    return seconds.astype("float64").groupby(trained["run_id"], observed=True).mean()


def expected_round_seconds(
    network: NetworkConfig, model_bytes: float, update_bytes: float, clients: int
) -> float:
    """Predict `round_seconds` where every client's messages are of one size, without any draw.

    The slowest of `clients` log-normal slowdowns has the median ``exp(spread * z)`` with ``z`` the
    normal quantile of ``2 ** (-1 / clients)``; without a spread, all this is exact.

    Parameters
    ----------
    network : NetworkConfig
    model_bytes, update_bytes : float
        Payload of a message down and of one up.
    clients : int
        Clients sampled in a round.
    """
    slowest = NormalDist().inv_cdf(2 ** (-1 / clients)) if network.spread else 0.0
    seconds_of_bits = 8 * (
        model_bytes / network.downlink_mbit_s + update_bytes / network.uplink_mbit_s
    )
    return 2 * network.latency_s + float(
        np.exp(network.spread * slowest) * seconds_of_bits / BITS_PER_MBIT
    )


def break_even_mbit_s(
    saved_bytes: ArrayLike, extra_codec_seconds: ArrayLike
) -> NDArray[np.float64]:
    """Find the link speed at which sending fewer bytes saves as long as encoding them takes.

    Below it a method is faster than what it is compared with. Infinite where it saves bytes and
    costs no time; 0 where it saves none.

    Parameters
    ----------
    saved_bytes : array_like, shape (n,)
        Bytes that cross one client's link, less by the method than by the baseline.
    extra_codec_seconds : array_like, shape (n,)
        Seconds of encoding and decoding on their way, more by the method than by the baseline.

    Returns
    -------
    ndarray of float64, shape (n,)
        Mbit/s, of a link as fast up as down. NaN where an argument is.
    """
    saved, extra = np.broadcast_arrays(
        np.asarray(saved_bytes, np.float64), np.asarray(extra_codec_seconds, np.float64)
    )
    speed = np.full(saved.shape, np.inf)
    np.divide(8 * saved / BITS_PER_MBIT, extra, out=speed, where=~(extra <= 0))
    return np.where(saved <= 0, 0.0, np.where(np.isnan(saved), np.nan, speed))


def describe(network: NetworkConfig) -> str:
    """Say what a network's communication time is made of."""
    return (
        f"Network {network.name}: {network.uplink_mbit_s:g} Mbit/s up, "
        f"{network.downlink_mbit_s:g} down, latency {network.latency_s:g} s, spread "
        f"{network.spread:g}. A round takes as long as its slowest client, without its training."
    )
