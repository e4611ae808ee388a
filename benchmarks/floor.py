"""The floor of `simulation.py`: plain processes that train, and nothing else.

The package is imported where it is used: the workers start, and import it, meanwhile.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from workloads import JOB_A, WORKERS, Parts, compose


def train_client(
    model: Any, sequences: Any, config: Any, seed: int, client: int, server_round: int
) -> None:
    """Train a client for a round as this package's do, on whatever system asks for it."""
    from fedbw_sweep.seeding import rng_for
    from fedbw_sweep.training import local

    local.train(
        model,
        sequences,
        epochs=config.local_epochs,
        steps=config.local_steps,
        batch_size=config.batch_size,
        lr=config.lr,
        rng=rng_for(seed, "train", client, server_round),
    )


def train_forever(requests: Connection, overrides: tuple[str, ...]) -> None:
    """Answer (seed, round, weights, clients) with the sum of the clients' weighted updates.

    And with the sum of the weights, and the seconds spent training.
    """
    from fedbw_sweep.data.tokens import windows
    from fedbw_sweep.federation.shared import federated_text
    from fedbw_sweep.model import build, vector
    from fedbw_sweep.training import process

    process.prepare_process()
    config = compose(*overrides)
    text, model = federated_text(config), build.build_model(config.model, 0)
    requests.send("ready")
    while True:
        seed, server_round, weights, clients = requests.recv()
        total, examples, seconds = np.zeros(len(weights)), 0, 0.0
        for client in clients:
            sequences = windows(text.clients[client], config.sequence_length)
            vector.write_arrays(model, weights, b"")
            started = time.perf_counter()
            train_client(model, sequences, config, seed, client, server_round)
            seconds += time.perf_counter() - started
            total += (vector.read_arrays(model)[0] - weights) * np.float64(len(sequences))
            examples += len(sequences)
        requests.send((total, examples, seconds))


class Floor:
    """Two processes that share the clients of each round evenly; this one averages, evaluates."""

    def __init__(self, *overrides: str) -> None:
        from fedbw_sweep.federation.shared import federated_text
        from fedbw_sweep.training import process

        spawn = multiprocessing.get_context("spawn")
        self.workers = []
        for _ in range(WORKERS):
            here, there = spawn.Pipe()
            spawn.Process(target=train_forever, args=(there, overrides), daemon=True).start()
            self.workers.append(here)
        process.prepare_process()
        self.config = compose(*overrides)
        self.text = federated_text(self.config)
        for worker in self.workers:
            worker.recv()

    def run(self, seed: int = 1) -> dict[str, float]:
        """Do a run; return the seconds its parts took."""
        from fedbw_sweep.model import build, vector
        from fedbw_sweep.training import evaluation

        self.model = model = build.build_model(self.config.model, seed)
        began = time.perf_counter()
        training, evaluating = 0.0, 0.0

        def evaluate() -> None:
            nonlocal evaluating
            started = time.perf_counter()
            evaluation.heldout_loss(model, self.text.heldout)
            evaluating += time.perf_counter() - started

        evaluate()
        for server_round in range(1, self.config.rounds + 1):
            weights, _ = vector.read_arrays(model)
            for i, worker in enumerate(self.workers):
                clients = range(i, self.config.num_clients, len(self.workers))
                worker.send((seed, server_round, weights, clients))
            sums, examples, seconds = zip(*(worker.recv() for worker in self.workers), strict=True)
            training += sum(seconds)
            new = (weights + sum(sums) / sum(examples)).astype(np.float32)
            vector.write_arrays(model, new, b"")
            evaluate()
        return {
            "round_seconds": time.perf_counter() - began,
            "evaluate_seconds": evaluating,
            "train_seconds": training,
        }


def apart(peer: Any) -> Callable[[int], Parts]:
    """Return a run of job A on a peer and on the floor, which tells how far apart they end."""
    from fedbw_sweep.model import build, vector

    floor = Floor(*JOB_A)

    def run(seed: int) -> Parts:
        peer.run(seed)
        floor.run(seed)
        start = build.build_model(floor.config.model, seed)
        first, here, there = (vector.read_arrays(m)[0] for m in (start, peer.model, floor.model))
        return {"apart": float(np.linalg.norm(here - there) / np.linalg.norm(there - first))}

    return run
