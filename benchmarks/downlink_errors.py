"""What an error of the model that clients receive costs in loss, by where the error is.

A merged update takes a client from the initial model to the global one of round 12 of a dense run.
The held-out loss is that of the model which the client ends up with.

python benchmarks/downlink_errors.py [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import sqrt

import numpy as np
from dense_run import DenseRun, config_of

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.federation.shared import federated_text, lent_model
from fedbw_sweep.model.vector import write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.evaluation import heldout_loss

ROUNDS = 12
STEPS = 14.0, 10.0, 7.0, 5.0
EMBEDDING_STEPS = 1.0, 0.5, 0.25, 0.125


def main(overrides: Sequence[str]) -> None:
    """Train, send and print."""
    run = DenseRun(config_of(*overrides))
    config, heldout = run.config, federated_text(run.config).heldout
    *_, before, model = run.rounds(ROUNDS)
    initial = next(DenseRun(config).rounds(0))
    known, difference = Known(initial, initial), model - initial
    unit = sqrt(float(np.square(model - before, dtype=float).mean()))

    def loss(vector: FloatVector) -> float:
        with lent_model(config) as (module, _, exact):
            write_arrays(module, vector, exact)
            return heldout_loss(module, heldout)

    def show(name: str, size: int, received: FloatVector) -> None:
        error = float(np.square(model - received, dtype=float).sum())
        share = error / float(np.square(difference, dtype=float).sum())
        print(f"| {name} | {size:,} | {share:.4f} | {loss(received) - whole:+.4f} |", flush=True)

    whole = loss(model)
    print("| what is sent | bytes | NMSE | loss |\n|---|---:|---:|---:|")
    for step in STEPS:
        for share in EMBEDDING_STEPS:
            codec = LowRankECSQ(step, embedding_step=share)
            payload = codec.encode_in_units(
                difference, run.layout, rng_for(0, "encode"), unit, known
            )
            received = initial + codec.decode(payload, run.layout, known)
            show(f"step {step:g}, embeddings {share:g} of it", len(payload), received)
            if share == 1:
                rms = sqrt(float(np.square(model - received, dtype=float).mean()))
                noise = np.random.default_rng(0).normal(scale=rms, size=model.size)
                show("noise of that size in place of it", 0, model + noise.astype(np.float32))


if __name__ == "__main__":
    main(sys.argv[1:])
