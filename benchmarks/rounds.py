"""What a sweep does not train again: whole commands, as ratios, medians of 3.

CPU seconds are those of all processes of a command, so that other work on the machine matters less.

python benchmarks/rounds.py [--only NAME ...]; NAMES are those of `MEASURES`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from fedbw_sweep.records.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent
REPEATS, KILLS = 3, 10

FEDERATION = "model=tiny num_clients=135 fraction_fit=0.03 local_steps=20 data.min_characters=10000"
"""That of ``experiment=few_bytes``."""

RESIDUALS = (
    "model=pythia-14m num_clients=8 fraction_fit=0.25 local_steps=8 compression=topk rounds=6"
)
"""Every client keeps a residual of 56 MB."""

METHODS = (
    f"{FEDERATION} rounds=30 compression=none,int8",
    f"{FEDERATION} rounds=30 compression=lowrank_ecsq compression.step=4.0 "
    "compression.norm_correction=true",
)
OFF = "checkpoint.enabled=false"


def start(folder: Path, overrides: str) -> subprocess.Popen[bytes]:
    """Start a command whose records go into a folder."""
    command = "-m", "fedbw_sweep", "-m", *overrides.split(), f"hydra.sweep.dir={folder}"
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def seconds(folder: Path, *commands: str) -> float:
    """Do commands, one after the other; return the CPU seconds of all their processes.

    Each process is looked at every quarter of a second while it lives.
    """
    spent = 0.0
    for overrides in commands:
        command, by_process = start(folder, overrides), dict[int, float]()
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(command.pid)
            while command.poll() is None:
                for each in [process, *process.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        times = each.cpu_times()
                        by_process[each.pid] = times.user + times.system
                time.sleep(0.25)
        assert command.wait() == 0, overrides
        spent += sum(by_process.values())
    return spent


def peak(folder: Path, overrides: str) -> float:
    """Do a command; return the most memory that its server held for itself, in MB.

    Ray's object store, where clients' states lie anyway, is shared with the workers: what the
    server reads of it counts as resident in the server too.
    """
    command, most = start(folder, overrides), 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(command.pid)
        while command.poll() is None:
            memory = process.memory_info()
            most = max(most, memory.rss - memory.shared)
            time.sleep(0.02)
    return most / 1e6


def in_turn(*things: Callable[[Path], float], repeats: int = REPEATS) -> list[str]:
    """Measure things in turn; return what each but the last takes, over the last, in words."""
    measured = []
    for number in range(repeats):
        found = {}
        for which in (things, things[::-1])[number % 2]:
            with TemporaryDirectory() as place:
                found[which] = which(Path(place, "sweep"))
        measured.append([found[each] for each in things])
        print("  ", ", ".join(f"{value:.5g}" for value in measured[-1]), flush=True)
    *each, last = zip(*measured, strict=True)
    return [
        f"{statistics.median(own):.5g} over {statistics.median(last):.5g}: "
        f"{statistics.median([a / b for a, b in zip(own, last, strict=True)]):.3f}"
        for own in each
    ]


def again() -> str:
    """CPU seconds of 5, 10, 20 and 40 rounds, and of 20 made 40, over those of 40 alone."""

    with TemporaryDirectory() as place:
        shorter = Path(place, "sweep")
        seconds(shorter, f"{FEDERATION} rounds=20")

        def extended(folder: Path) -> float:
            shutil.copytree(shorter, folder)
            return seconds(folder, f"{FEDERATION} rounds=40")

        prefixes, longer = in_turn(
            lambda folder: seconds(folder, f"{FEDERATION} rounds=5,10,20,40"),
            extended,
            lambda folder: seconds(folder, f"{FEDERATION} rounds=40"),
        )
    return f"prefixes {prefixes}; longer {longer}"


def overhead(overrides: str) -> str:
    """CPU seconds of a run with checkpoints, over those without: medians of 7, being near 1."""
    [found] = in_turn(
        lambda folder: seconds(folder, overrides),
        lambda folder: seconds(folder, f"{overrides} {OFF}"),
        repeats=7,
    )
    return found


def target() -> str:
    """CPU seconds of three methods to a loss of 2.4, stopped there, over those of 30 rounds."""
    [found] = in_turn(
        lambda folder: seconds(folder, *(f"{method} stop_at_loss=2.4" for method in METHODS)),
        lambda folder: seconds(folder, *METHODS),
    )
    return found


def memory() -> str:
    """MB that the server holds at most, with checkpoints over without; a model is 56 MB."""
    [found] = in_turn(
        lambda folder: peak(folder, RESIDUALS), lambda folder: peak(folder, f"{RESIDUALS} {OFF}")
    )
    return found


def lost(overrides: str, rounds: int) -> str:
    """Rounds that a kill at a random moment loses: those that were over, less those kept."""
    found = []
    for number in range(KILLS):
        rng = random.Random(number)
        with TemporaryDirectory() as place:
            folder = Path(place, "sweep")
            command = start(folder, f"{overrides} seed={number}")
            wanted, share = rng.randrange(1, rounds), rng.random()
            began = 0.0
            while (reached := _round(folder)) < wanted and command.poll() is None:
                began = time.monotonic() if reached < wanted - 1 else began
                time.sleep(0.005)
            time.sleep(share * min(5.0, time.monotonic() - began))
            os.killpg(command.pid, signal.SIGKILL)
            command.wait()
            [run] = [path.parent for path in folder.glob("*/running.json")]
            kept = read_checkpoint(run)
            found.append(_round(folder) - (0 if kept is None else kept.round))
            _end_others(folder)
    return f"rounds lost by {KILLS} kills: {sorted(found)}"


def _round(folder: Path) -> int:
    """Say how many rounds are over."""
    for path in folder.glob("*/running.json"):
        with suppress(OSError, ValueError):
            return int(json.loads(path.read_bytes())["round"])
    return -1


def _end_others(folder: Path) -> None:
    """Wait until what the killed command had started has ended as well."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        mine = [p for p in psutil.process_iter() if _belongs(p)]
        if not mine:
            return
        time.sleep(0.2)


def _belongs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "ray" in process.name() and process.ppid() == 1
    return False


MEASURES: dict[str, Callable[[], str]] = {
    "again": again,
    "target": target,
    "overhead_tiny": lambda: overhead(f"{FEDERATION} rounds=10"),
    "overhead_residuals": lambda: overhead(RESIDUALS),
    "memory": memory,
    "lost_tiny": lambda: lost(f"{FEDERATION} rounds=40 local_steps=5", 40),
    "lost_residuals": lambda: lost(RESIDUALS, 6),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    for name in parser.parse_args(arguments).only:
        print(f"{name}: {MEASURES[name].__doc__ or ''}", flush=True)
        print(f"{name}: {MEASURES[name]()}", flush=True)


if __name__ == "__main__":
    main()
