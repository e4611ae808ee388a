"""What a client that was away is sent: bytes of one merged update by the rounds missed, and time.

python benchmarks/catch_up.py [--rounds 60] [--only bytes seconds]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import dense_run
from dense_run import DenseRun

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.federation.chain import Chain
from fedbw_sweep.federation.downlink import Downlink
from fedbw_sweep.federation.merged import Merged

MISSED = 1, 2, 5, 10, 20, 50
STEPS = 2.0, 4.0, 10.0


def config_of(*overrides: str) -> RunConfig:
    """Compose a run whose way down is the flagship's."""
    return dense_run.config_of("compression@downlink=lowrank_ecsq", *overrides)


def bytes_down(rounds: int) -> None:
    """Print payload bytes of a message by the rounds that its client missed."""
    config = config_of()
    run = DenseRun(config)
    vectors, layout = list(run.rounds(rounds)), run.layout
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
        run, spent = DenseRun(config.model_copy(update={"local_steps": 5})), []
        end = Merged(config, run.layout)
        for number, vector in enumerate(run.rounds(3), 1):
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
