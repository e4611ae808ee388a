"""What a simulation costs beyond the training in it: this engine, Flower's own, plain processes.

python benchmarks/simulation.py            # jobs A, B and C, a sweep and the start-up, as ratios
python benchmarks/simulation.py --quick    # fewer repeats
python benchmarks/simulation.py --only A   # one of A, cold, B, C, start, sweep
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

WORKERS = 2
JOB_A = (
    "model=tiny",
    "num_clients=20",
    "fraction_fit=1.0",
    "rounds=3",
    "local_steps=10",
    f"backend.workers={WORKERS}",
)
ONE_ROUND_OF_A = (*JOB_A[:3], "rounds=1", *JOB_A[4:])
ONE_STEP = ("model=tiny", "num_clients=1", "fraction_fit=1.0", "rounds=1", "local_steps=1")
NO_STEP = ("model=tiny", "num_clients=2", "fraction_fit=1.0", "rounds=1", "local_epochs=0")
FIRST_STEP = "a worker has taken the first step"
Parts = dict[str, float]
FOLDERS = "hydra.run.dir", "hydra.sweep.dir"
ECHO_CLIENTS, ECHO_ROUNDS, ECHO_BYTES = 10, 3, 56_270_848
SAME_MODEL = 1e-4
"""How far apart runs of the same training may end, of the way gone: sums differ in their order."""


def compose(*overrides: str) -> Any:
    """Return the `RunConfig` of some overrides."""
    import hydra

    from fedbw_sweep.config.run import RunConfig
    from fedbw_sweep.config.section import CONF

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(hydra.compose("config", list(overrides)))


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


# --- The floor: plain processes that train, and nothing else -------------------------------------


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


# --- This engine and Flower's --------------------------------------------------------------------


class Engine:
    """Runs in this process, on Ray workers that stay."""

    def __init__(self, *overrides: str) -> None:
        from fedbw_sweep.backends.base import backend_of, set_verbosity

        set_verbosity(False)
        self.config = compose(*overrides)
        self.folder = Path(tempfile.mkdtemp())
        backend_of(self.config.backend).start(self.config)

    def again(self, number: int) -> dict[str, float]:
        """Do a run that starts from the same model as the others, but is none of them."""
        return self.run(lr=number * 1e-6)

    def run(self, seed: int = 1, **settings: Any) -> dict[str, float]:
        """Do a run; return the seconds its parts took."""
        from fedbw_sweep.sweep.run import execute

        config = self.config.model_copy(update={"seed": seed, **settings})
        record = execute(config, self.folder)
        assert record.error is None, record.error
        return {
            name: sum(row[name] for row in record.timing)
            for name in record.timing[0].keys() - {"round"}
        }


def echo(*overrides: str) -> Callable[[int], None]:
    """Return a run in which ten clients send back 56 MB three times, and the server sums."""
    from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedbw_sweep.backends.flower import simulate
    from fedbw_sweep.backends.ray.grid import RayGrid
    from fedbw_sweep.training.process import prepare_process

    prepare_process()
    config = compose(f"num_clients={ECHO_CLIENTS}", *overrides)
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

    def run(seed: int) -> None:
        if config.backend.name == "flower":
            simulate(config, server, client)
        else:
            server(RayGrid.of(config, client), Context(0, 0, {}, RecordDict(), {}))

    return run


# --- Peers, where installed ----------------------------------------------------------------------


def installed(job: str = "") -> tuple[str, ...]:
    """Return the names of the peers' systems that do a job: none is for A."""
    peers = {
        "blazefl-processes": ("", "-apart", "-echo", "-fixed"),
        "blazefl-threads": ("", "-apart", "-echo", "-fixed"),
        "pfl": ("", "-apart"),
    }
    return tuple(
        peer + job
        for peer, jobs in peers.items()
        if find_spec(peer.partition("-")[0]) and job in jobs
    )


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


# --- Each system in a process of its own, asked in turn ------------------------------------------


