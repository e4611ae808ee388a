"""Bits that updates must take at some errors, by what is known of them, beside what they do take.

Of a dense run of experiment=few_bytes: updates of clients, and what takes clients that were away
from the model that they hold to the global one, which the way down sends.

python benchmarks/bounds.py [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from context import bits_at
from dense_run import DenseRun, config_of

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.cost.bounds import Spectrum, gaussian_rate, reverse_water_filling, spectral_rate

ROUNDS = 8, 16, 30
NMSES = {"up": (0.302, 0.133), "down": (0.03, 0.01)}
STEPS = 6.0, 4.5, 3.2, 2.2, 1.6, 1.1, 0.8, 0.55, 0.4


def spectra_of(vector: FloatVector, layout: Layout) -> list[Spectrum]:
    """Return each array's shape as a matrix, and its singular values."""
    found = list[Spectrum]()
    for tensor, values in layout.split(vector):
        matrix = values.reshape(-1, tensor.shape[-1] if tensor.shape else 1).astype(float)
        found.append((matrix.shape, np.linalg.svd(matrix, compute_uv=False)))
    return found


def show(name: str, vector: FloatVector, layout: Layout, known: Known) -> None:
    """Print what a vector needs and takes, at each of its way's `NMSES`."""
    nmses = NMSES[name.split(",")[0]]
    arrays = [values for _, values in layout.split(vector)]
    energies = [np.square(values, dtype=float).sum() for values in arrays]
    spectra = spectra_of(vector, layout)
    taken = [
        bits_at(context, vector, layout, known, nmses, STEPS) for context in ("none", "received")
    ]
    for nmse, plain, context in zip(nmses, *taken, strict=True):
        needed = (
            gaussian_rate(nmse),
            reverse_water_filling(energies, [values.size for values in arrays], nmse),
            spectral_rate(spectra, nmse),
        )
        cells = [name, f"{nmse:g}", *(f"{bits:.3f}" for bits in (*needed, plain, context))]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(overrides: Sequence[str]) -> None:
    """Train, and print a table."""
    run = DenseRun(config_of(*overrides))
    sampler, models = run.config.sampler(), list[FloatVector]()
    print("| what | NMSE | one variance | by array | singular values | coded | in its context |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for number, vector in enumerate(run.rounds(max(ROUNDS) - 1), 1):
        models.append(vector)
        if number not in ROUNDS:
            continue
        initial, client = models[0], int(sampler.cohort(number).clients[0])
        update = run.update(client, number)
        show(f"up, round {number}", update, run.layout, Known(initial, vector))
        for away in (number - 1, 5):
            held = models[-1 - away]
            name = f"down, round {number}, {away} rounds missed"
            show(name, vector - held, run.layout, Known(initial, held))


if __name__ == "__main__":
    main(sys.argv[1:])
