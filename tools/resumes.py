"""Kill one sweep again and again: ``python -m tools.resumes LOG [KILLS]``.

A sweep of 12 runs is started, disturbed at a random moment, and started again, until it was
disturbed so often; then it is left to end. Its command, a worker or a process of Ray's is killed
with SIGKILL, or the command is told to end with SIGTERM, or the disk is full for a while (where a
small disk can be mounted). A command that survives that is told to end a little later. In the end
the tables must be those of a sweep that was left alone, byte for byte; no process may be left 20
seconds after a command has ended, and at last nothing in the temporary directory or in shared
memory. LOG gets a line per kill; started again with the same LOG, the storm goes on with the same
sweep.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tools.kills import Said, done, end, go_through, short_folder, start, tables, victims

SWEEP = (
    "-m", "model=tiny", "num_clients=8", "fraction_fit=0.5", "rounds=16,32", "local_steps=12",
    "clients.dropout=0.2", "data.heldout_tokens=2048", "compression=none,topk,lowrank_ecsq",
    "compression@downlink=none,topk", "records.retry_s=60",
)  # fmt: skip

DISTURBANCES = [
    ("command", signal.SIGKILL), ("command", signal.SIGTERM), ("worker", signal.SIGKILL),
    ("raylet", signal.SIGKILL), ("gcs", signal.SIGKILL), ("disk", None),
]  # fmt: skip

DISK_MB, FULL_S = 1500, 8.0
"""The size of the small disk, and for how long it is full."""

LONGEST_S = 30.0
"""After how long a sweep is disturbed at the latest, counted from its start."""


def small_disk(folder: Path) -> bool:
    """Mount a small disk in a folder; return whether that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(folder):
        return True
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(folder)]
    return subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0


def fill(folder: Path) -> None:
    """Leave no room on a disk for a while."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            time.sleep(FULL_S)
    ballast.unlink()


def shared_memory() -> set[str]:
    """Name what is in shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def disturb(number: int, place: Path, temporary: Path) -> Said:
    """Start the sweep, disturb it, and wait for its end, or for what a full disk does to it."""
    rng = random.Random(number)
    kind, how = rng.choice(DISTURBANCES)
    wait = rng.uniform(4, LONGEST_S)
    command = start(place / "sweep", temporary, SWEEP)
    said: Said = {"kill": number, "victim": kind, "after": round(wait, 2)}
    started = time.monotonic()
    while time.monotonic() - started < wait and command.poll() is None:
        time.sleep(0.05)
    if kind == "disk":
        fill(place)
    else:
        assert how is not None
        killed = victims(temporary, kind)
        said |= {"signal": how.name, "there": len(killed)}
        for process in killed[:1]:
            process.send_signal(how)
    with suppress(subprocess.TimeoutExpired):
        command.wait(rng.uniform(2, 10) if kind in ("disk", "worker") else 120)
    if command.poll() is None:
        said["survived"] = True
        command.send_signal(signal.SIGTERM)
    faults = end(command, temporary, 60)
    return {**said, "code": command.returncode, "done": done(place / "sweep"), "faults": faults}


def main() -> int:
    """Disturb the sweep as often as the log lacks; return 1 if anything is not as it must be."""
    log, kills = Path(sys.argv[1]).resolve(), int((sys.argv[2:] or ["30"])[0])
    place = log.with_suffix(".d")
    on_small_disk = small_disk(place)
    shared, temporary = shared_memory(), short_folder()
    before = go_through(log, kills, lambda number: disturb(number, place, temporary))
    wrong = [fault for said in before for fault in said["faults"]]
    for name in ("sweep", "alone"):
        if start(place / name, temporary, SWEEP).wait() != 0:
            wrong.append(f"{name} fails: {temporary / 'output'}")
    if tables(place / "sweep") != tables(place / "alone"):
        wrong.append("other tables")
    files = {path.name for path in temporary.iterdir() if "torchinductor" not in path.name}
    wrong += [f"left in files: {name}" for name in sorted(files - {"output"})]
    wrong += [f"left in shared memory: {name}" for name in sorted(shared_memory() - shared)]
    wrong += [f"left in the sweep: {path}" for path in (place / "sweep").glob(".*")]
    disk = "" if on_small_disk else " (no small disk could be mounted: it was never full)"
    print(f"{len(before)} disturbances{disk}, wrong: {wrong or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
