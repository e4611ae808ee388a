"""Each system of `simulation.py` in a process of its own, asked in turn; whole commands."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from engine import Engine, echo
from floor import Floor
from workloads import JOB_A, NO_STEP, ONE_ROUND_OF_A, WORKERS, Parts

FIRST_STEP = "a worker has taken the first step"

FOLDER = "hydra.sweep.dir"


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
            [sys.executable, "-m", "fedbw_sweep", *arguments, f"{FOLDER}={folder}"],
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - started


def cold_floor(*overrides: str) -> float:
    """Seconds of a run in plain processes, their start and imports included."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import floor\n"
        f"if __name__ == '__main__': floor.Floor(*{overrides}).run()"
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
    from fedbw_sweep.sweeps import preflight

    ended("Python, Hydra and pandas are imported")
    prepare, start = preflight.prepare, RayBackend.start

    def checked(*args: Any, **kwargs: Any) -> None:
        ended("the config is composed and validated")
        prepare(*args, **kwargs)
        ended("the text is read and split, and the model built")

    def started(self: RayBackend, config: Any) -> None:
        start(self, config)
        ended("torch, transformers and Flower are imported, and Ray has started meanwhile")
        from fedbw_sweep.federation import runs
        from fedbw_sweep.federation.exchange import Exchange

        stamp(runs, "heldout_loss", "the model is evaluated")
        stamp(Exchange, "receive", FIRST_STEP)

    def plain(self: RayBackend, config: Any) -> None:
        import ray

        import fedbw_sweep.federation.client  # noqa: F401
        from fedbw_sweep.backends.ray import cluster

        ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        cluster.get_ready(config)

    if arguments[:1] == ("plain",):
        start, arguments = plain, arguments[1:]
    preflight.prepare, RayBackend.start = checked, started  # type: ignore[method-assign]
    folder = tempfile.TemporaryDirectory()
    sys.argv[1:] = [*arguments, f"{FOLDER}={folder.name}"]
    # As the first that is registered it is the last that is done.
    atexit.register(ended, "the records are written, the figure drawn and Ray stopped")
    main()


if __name__ == "__main__":
    {"--serve": serve, "--stages": stages}[sys.argv[1]](*sys.argv[2:])