def serve(system: str) -> None:
    """Set a system up, then do a run for each line that comes; answer with its seconds."""
    workers = f"backend.workers={WORKERS}"
    jobs: dict[str, Callable[[], Callable[[int], Any]]] = {
        "floor": lambda: Floor(*JOB_A).run,
        "floor-round": lambda: Floor(*ONE_ROUND_OF_A).run,
        "ray": lambda: Engine(*JOB_A).run,
        "flower": lambda: Engine(*JOB_A, "backend=flower", workers).run,
        "echo-ray": lambda: (Engine(*NO_STEP, workers), echo(workers))[1],
        "echo-flower": lambda: echo("backend=flower", workers),
        "fixed": lambda: Engine(*NO_STEP, workers).again,
        "fixed-seed": lambda: Engine(*NO_STEP, workers).run,
        "fixed-flower": lambda: Engine(*NO_STEP, "backend=flower", workers).run,
    }
    # A peer has a module of its own: importing one changes how its process starts others.
    module = f"simulation_{system.partition('-')[0]}"
    run = (import_module(module).JOBS if find_spec(module) else jobs)[system]()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        parts = run(int(line)) or {}
        print(json.dumps({"seconds": time.perf_counter() - started, **parts}), flush=True)


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

    def run(self, seed: int) -> Parts:
        """Do one run; return its ``seconds`` and those of its parts."""
        assert self.process.stdin is not None
        print(seed, file=self.process.stdin, flush=True)
        parts: Parts = json.loads(next(self.lines))
        return parts


@contextmanager
def systems(*names: str) -> Iterator[dict[str, Asked]]:
    """Start systems one after the other; end them."""
    asked = {name: Asked(name) for name in names}
    yield asked
    for one in asked.values():
        one.process.stdin.close()  # type: ignore[union-attr]
        one.process.wait()


def interleave(
    names: tuple[str, ...], repeats: int, warm_up: int = 1, in_a_row: int = 1
) -> dict[str, list[Parts]]:
    """Time systems in turn, `repeats` times, after `warm_up` untimed rounds.

    Where a system's turn is several runs the first isn't timed: what lay idle meanwhile is slow.
    """
    times: dict[str, list[Parts]] = {name: [] for name in names}
    with systems(*names) as asked:
        for repeat in range(warm_up + repeats):
            for name, one in asked.items():
                runs = [one.run(repeat * in_a_row + i + 1) for i in range(in_a_row)]
                if repeat >= warm_up:
                    times[name] += runs[in_a_row > 1 :]
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


def cold_floor(*overrides: str) -> float:
    """Seconds of a run in plain processes, their start and imports included."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import simulation\n"
        f"if __name__ == '__main__': simulation.Floor(*{overrides}).run()"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        started = time.perf_counter()
        subprocess.run([sys.executable, script.name], check=True)
        return time.perf_counter() - started


def stages(*arguments: str) -> None:
    """Be the whole command, and print when its stages end, in seconds since the process began."""
    began = psutil.Process().create_time()

    def ended(stage: str) -> None:
        print(f"{time.time() - began:.2f} {stage}", flush=True)

    def stamp(place: Any, name: str, stage: str) -> None:
        function = getattr(place, name)

        def stamped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            ended(stage)
            return result

        setattr(place, name, stamped)

    from fedbw_sweep.__main__ import main
    from fedbw_sweep.backends.ray.backend import RayBackend
    from fedbw_sweep.sweep import preflight

    ended("Python, Hydra and pandas are imported")
    prepare, start = preflight.prepare, RayBackend.start

    def checked(*args: Any, **kwargs: Any) -> None:
        ended("the config is composed and validated")
        prepare(*args, **kwargs)
        ended("the text is read and split, and the model built")

    def started(self: RayBackend, config: Any) -> None:
        start(self, config)
        ended("torch, transformers and Flower are imported, and Ray has started meanwhile")
        from fedbw_sweep.federation import job
        from fedbw_sweep.federation.server import Server

        stamp(job, "heldout_loss", "the model is evaluated")
        stamp(Server, "_receive", FIRST_STEP)

    preflight.prepare, RayBackend.start = checked, started  # type: ignore[method-assign]
    folder = tempfile.TemporaryDirectory()
    sys.argv[1:] = [*arguments, *(f"{key}={folder.name}" for key in FOLDERS)]
    # As the first that is registered it is the last that is done.
    atexit.register(ended, "the records are written, the figure drawn and Ray stopped")
    main()


# --- The tables ----------------------------------------------------------------------------------


def seconds_of(runs: list[Parts], but: str | None = None) -> list[float]:
    """Return each run's seconds, without those of one of its parts."""
    return [run["seconds"] - (run[but] if but else 0.0) for run in runs]


