"""Bits of updates with what both ends know over those without, at equal errors.

python benchmarks/context.py [KEY=VALUE ...]      # of a run of experiment=few_bytes, seed 1
python benchmarks/context.py --save update.npz   # the last round's first, for fedbw_sweep.codecs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from dense_run import DenseRun, config_of

from fedbw_sweep.bench.measures import error
from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.seeding import rng_for

ROUNDS = 2, 4, 8, 16
STEPS = 6.0, 4.5, 3.2, 2.2, 1.6
NMSES = 0.45, 0.302, 0.133


def bits_at(
    context: str,
    update: FloatVector,
    layout: Layout,
    known: Known,
    nmses: Sequence[float] = NMSES,
    steps: Sequence[float] = STEPS,
) -> list[float]:
    """Return bits a coordinate at some NMSE: between two steps, straight in logarithms."""
    points = []
    for step in steps:
        codec = LowRankECSQ(step, context=context)
        payload = codec.encode(update, layout, rng_for(0, "encode"), known)
        decoded = codec.decode(payload, layout, known)
        points.append((error(decoded, update), 8 * len(payload) / layout.size))
    errors, bits = np.log2(sorted(points)).T
    return [float(2 ** np.interp(np.log2(nmse), errors, bits)) for nmse in nmses]


def main(overrides: Sequence[str], save: str | None) -> None:
    """Train, encode and print, or save an update and print nothing."""
    run = DenseRun(config_of(*overrides))
    cohorts, initial = run.config.sampler(), run.vector
    for number, received in enumerate(run.rounds(max(ROUNDS) - 1), 1):
        if number not in ROUNDS:
            continue
        clients = cohorts.cohort(number).clients.tolist()
        if save:
            if number == max(ROUNDS):
                update = run.update(clients[0], number)
                np.savez(save, **{t.name: a.reshape(t.shape) for t, a in run.layout.split(update)})
            continue
        ratios = []
        for client in clients:
            update, known = run.update(client, number), Known(initial, received)
            both = (bits_at(c, update, run.layout, known) for c in ("received", "none"))
            ratios.append([a / b for a, b in zip(*both, strict=True)])
        found = ", ".join(
            f"{nmse}: {of_all.mean():.3f}"
            for nmse, of_all in zip(NMSES, np.transpose(ratios), strict=True)
        )
        print(f"round {number}, mean of {len(ratios)} clients, by NMSE: {found}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--save")
    given = parser.parse_intermixed_args()
    main(given.overrides, given.save)
