"""Bits at the error of the mean of 1, 8 and 64 updates that 2-bit EDEN has: biased and unbiased.

python benchmarks/cohorts.py
"""

from __future__ import annotations

import numpy as np
from dense_run import DenseRun, config_of
from rich.progress import track

from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.bench.measures import error
from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.eden import Eden
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.seeding import rng_for

ROUND = 8
"""Of a dense run, whose updates are sent: no longer the first, which are all alike."""

COHORTS = 1, 8, 64

METHODS: dict[str, list[LowRankECSQ]] = {
    "lowrank_ecsq": [LowRankECSQ(step) for step in (2.0, 1.4, 1.0, 0.7, 0.5)],
    "lowrank_ecsq, norm_correction": [
        LowRankECSQ(step, norm_correction=True) for step in (2.0, 1.4, 1.0, 0.7, 0.5)
    ],
    "lowrank_ecsq, dither": [LowRankECSQ(step, dither=True) for step in (1.8, 1.27, 0.9)],
}
"""From coarse to fine."""


def measure(
    name: str, compressor: Compressor, layout: Layout, updates: list[FloatVector]
) -> list[float]:
    """Return bits a coordinate, then the NMSE of the means of `COHORTS`: medians over cohorts."""
    codec, payloads, decoded = Codec.of(name, compressor, layout), 0, []
    for client, update in enumerate(updates):
        payload = codec.encode(update, rng_for(0, "encode", client))
        decoded.append(codec.decode(payload))
        payloads += len(payload)
    found = [8 * payloads / (layout.size * len(updates))]
    for cohort in COHORTS:
        parts = [slice(at, at + cohort) for at in range(0, len(updates), cohort)]
        errors = [
            error(np.mean(decoded[part], axis=0), np.mean(updates[part], axis=0)) for part in parts
        ]
        found.append(float(np.median(errors)))
    print(f"{codec.name}: {', '.join(f'{value:.4g}' for value in found)}", flush=True)
    return found


def main() -> None:
    """Train, send and print."""
    run, clients = DenseRun(config_of()), max(COHORTS)
    for _ in track(run.rounds(ROUND - 1), "rounds before", ROUND, transient=True):
        pass
    updates = [run.update(client, ROUND) for client in track(range(clients), transient=True)]
    mean, energy = np.mean(updates, axis=0), np.mean([np.square(u).sum() for u in updates])
    print(f"the mean's energy is {np.square(mean).sum() / energy:.2f} of an update's")
    eden, *wanted = measure("eden, 2 bits", Eden(2), run.layout, updates)
    for name, compressors in METHODS.items():
        points = [measure(f"{name}, step {c.step:g}", c, run.layout, updates) for c in compressors]
        bits, *errors = zip(*points, strict=True)
        for cohort, at, of_method in zip(COHORTS, wanted, errors, strict=True):
            # Errors fall from coarse to fine; between two steps both are straight in logarithms.
            needed = 2 ** np.interp(-np.log2(at), -np.log2(of_method), np.log2(bits))
            print(f"{name}, mean of {cohort}: {needed:.3f} bits, {needed / eden:.2f} of EDEN's")


if __name__ == "__main__":
    main()