def row(what: str, times: list[float], against: list[float] | None = None) -> None:
    """Print a row: median, spread, and the median of the ratios to what ran beside it."""
    ratio = ""
    if against:
        ratio = f"{statistics.median(a / b for a, b in zip(times, against, strict=True)):.2f}"
    spread = f"{min(times):.2f} to {max(times):.2f}"
    print(f"| {what} | {statistics.median(times):.2f} | {spread} | {ratio} |", flush=True)


def breakdown(floor: list[Parts], ray: list[Parts]) -> None:
    """Print where both spend their time: means, so that the parts add up to the whole."""

    def parts(runs: list[Parts]) -> list[float]:
        mean = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
        training, encoding = (
            mean.get(f"{name}_seconds", 0.0) / WORKERS for name in ("train", "encode")
        )
        evaluating, rounds = mean["evaluate_seconds"], mean["round_seconds"]
        rest = rounds - training - encoding - evaluating
        whole = mean["seconds"]
        return [training, encoding, evaluating, rest, whole - rounds, whole]

    names = (
        f"training, of all clients / {WORKERS}",
        f"encoding, of all clients / {WORKERS}",
        "the held-out loss",
        "messages, decoding, averaging, waiting for a round's last client",
        "outside the rounds: the initial model, the records",
        "all",
    )
    print("\n| where A's seconds go, means | floor | backend=ray | more |\n|---|---:|---:|---:|")
    for name, there, here in zip(names, parts(floor), parts(ray), strict=True):
        print(f"| {name} | {there:.2f} | {here:.2f} | {here - there:+.2f} |", flush=True)
    print()


def job_a(repeats: int) -> None:
    """Training-bound, warm: over plain processes."""
    for peer, runs in interleave(installed("-apart"), 1, warm_up=0).items():
        assert runs[0]["apart"] < SAME_MODEL, (peer, runs)
    warm = interleave(("floor", "ray", *installed()), repeats)
    floor = seconds_of(warm["floor"])
    row("A: two plain processes, warm (the floor)", floor)
    row("A: backend=ray, warm, over the floor", seconds_of(warm["ray"]), floor)
    for peer in installed():
        row(f"A: {peer}, warm, over the floor", seconds_of(warm[peer]), floor)
    flower = seconds_of(interleave(("flower",), repeats, warm_up=0)["flower"])
    row("A: backend=flower, over the floor", flower, [statistics.median(floor)] * repeats)
    breakdown(warm["floor"], warm["ray"])


def cold(repeats: int) -> None:
    """Job A with all that starts and ends with a process."""
    floors, colds = [], []
    for _ in range(repeats):
        floors.append(cold_floor(*JOB_A))
        colds.append(command(*JOB_A))
    row("A: two plain processes, cold", floors)
    row("A: the whole command, over them", colds, floors)


def job_b(repeats: int) -> None:
    """Large models echoed."""
    names = "echo-ray", "echo-flower", *installed("-echo")
    echoes = interleave(names, repeats, warm_up=0, in_a_row=2)
    ray, flower = (seconds_of(echoes[f"echo-{name}"]) for name in ("ray", "flower"))
    row("B: backend=ray", ray)
    row("B: backend=flower, over backend=ray", flower, ray)
    for peer in installed("-echo"):
        row(f"B: {peer}, over backend=ray", seconds_of(echoes[peer]), ray)


