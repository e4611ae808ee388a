"""What the bench measures of a codec: bits, error, distance from the bounds, speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.progress import track

from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.cost.bounds import (
    LLOYD_MAX_NMSE,
    gaussian_rate,
    log2_choose,
    reverse_water_filling,
    unbiased_gaussian_rate,
)
from fedbw_sweep.seeding import rng_for

COLUMNS = {
    "method": "choice of conf/compression and its parameters, or the peer package's codec",
    "bytes": "payload bytes",
    "bits": "payload bits per coordinate",
    "ratio": "dense fp32 bytes over payload bytes",
    "nmse": "squared error over energy of the update",
    "bound_bits": "bits per coordinate that Gaussian tensors of these variances need at this NMSE",
    "one_variance_bits": "the same for Gaussian coordinates of one variance",
    "unbiased_bits": "the same for an unbiased code of one variance",
    "lloyd_max_nmse": "least NMSE of a scalar quantiser of Gaussians at these whole bits",
    "percent_of_bound": "100 x bound_bits / bits, of unbiased methods 100 x unbiased_bits / bits; "
    "the bounds are those of independent Gaussian coordinates: above 100 they are not independent",
    "index_bound_bits": "log2 C(n, k) / n for the k coordinates that arrive, if fewer than half do",
    "encode_mb_s": "dense MB encoded per second, median",
    "decode_mb_s": "dense MB decoded per second, median",
    "encode_memcpy": "encoding time over the time to copy the update, medians",
    "decode_memcpy": "decoding time over the same",
    "mean_nmse_8": "NMSE of the mean of 8 clients' decoded updates, median over groups, if there "
    "are more clients",
    "mean_nmse": "NMSE of the mean of all clients' decoded updates",
}
"""Columns of ``codecs.csv``."""

COHORT = 8
"""Clients whose mean's error ``mean_nmse_8`` is."""


def measure(
    layout: Layout, updates: list[FloatVector], codecs: list[Codec], seed: int, repeats: int
) -> pd.DataFrame:
    """Run every codec over the updates.

    Parameters
    ----------
    layout : Layout
    updates : list of FloatVector
        One of each client, of ``layout.size`` coordinates.
    codecs : list of Codec
    seed : int
        What the encoders draw from.
    repeats : int
        Times that encoding and decoding are timed; medians are kept.

    Returns
    -------
    pandas.DataFrame
        A row per codec, `COLUMNS`. Bytes, error and speed are of the first update.
    """
    first = updates[0]
    memcpy = _seconds(first.copy, 4 * repeats)
    energies = [float(np.square(t, dtype=np.float64).sum()) for _, t in layout.split(first)]
    sizes = [tensor.size for tensor in layout.floats]
    rows = []
    for codec in track(codecs, "measuring", transient=True):
        payload = _encode(codec, first, seed)
        decoded = codec.decode(payload)
        of_cohorts, of_all = _mean_errors(codec, updates, seed)
        encode = _seconds(partial(_encode, codec, first, seed), repeats)
        decode = _seconds(partial(codec.decode, payload), repeats)
        nmse, bits = error(decoded, first), 8 * len(payload) / layout.size
        bound = reverse_water_filling(energies, sizes, nmse)
        unbiased = unbiased_gaussian_rate(nmse)
        kept = int(np.count_nonzero(decoded))
        rows.append(
            {
                "method": codec.name,
                "bytes": len(payload),
                "bits": bits,
                "ratio": 32 / bits,
                "nmse": nmse,
                "bound_bits": bound,
                "one_variance_bits": gaussian_rate(nmse),
                "unbiased_bits": unbiased,
                "lloyd_max_nmse": LLOYD_MAX_NMSE.get(int(bits)),
                "percent_of_bound": 100 * (unbiased if codec.unbiased else bound) / bits,
                "index_bound_bits": log2_choose(layout.size, kept) / layout.size
                if 2 * kept < layout.size
                else None,
                "encode_mb_s": first.nbytes / 1e6 / encode,
                "decode_mb_s": first.nbytes / 1e6 / decode,
                "encode_memcpy": encode / memcpy,
                "decode_memcpy": decode / memcpy,
                "mean_nmse_8": np.median(of_cohorts) if len(updates) > COHORT else None,
                "mean_nmse": of_all,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def error(decoded: FloatVector, update: FloatVector) -> float:
    """Squared error over energy, ``|x - x'|^2 / |x|^2``."""
    return _share(np.subtract(update, decoded, dtype=np.float64), update)


def _share(lost: NDArray[np.floating], of: NDArray[np.floating]) -> float:
    return float(np.square(lost, dtype=np.float64).sum() / np.square(of, dtype=np.float64).sum())


def _mean_errors(codec: Codec, updates: list[FloatVector], seed: int) -> tuple[list[float], float]:
    """Return the NMSE of the mean of each whole `COHORT` in turn, and of the mean of all."""
    of_cohort, of_all = np.zeros((2, 2, updates[0].size))  # what is lost, and what was to be sent
    of_cohorts = []
    for count, update in enumerate(updates, 1):
        of_cohort[0] += np.subtract(codec.decode(_encode(codec, update, seed, count - 1)), update)
        of_cohort[1] += update
        if count % COHORT == 0 or count == len(updates):
            if count % COHORT == 0:
                of_cohorts.append(_share(*of_cohort))
            of_all += of_cohort
            of_cohort[:] = 0
    return of_cohorts, _share(*of_all)


def _encode(codec: Codec, update: FloatVector, seed: int, client: int = 0) -> bytes:
    return codec.encode(update, rng_for(seed, "encode", client))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
