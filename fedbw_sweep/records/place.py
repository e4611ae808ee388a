"""Whole files and folders put in their place by renaming, so that nobody sees half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from fedbw_sweep.errors import ResultsError

ASIDE = ".damaged"
"""Ends the name of a folder that was set aside; more of one run are numbered."""

TRIES = 100
"""How often a folder is put in its place while others put one there."""

_TAKEN = errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR

LEFT_S = 3600.0
"""Seconds since a hidden file of another host was changed, after which nobody writes it."""

_HIDDEN = re.compile(r"\.(?P<what>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")

_HIDDEN_BEFORE = re.compile(r"\.(results|rounds)\.csv\.\d+|\.[0-9a-f]{12}-\w{8}")
"""Names that earlier versions gave."""


@cache
def host() -> str:
    """Name what a process id is one of: the machine since its start, and the container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def hidden(path: Path) -> Path:
    """Return a name beside `path` that is nobody else's and says whose it is."""
    return path.with_name(f".{path.name}.{host()}-{os.getpid()}-{secrets.token_hex(4)}")


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it there."""
    temporary = hidden(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(
    place: Path,
    files: Mapping[str, bytes],
    keeps: Callable[[Path], bool] = lambda there: False,
    carried: str | None = None,
) -> bool:
    """Write a folder beside its place and rename it there.

    What is in its place already is renamed first, so that of several processes each finds either
    the old folder or a new one.

    Parameters
    ----------
    place : pathlib.Path
    files : mapping of str to bytes
        Written in this order.
    keeps : callable
        Whether a folder that is in its place stays instead.
    carried : str, optional
        A folder in the one in its place that the new one is to have as well.

    Returns
    -------
    bool
        Whether it was put there.
    """
    folder = hidden(place)
    try:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if carried is not None and (place / carried).is_dir():
            shutil.copytree(place / carried, folder / carried, copy_function=_link)
        for _ in range(TRIES):
            if os.path.lexists(place):  # an empty folder would be replaced, a full one is not
                if keeps(place):
                    return False
                _move_away(place, keeps)
            try:
                folder.rename(place)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            else:
                return True
        raise ResultsError(f"{place} cannot be written: others write there all the time")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Give a file another name, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _move_away(place: Path, keeps: Callable[[Path], bool]) -> None:
    """Remove a folder, unless another process has just put there what stays."""
    taken = hidden(place)
    try:
        place.rename(taken)
    except FileNotFoundError:
        return
    if keeps(taken):
        with suppress(OSError):  # there is one again
            taken.rename(place)
            return
    shutil.rmtree(taken, ignore_errors=True)


def set_aside(folder: Path) -> Path | None:
    """Rename a damaged record, which is never deleted; return where it is now."""
    number = 1
    while True:
        place = folder.with_name(folder.name + ASIDE + (f"-{number}" if number > 1 else ""))
        number += 1
        if os.path.lexists(place):
            continue
        try:
            folder.rename(place)
        except FileNotFoundError:  # another process has done it
            return None
        except OSError as error:
            if os.path.lexists(place):
                continue
            raise ResultsError(f"{folder} cannot be set aside: {error.strerror}") from None
        return place


def leftovers(sweep_dir: Path, at: float) -> list[Path]:
    """Return what processes that are gone were writing.

    Parameters
    ----------
    sweep_dir : pathlib.Path
    at : float
        The time in seconds, by the file system's clock; see `clock`.
    """
    found = []
    for path in sweep_dir.glob(".*"):
        ours, before = _HIDDEN.fullmatch(path.name), _HIDDEN_BEFORE.fullmatch(path.name)
        with suppress(OSError):
            if ours and ours["host"] == host():
                left = not psutil.pid_exists(int(ours["pid"]))
            else:
                left = bool(ours or before) and at - path.lstat().st_mtime > LEFT_S
            if left:
                found.append(path)
    return found


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, unless another process just has."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def clock(folder: Path) -> float:
    """Return the time in seconds by the clock of a folder's file system."""
    probe = hidden(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def now(folder: Path) -> float:
    """Return what `clock` does, or the machine's own time where nothing can be written."""
    try:
        return clock(folder)
    except OSError:
        return time.time()