def job_c(repeats: int) -> None:
    """One more run of a sweep, beyond training and evaluation."""
    names = "fixed", "fixed-seed", *installed("-fixed")
    fixed = interleave(names, repeats, in_a_row=4)
    same, ray, *peers = (seconds_of(runs, but="evaluate_seconds") for runs in fixed.values())
    row("C: one more run without training, of the same model, backend=ray", same)
    row("C: the same of another seed", ray)
    flower = interleave(("fixed-flower",), repeats, warm_up=0)["fixed-flower"]
    seconds = seconds_of(flower, but="evaluate_seconds")
    row("C: another seed, backend=flower, over it", seconds, [statistics.median(ray)] * repeats)
    for peer, times in zip(installed("-fixed"), peers, strict=True):
        row(f"C: another seed, {peer.removesuffix('-fixed')}, over it", times, ray)

    def one_more(key: str) -> list[float]:
        def sweep_of(count: int) -> float:
            values = ",".join(str(number) for number in range(1, count + 1))
            return command("-m", *NO_STEP, "data.heldout_tokens=64", f"{key}={values}")

        return [(sweep_of(43) - sweep_of(3)) / 40 for _ in range(repeats)]

    what = "one more run in a command's sweep, the whole command counted"
    row(f"C: {what}, of the same model", one_more("lr"))
    row(f"C: {what}, of another seed", one_more("seed"))


def start(repeats: int) -> None:
    """The start of a command, and where it goes."""
    one_step = (*ONE_STEP, f"backend.workers={WORKERS}")
    all_three = [
        (command(*one_step), command(*one_step, "backend=flower"), cold_floor(*one_step))
        for _ in range(repeats)
    ]
    ray, flower, floor = (list(column) for column in zip(*all_three, strict=True))
    row("the whole command with one step in it", ray)
    row("the same with backend=flower, over it", flower, ray)
    row("two plain processes with one step in them, cold, over it", floor, ray)

    def stamps(*overrides: str) -> dict[str, float]:
        printed = subprocess.run(
            [sys.executable, __file__, "--stages", *one_step, *overrides],
            capture_output=True,
            text=True,
        ).stdout
        found = re.findall(r"^(\d+\.\d\d) (.*)$", printed, re.MULTILINE)
        return {stage: float(at) for at, stage in reversed(found)}  # each's first time

    runs, others = zip(*[(stamps(), stamps("backend=flower")) for _ in range(repeats)], strict=True)
    first = [run[FIRST_STEP] for run in runs]
    row("a command's start, until the first step", first)
    row("the same with backend=flower, over it", [run[FIRST_STEP] for run in others], first)
    print("\n| start of the command, until | at second, median |\n|---|---:|")
    ends = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    for stage, end in sorted(ends.items(), key=lambda item: item[1]):
        print(f"| {stage} | {end:.1f} |", flush=True)
    print()


def sweep(repeats: int) -> None:
    """Six small cells in one command, beyond its start, over plain processes doing the same."""
    ratios = []
    for _ in range(repeats):
        one = command(*ONE_STEP, f"backend.workers={WORKERS}")
        six = command("-m", *ONE_ROUND_OF_A, "seed=1,2,3,4,5,6")
        with systems("floor-round") as asked:
            floors = [asked["floor-round"].run(seed)["seconds"] for seed in range(7)]
        ratios.append((six - one, sum(floors[1:])))
    beyond, floor = (list(column) for column in zip(*ratios, strict=True))
    row("a sweep of 6 cells of one round of A, beyond the start, over the floor", beyond, floor)


JOBS: dict[str, Callable[[int], None]] = {
    "A": job_a,
    "cold": cold,
    "B": job_b,
    "C": job_c,
    "start": start,
    "sweep": sweep,
}


def main(jobs: list[str], repeats: int) -> None:
    """Print the jobs' tables."""
    print("| job | seconds, median | min to max | ratio |\n|---|---:|---|---:|")
    for job in jobs:
        JOBS[job](repeats)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stages"]:
        stages(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=JOBS, action="append")
    parser.add_argument("--serve")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
    else:
        main(chosen.only or list(JOBS), 2 if chosen.quick else 5)
