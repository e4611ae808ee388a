"""What a simulation costs beyond the training in it: this engine, Flower's own, plain processes.

python benchmarks/simulation.py            # jobs A, B and C, a sweep and the start-up, as ratios
python benchmarks/simulation.py --quick    # fewer repeats
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = 2
JOB_A = (
    "model=tiny",
    "num_clients=20",
    "fraction_fit=1.0",
    "rounds=3",
    "local_steps=10",
    f"backend.workers={WORKERS}",
)
ONE_STEP = ("model=tiny", "num_clients=1", "fraction_fit=1.0", "rounds=1", "local_steps=1")
NO_STEP = ("model=tiny", "num_clients=2", "fraction_fit=1.0", "rounds=1", "local_epochs=0")
FOLDERS = "hydra.run.dir", "hydra.sweep.dir"
ECHO_CLIENTS, ECHO_ROUNDS, ECHO_BYTES = 10, 3, 56_270_848


def compose(*overrides: str) -> Any:
    """Return the `RunConfig` of some overrides."""
    import hydra

    from fedbw_sweep.config import CONF, RunConfig

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(hydra.compose("config", list(overrides)))


# --- The floor: plain processes that train, and nothing else -------------------------------------


def train_forever(requests: Connection, overrides: tuple[str, ...]) -> None:
    """Answer (seed, round, weights, clients) with the sum of the clients' weighted updates."""
    from fedbw_sweep import modeling
    from fedbw_sweep.data import windows
    from fedbw_sweep.run import federated_text
    from fedbw_sweep.seeding import rng_for

    modeling.prepare_process()
    config = compose(*overrides)
    text, model = federated_text(config), modeling.build_model(config.model, 0)
    requests.send("ready")
    while True:
        seed, server_round, weights, clients = requests.recv()
        total, examples = np.zeros(len(weights)), 0
        for client in clients:
            sequences = windows(text.clients[client], config.sequence_length)
            modeling.write_arrays(model, weights, b"")
            modeling.train(
                model,
                sequences,
                epochs=config.local_epochs,
                steps=config.local_steps,
                batch_size=config.batch_size,
                lr=config.lr,
                rng=rng_for(seed, "train", client, server_round),
            )
            total += (modeling.read_arrays(model)[0] - weights) * np.float64(len(sequences))
            examples += len(sequences)
        requests.send((total, examples))


class Floor:
    """Two processes that share the clients of each round evenly; this one averages, evaluates."""

    def __init__(self, *overrides: str) -> None:
        from fedbw_sweep import modeling
        from fedbw_sweep.run import federated_text

        spawn = multiprocessing.get_context("spawn")
        self.workers = []
        for _ in range(WORKERS):
            here, there = spawn.Pipe()
            spawn.Process(target=train_forever, args=(there, overrides), daemon=True).start()
            self.workers.append(here)
        modeling.prepare_process()
        self.config = compose(*overrides)
        self.text = federated_text(self.config)
        for worker in self.workers:
            worker.recv()

    def run(self, seed: int = 1) -> None:
        from fedbw_sweep import modeling

        model = modeling.build_model(self.config.model, seed)
        modeling.heldout_loss(model, self.text.heldout)
        for server_round in range(1, self.config.rounds + 1):
            weights, _ = modeling.read_arrays(model)
            for i, worker in enumerate(self.workers):
                clients = range(i, self.config.num_clients, len(self.workers))
                worker.send((seed, server_round, weights, clients))
            sums, examples = zip(*(worker.recv() for worker in self.workers), strict=True)
            new = (weights + sum(sums) / sum(examples)).astype(np.float32)
            modeling.write_arrays(model, new, b"")
            modeling.heldout_loss(model, self.text.heldout)


# --- This engine and Flower's --------------------------------------------------------------------


class Engine:
    """Runs in this process, on Ray workers that stay."""

    def __init__(self, *overrides: str) -> None:
        from fedbw_sweep.federated import simulation

        simulation.set_verbosity(False)
        self.config = compose(*overrides)
        self.folder = Path(tempfile.mkdtemp())
        simulation.start(self.config)

    def run(self, seed: int = 1) -> dict[str, float]:
        """Do a run; return the seconds its parts took."""
        from fedbw_sweep.run import execute

        record = execute(self.config.model_copy(update={"seed": seed}), self.folder)
        assert record.error is None, record.error
        return {
            name: sum(row[name] for row in record.timing)
            for name in ("round_seconds", "evaluate_seconds", "train_seconds", "encode_seconds")
        }


