"""Kill processes of sweeps at random moments: ``python tools/kills.py LOG [CASES]``.

Each case starts a small sweep, kills its command, a worker or a process of Ray's with SIGKILL,
SIGTERM or SIGHUP, and starts the same command again. Then its tables must be those of a sweep that
was left alone, byte for byte; no process may be left 20 seconds after either command's end, nor
anything of ours in temporary files after the second's. LOG gets a line per case; started again with
the same LOG, the storm goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil

SWEEP = (
    "-m", "model=tiny", "num_clients=4", "fraction_fit=0.5", "rounds=4", "local_steps=8",
    "data.heldout_tokens=256", "compression=none,topk,int8", "compression@downlink=none,topk",
)  # fmt: skip

VICTIMS = {
    "agent": "Agent",
    "worker": "ray::",
    "node": "fedbw_sweep.backends.ray.node",
    "dashboard": "dashboard/dashboard.py",
    "monitor": "_private/monitor.py",
    "raylet": "/raylet/raylet",
    "gcs": "gcs_server",
    "nursery": "-m fedbw_sweep -m",
    "command": "-m fedbw_sweep -m",
}
"""What the command lines of processes hold, by what they are: the first that fits.

The nursery is a fork of the command.
"""

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP

GONE_S = 20
"""Seconds after a kill within which every process must have ended, if the command has."""

TABLES = "results.csv", "rounds.csv"


def start(folder: Path, temporary: Path, sweep: Sequence[str] = SWEEP) -> subprocess.Popen[bytes]:
    """Start a sweep, with a temporary directory of its own by which its processes are known."""
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "fedbw_sweep", *sweep, f"hydra.sweep.dir={folder}"],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": root},
        stdout=(temporary / "output").open("ab"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def short_folder() -> Path:
    """Make a temporary directory whose name leaves room for those of Ray's sockets."""
    return Path(mkdtemp(prefix="k"))


_sessions: defaultdict[Path, set[int]] = defaultdict(set)
"""The sessions of a sweep's processes, by its temporary directory.

Ray's agents write their names over their environments, so that only their sessions tell.
"""


def living(temporary: Path) -> list[psutil.Process]:
    """Return the processes of a sweep."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                session = os.getsid(process.pid)
                processes.append((process, session))
                if process.environ().get("TMPDIR") == str(temporary):
                    _sessions[temporary].add(session)
    return [process for process, session in processes if session in _sessions[temporary]]


def victims(temporary: Path, kind: str) -> list[psutil.Process]:
    """Return the processes of one kind."""
    found = []
    for process in living(temporary):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline()) + process.name()
            kinds = [name for name, mark in VICTIMS.items() if mark in line]
            if kinds and kinds[0] == "nursery" and VICTIMS["nursery"] not in _parent_line(process):
                kinds = ["command"]
            if kinds[:1] == [kind]:
                found.append(process)
    return found


def _parent_line(process: psutil.Process) -> str:
    parent = process.parent()
    return "" if parent is None else " ".join(parent.cmdline())


def tables(folder: Path) -> dict[str, bytes]:
    """Return the content of the tables."""
    return {name: (folder / name).read_bytes() for name in TABLES}


def end(command: subprocess.Popen[bytes], temporary: Path, seconds: float) -> list[str]:
    """Wait for the end of a command and of all that it started; return what is wrong with it."""
    faults = []
    try:
        command.wait(seconds)
    except subprocess.TimeoutExpired:
        faults.append("the command hangs")
        command.kill()
    until = time.monotonic() + GONE_S
    while (left := living(temporary)) and time.monotonic() < until:
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            faults.append(f"left: {' '.join(process.cmdline())[:200]}")
            process.kill()
    return faults


def done(folder: Path) -> int:
    """Count the runs of a sweep that are done."""
    statuses = [json.loads(path.read_bytes()) for path in folder.glob("*/status.json")]
    return sum(status["status"] == "done" for status in statuses)


Said = dict[str, Any]
"""A line of a log: what was done, and under ``faults`` what is wrong."""


def read_log(log: Path) -> list[Said]:
    """Return what a log has."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def go_through(log: Path, count: int, do: Callable[[int], Said]) -> list[Said]:
    """Do the cases that a log lacks, a line for each; return what it has then."""
    said = read_log(log)
    for number in range(len(said), count):
        said.append(do(number))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said[-1]) + "\n")
        print(said[-1], flush=True)
    return said


def alone(place: Path) -> dict[str, bytes]:
    """Return the tables of a sweep that nobody disturbs."""
    temporary = short_folder()
    if start(place / "alone", temporary).wait() != 0:
        sys.exit((temporary / "output").read_text(encoding="utf-8"))
    shutil.rmtree(temporary)
    return tables(place / "alone")


def case(number: int, wanted: dict[str, bytes], lasts: float, place: Path) -> Said:
    """Kill once and start again; return what was done and what is wrong, if anything."""
    rng = random.Random(number)
    kind, how = rng.choice(list(VICTIMS)), rng.choice(SIGNALS)
    folder, temporary = place / f"sweep{number}", short_folder()
    said: Said = {"case": number, "victim": kind, "signal": how.name}
    said["output"] = str(temporary / "output")
    faults: list[str] = []
    first = start(folder, temporary)
    wait = rng.uniform(0, lasts) if kind == "command" else rng.uniform(0.2, 0.9) * lasts
    started = time.monotonic()
    while time.monotonic() - started < wait and first.poll() is None:
        time.sleep(0.05)
    while not (killed := victims(temporary, kind)) and first.poll() is None:
        time.sleep(0.05)
    said |= {"after": round(wait, 2), "there": len(killed)}
    for process in rng.sample(killed, min(1, len(killed))):
        try:
            process.send_signal(how)
        except psutil.NoSuchProcess:
            said["there"] = 0
    faults += end(first, temporary, 180)
    said |= {"code": first.returncode, "done": done(folder)}
    second = start(folder, temporary)
    faults += end(second, temporary, 300)
    said["again"] = second.returncode
    if said.get("again") != 0 or tables(folder) != wanted:
        faults.append("other tables")
    kept = {"output"}  # beside a cache of torch's
    names = {path.name for path in temporary.iterdir() if "torchinductor" not in path.name} - kept
    faults += [f"left in files: {', '.join(sorted(names))}"] if names else []
    hidden = [path.name for path in folder.glob(".*")] + [
        path.name for path in folder.glob("*/claim.*")
    ]
    faults += [f"left in the sweep: {', '.join(hidden)}"] if hidden else []
    if not faults:
        shutil.rmtree(folder)
        shutil.rmtree(temporary)
    return {**said, "faults": faults}


def main() -> int:
    """Go through the cases that the log lacks; return 1 if any of all found a fault."""
    log, cases = Path(sys.argv[1]), int((sys.argv[2:] or ["100"])[0])
    place, started = Path(mkdtemp(prefix="kills-")), time.monotonic()
    wanted = alone(place)
    lasts = time.monotonic() - started
    before = go_through(log, cases, lambda number: case(number, wanted, lasts, place))
    wrong = [said for said in before if said["faults"]]
    met = sum(said["there"] > 0 for said in before)
    print(f"{len(before)} cases, {met} met a process, {len(wrong)} with faults; kept in {place}")
    shutil.rmtree(place / "alone")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
