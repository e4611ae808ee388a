"""What a client that was away is sent: bytes of one merged update by the rounds missed, and time.

python benchmarks/catch_up.py [--rounds 60] [--only bytes seconds]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from hydra import compose, initialize_config_dir

from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.federation.average import WeightedMean
from fedbw_sweep.federation.chain import Chain
from fedbw_sweep.federation.downlink import Downlink
from fedbw_sweep.federation.merged import Merged
from fedbw_sweep.federation.shared import federated_text, lent_model
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.local import train
from fedbw_sweep.training.process import prepare_process

FEDERATION = "experiment=few_bytes", "compression=none", "seed=1"
"""135 speakers, 4 a round, 20 steps."""

MISSED = 1, 2, 5, 10, 20, 50
STEPS = 2.0, 4.0, 10.0


def config_of(*overrides: str) -> RunConfig:
    """Compose a run whose way down is the flagship's."""
    down = "compression@downlink=lowrank_ecsq", *overrides
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(compose("config", [*FEDERATION, *down]))


def models(config: RunConfig, rounds: int) -> Iterator[FloatVector]:
    """Yield the global models of a dense run: the initial one, and that of each round."""
    prepare_process()
    text, sampler = federated_text(config), config.sampler()
    with lent_model(config) as (model, vector, exact):
        yield vector
        for number in range(1, rounds + 1):
            mean = WeightedMean(vector.size)
            for client in sampler.cohort(number).clients.tolist():
                write_arrays(model, vector, exact)
                sequences = windows(text.clients[client], config.sequence_length)
                rng = rng_for(config.seed, "train", client, number)
                train(
                    model, sequences, epochs=1, steps=config.local_steps, lr=config.lr,
                    batch_size=config.batch_size, rng=rng,
                    optimizer=partial(config.optimizer.instantiate, "optimizer"),
                )  # fmt: skip
                mean.add(read_arrays(model)[0] - vector, exact, len(sequences), len(sequences))
            vector = vector + mean.take().astype(np.float32)
            yield vector


def bytes_down(rounds: int) -> None:
    """Print payload bytes of a message by the rounds that its client missed."""
    config = config_of()
    vectors = list(models(config, rounds))
    with lent_model(config) as (model, _, _):
        layout = layout_of(model)
    for step in STEPS:
        own = config_of(f"downlink.step={step}", "downlink.catch_up=merged")
        chained = config_of(f"downlink.step={step}")
        ends: dict[str, Downlink] = {"merged": Merged(own, layout), "chain": Chain(chained, layout)}
        for number, vector in enumerate(vectors, 1):
            for end in ends.values():
                end.prepare(number, vector, b"")
                for client, missed in enumerate(MISSED):
                    if number == len(vectors) - missed:
                        end.payload_for(client)
                        end.replied(client)
        for name, end in ends.items():
            sizes = [len(end.payload_for(client)) for client in range(len(MISSED))]
            sizes = [size - HEADER.size - LENGTH.size for size in sizes]
            by_rounds = ", ".join(f"{m}: {s:,}" for m, s in zip(MISSED, sizes, strict=True))
            print(f"step {step:g}, {name}: bytes by rounds missed {by_rounds}", flush=True)
            print(f"step {step:g}, {name}: {sizes[-1] / sizes[0]:.2f} times", flush=True)


def seconds() -> None:
    """Print a server's CPU seconds for each client's merged update, on one core."""
    for name in ("tiny", "pythia-14m"):
        config = config_of(f"model={name}", "downlink.step=10", "downlink.catch_up=merged")
        initial, *others = models(config.model_copy(update={"local_steps": 5}), 3)
        with lent_model(config) as (model, _, _):
            end = Merged(config, layout_of(model))
        spent = []
        for number, vector in enumerate([initial, *others], 1):
            end.prepare(number, vector, b"")
            if number > 1:  # a client that takes part each round
                began = time.process_time()
                end.payload_for(0)
                spent.append(time.process_time() - began)
                end.replied(0)
        print(f"{name}: {statistics.median(spent):.3f} s ({', '.join(f'{s:.3f}' for s in spent)})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--only", nargs="+", choices=["bytes", "seconds"], default=["bytes", "seconds"]
    )
    given = parser.parse_args(arguments)
    if "bytes" in given.only:
        bytes_down(given.rounds)
    if "seconds" in given.only:
        seconds()


if __name__ == "__main__":
    main()