def echo(*overrides: str) -> None:
    """Ten clients send back 56 MB three times; the server sums."""
    from flwr.app import Array, ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedbw_sweep.federated.simulation import simulate

    client, server = ClientApp(), ServerApp()

    def record(data: bytes) -> Any:
        return ArrayRecord({"model": Array("float32", (ECHO_BYTES // 4,), "raw", data)})

    @client.train()
    def answer(message: Any, context: Any) -> Any:
        received = message.content["arrays"]["model"].data
        return Message(RecordDict({"arrays": record(bytes(received))}), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        while len(nodes := list(grid.get_node_ids())) < ECHO_CLIENTS:
            time.sleep(0.01)
        arrays = record(np.ones(ECHO_BYTES // 4, np.float32).tobytes())
        for _ in range(ECHO_ROUNDS):
            asked = [Message(RecordDict({"arrays": arrays}), node, "train") for node in nodes]
            total = np.zeros(ECHO_BYTES // 4, np.float32)
            for reply in grid.send_and_receive(asked):
                total += np.frombuffer(reply.content["arrays"]["model"].data, np.float32)
            arrays = record((total / len(nodes)).tobytes())
        assert total[0] == len(nodes)

    simulate(compose(f"num_clients={ECHO_CLIENTS}", *overrides), server, client)


# --- Each system in a process of its own, asked in turn ------------------------------------------


def serve(system: str) -> None:
    """Set a system up, then do a run for each line that comes; answer with its seconds."""
    workers = f"backend.workers={WORKERS}"
    jobs: dict[str, Callable[[], Callable[[int], Any]]] = {
        "floor": lambda: Floor(*JOB_A).run,
        "ray": lambda: Engine(*JOB_A).run,
        "flower": lambda: Engine(*JOB_A, "backend=flower", workers).run,
        "echo-ray": lambda: (Engine(*NO_STEP, workers), lambda seed: echo(workers))[1],
        "echo-flower": lambda: lambda seed: echo("backend=flower", workers),
        "fixed": lambda: Engine(*NO_STEP, workers).run,
    }
    run = jobs[system]()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        parts = run(int(line)) or {}
        seconds = time.perf_counter() - started
        print(seconds, parts.get("evaluate_seconds", 0.0), flush=True)


class Asked:
    """A system in a process of its own."""

    def __init__(self, system: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lines = (line for line in self.process.stdout or ())
        assert next(self.lines).strip() == "ready", system

    def seconds(self, seed: int) -> tuple[float, float]:
        """Do one run; return its seconds and those of them spent evaluating."""
        assert self.process.stdin is not None
        print(seed, file=self.process.stdin, flush=True)
        whole, evaluating = next(self.lines).split()
        return float(whole), float(evaluating)


@contextmanager
def systems(*names: str) -> Iterator[dict[str, Asked]]:
    """Start systems one after the other; end them."""
    asked = {name: Asked(name) for name in names}
    yield asked
    for one in asked.values():
        one.process.stdin.close()  # type: ignore[union-attr]
        one.process.wait()


def interleave(names: tuple[str, ...], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Time each system in turn, `repeats` times, after `warm_up` untimed rounds."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with systems(*names) as asked:
        for repeat in range(warm_up + repeats):
            for name, one in asked.items():
                whole, evaluating = one.seconds(repeat + 1)
                if repeat >= warm_up:
                    times[name].append(whole - evaluating if name == "fixed" else whole)
    return times


def command(*arguments: str) -> float:
    """Seconds of a whole command, as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fedbw_sweep", *arguments, *(f"{k}={folder}" for k in FOLDERS)],
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - started


def cold_floor() -> float:
    """Seconds of job A in plain processes, their start and imports included."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import simulation\n"
        "if __name__ == '__main__': simulation.Floor(*simulation.JOB_A).run()"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        started = time.perf_counter()
        subprocess.run([sys.executable, script.name], check=True)
        return time.perf_counter() - started


# --- The table -----------------------------------------------------------------------------------


def row(what: str, times: list[float], against: list[float] | None = None) -> None:
    """Print a row: median, spread, and the median of the ratios to what ran beside it."""
    ratio = ""
    if against:
        ratio = f"{statistics.median(a / b for a, b in zip(times, against, strict=True)):.2f}"
    spread = f"{min(times):.2f} to {max(times):.2f}"
    print(f"| {what} | {statistics.median(times):.2f} | {spread} | {ratio} |", flush=True)


def main(repeats: int) -> None:
    """Print every job's table."""
    print("| job | seconds, median | min to max | ratio |\n|---|---:|---|---:|")
    warm = interleave(("floor", "ray"), repeats)
    row("A: two plain processes, warm (the floor)", warm["floor"])
    row("A: backend=ray, warm, over the floor", warm["ray"], warm["floor"])
    flower = interleave(("flower",), repeats, warm_up=0)["flower"]
    row("A: backend=flower, over the floor", flower, [statistics.median(warm["floor"])] * repeats)
    floors, colds = [], []
    for _ in range(repeats):
        floors.append(cold_floor())
        colds.append(command(*JOB_A))
    row("A: two plain processes, cold", floors)
    row("A: the whole command, over them", colds, floors)
    echoes = interleave(("echo-ray", "echo-flower"), repeats, warm_up=1)
    row("B: backend=ray", echoes["echo-ray"])
    row("B: backend=flower, over backend=ray", echoes["echo-flower"], echoes["echo-ray"])
    row("C: one more run without training", interleave(("fixed",), 3 * repeats)["fixed"])
    starts = [command(*ONE_STEP, f"backend.workers={WORKERS}") for _ in range(repeats)]
    row("the whole command with one step in it", starts)
    sweeps = [command("-m", *JOB_A[:3], "rounds=1", *JOB_A[4:], "seed=1,2,3,4,5,6")]
    with systems("floor") as asked:
        six = [sum(asked["floor"].seconds(seed)[0] for seed in range(1, 7)) / 3]
    beyond = [sweeps[0] - statistics.median(starts)]
    row("a sweep of 6 cells of A's first round, beyond that start, over the floor", beyond, six)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
    else:
        main(2 if chosen.quick else 5)
