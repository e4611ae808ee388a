"""Who does a run: claims, which end with their process or when they are no longer renewed.

A claim is a file in the run's folder, ``claim.<number>.json``. The one of the highest number is in
force; who finds it dead creates the next one, which of several processes one alone can. Nothing but
the creation of a file that must not exist is relied on, so that any shared file system will do.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.files import parse_json, read_file
from fedbw_sweep.records.place import host, now

BEATS = 4
"""Beats in the time after which a claim without one is dead on other hosts."""

UNREADABLE_S = 120.0
"""This time for a claim that cannot be read: it is being written, or its writer was killed."""

AWAY_S = 1.0
"""For how long a run's folder may be away while its record takes its place, at most."""

JOB_IDS = "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"
"""Variables in which schedulers of clusters give a process the id of its job."""

_NAME = re.compile(r"claim\.(\d{1,9})\.json")

_LIMIT = 2**12


@dataclass(frozen=True)
class Claim:
    """A claim of this process's; `path` is its file."""

    path: Path

    def beat(self) -> bool:
        """Renew the claim; return whether it is still in force."""
        with suppress(OSError):
            if _latest(self.path.parent) == self.path:
                os.utime(self.path)
                return True
        return False

    def release(self) -> None:
        """End the claim. A finished run's folder has taken its place already."""
        with suppress(OSError):
            self.path.unlink()


def claim(folder: Path, stale_s: float) -> Claim | None:
    """Claim a run for this process.

    Whether the run is done must be asked once it is claimed: another process may have done it in
    the meantime.

    Parameters
    ----------
    folder : pathlib.Path
        The run's; it is created if it is not there.
    stale_s : float
        Seconds without a beat, by the file system's clock, after which the claim is dead on other
        hosts. On its own host it ends with its process.

    Returns
    -------
    Claim or None
        None if another process does the run.

    Raises
    ------
    OSError
        If nothing can be written there.
    """
    me = psutil.Process()
    said = {
        "host": host(), "name": socket.gethostname(), "pid": me.pid, "started": me.create_time(),
        "job": next((os.environ[name] for name in JOB_IDS if name in os.environ), None),
        "stale_s": stale_s,
    }  # fmt: skip
    until = time.monotonic() + AWAY_S
    while not folder.exists() and time.monotonic() < until:
        time.sleep(AWAY_S / 10)
    while True:
        folder.mkdir(exist_ok=True)
        latest = _latest(folder)
        if latest is not None and _is_alive(latest):
            return None
        number = 0 if latest is None else int(latest.name.split(".")[1])
        path = folder / f"claim.{number + 1}.json"
        try:
            opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):  # another process was faster
            continue
        try:
            os.write(opened, json.dumps(said).encode())
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(opened)
        return Claim(path)


@contextmanager
def claimed(folder: Path, stale_s: float) -> Iterator[Claim | None]:
    """Hold a claim in the block, see `claim`, and renew it; None if another process has one."""
    own = claim(folder, stale_s)
    if own is None:
        yield None
        return
    over = Event()

    def renew() -> None:
        while not over.wait(stale_s / BEATS):
            own.beat()

    thread = Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield own
    finally:
        over.set()
        thread.join()
        own.release()


def claimed_by(folder: Path) -> str | None:
    """Say who does a run: ``process 7 on host``; None if nobody does."""
    latest = _latest(folder)
    if latest is None or not _is_alive(latest):
        return None
    with suppress(DamagedError, FileNotFoundError):
        said = parse_json(latest, read_file(latest, _LIMIT))
        job = f", job {said['job']}" if said.get("job") else ""
        return f"process {said.get('pid')} on {said.get('name')}{job}"
    return "another process"


def _latest(folder: Path) -> Path | None:
    with suppress(FileNotFoundError):
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        if found:
            return max(found, key=lambda path: int(path.name.split(".")[1]))
    return None


def _is_alive(path: Path) -> bool:
    try:
        beat = path.stat().st_mtime
        said = parse_json(path, read_file(path, _LIMIT))
    except FileNotFoundError:
        return False
    except DamagedError:
        said = {}
    if said.get("host") != host():
        stale_s = said.get("stale_s")
        return now(path.parent) - beat <= (
            stale_s if isinstance(stale_s, int | float) else UNREADABLE_S
        )
    with suppress(psutil.NoSuchProcess, TypeError, ValueError):
        return bool(abs(psutil.Process(said.get("pid")).create_time() - said["started"]) < 1)
    return False
