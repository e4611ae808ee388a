"""Kill processes of sweeps at random moments: ``python tools/kills.py LOG [CASES]``.

Each case starts a small sweep, kills its command, a worker or a process of Ray's with SIGKILL,
SIGTERM or SIGHUP, and starts the same command again. Then its tables must be those of a sweep that
was left alone, byte for byte; no process may be left 20 seconds after the kill, and nothing of ours
under the temporary directory after the second command. LOG gets a line per case; started again with
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
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import psutil

SWEEP = (
    "-m", "model=tiny", "num_clients=4", "fraction_fit=0.5", "rounds=4", "local_steps=8",
    "data.heldout_tokens=256", "compression=none,topk,int8", "compression@downlink=none,topk",
)  # fmt: skip

VICTIMS = {
    "command": "-m fedbw_sweep -m",
    "worker": "ray::",
    "raylet": "/raylet/raylet",
    "gcs": "gcs_server",
    "node": "fedbw_sweep.backends.ray.node",
    "nursery": "nursery.py",
    "agent": "agent",
}
"""What the command lines of processes hold, by what they are."""

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


def living(temporary: Path) -> list[psutil.Process]:
    """Return the processes of a sweep."""
    found = []
    for process in psutil.process_iter():
        try:
            own = process.environ().get("TMPDIR") == str(temporary)
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def victims(temporary: Path, kind: str) -> list[psutil.Process]:
    """Return the processes of one kind."""
    found = []
    for process in living(temporary):
        try:
            line = " ".join(process.cmdline()) + process.name()
        except psutil.Error:
            continue
        own = {name for name, mark in VICTIMS.items() if mark in line}
        if kind in own and (kind != "agent" or own == {"agent"}):
            found.append(process)
    return found


def tables(folder: Path) -> dict[str, bytes]:
    """Return the content of the tables."""
    return {name: (folder / name).read_bytes() for name in TABLES}


def case(number: int, wanted: dict[str, bytes], lasts: float, place: Path) -> dict[str, object]:
    """Kill once and start again; return what was done and what is wrong, if anything."""
    rng = random.Random(number)
    kind, how = rng.choice(list(VICTIMS)), rng.choice(SIGNALS)
    folder, temporary = place / f"sweep{number}", short_folder()
    said: dict[str, object] = {"case": number, "victim": kind, "signal": how.name}
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
    try:
        said["code"] = first.wait(180)
    except subprocess.TimeoutExpired:
        faults.append("the command hangs")
        first.kill()
    until = time.monotonic() + GONE_S
    while (left := living(temporary)) and time.monotonic() < until:
        time.sleep(0.2)
    faults += [f"left: {' '.join(process.cmdline())[:200]}" for process in left]
    for process in left:
        process.kill()
    said["done"] = sum(
        json.loads(path.read_bytes())["status"] == "done" for path in folder.glob("*/status.json")
    )
    second = start(folder, temporary)
    try:
        said["again"] = second.wait(300)
    except subprocess.TimeoutExpired:
        faults.append("the second command hangs")
        second.kill()
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
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    before = [json.loads(line) for line in lines]
    place = Path(mkdtemp(prefix="kills-"))
    started, temporary = time.monotonic(), short_folder()
    if start(place / "alone", temporary).wait() != 0:
        sys.exit((temporary / "output").read_text(encoding="utf-8"))
    lasts, wanted = time.monotonic() - started, tables(place / "alone")
    shutil.rmtree(temporary)
    for number in range(len(before), cases):
        said = case(number, wanted, lasts, place)
        before.append(said)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")
        print(said, flush=True)
    wrong = [said for said in before if said["faults"]]
    met = sum(said["there"] > 0 for said in before)
    print(f"{len(before)} cases, {met} met a process, {len(wrong)} with faults; kept in {place}")
    shutil.rmtree(place / "alone")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
