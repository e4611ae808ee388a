"""The folders of runs: which there are, and what is in one, checked as it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.check import HASHES, check_file, check_folder, check_id, id_of
from fedbw_sweep.records.files import LIMITS, inside, parse_settings, read_file
from fedbw_sweep.records.schema import CONFIG, STATUS
from fedbw_sweep.records.status import RUN_ID, id_of_folder, read_status

SHOWN = 5
"""Names of what is left alone that are given, at most."""


@dataclass(frozen=True)
class Run:
    """What was read of a run's folder.

    Attributes
    ----------
    folder : pathlib.Path
    status : dict or None
        What its ``status.json`` says, see `read_status`; None if it was announced alone.
    files : dict of str to bytes
        The content of the files that were asked for, those that it has.
    damage : str or None
        What of it is not what was written; then nothing else is told of it.
    """

    folder: Path
    status: Mapping[str, Any] | None
    files: Mapping[str, bytes] = field(default_factory=dict)
    damage: str | None = None

    @property
    def run_id(self) -> str:
        """The run that its folder is named after."""
        return id_of_folder(self.folder)

    @property
    def hashes(self) -> Mapping[str, str] | None:
        """Of its files, by name; None where there are none to check them by."""
        return None if self.status is None else self.status.get(HASHES)

    def science(self) -> dict[str, Any]:
        """Parse its ``config.yaml``, which is read now unless it was asked for.

        Raises
        ------
        DamagedError
            If it is not what was written, or the record is damaged otherwise and it is not what the
            folder is named after.
        FileNotFoundError
            If it is not there.
        """
        path = self.folder / CONFIG
        if self.damage is not None:
            science = parse_settings(path, read_file(path, LIMITS[CONFIG]))
            if id_of(path, science) != self.run_id:
                raise DamagedError(self.damage)
            return science
        data = self.files.get(CONFIG)
        if data is None:
            data = read_file(path, LIMITS[CONFIG])
            check_file(path, data, self.hashes)
        return parse_settings(path, data)


def read_run(folder: Path, names: Iterable[str]) -> Run:
    """Read some of the files of a run's folder.

    Raises
    ------
    ResultsError
        If another version wrote it, or it cannot be read.
    """
    try:
        status = read_status(folder)
        hashes = None if status is None else status.get(HASHES)
        files = {}
        for name in names:
            path, data = inside(folder, name), None
            with suppress(FileNotFoundError):
                files[name] = data = read_file(path, LIMITS[name])
            check_file(path, data, hashes)
    except DamagedError as error:
        return Run(folder, None, damage=str(error))
    return Run(folder, status, files)


def check_run(
    folder: Path, run_id: str | None = None, *, whole: bool = True
) -> dict[str, Any] | None:
    """Check everything in a run's folder; return its status, None if it was announced alone.

    Parameters
    ----------
    folder, run_id
        See `read_status`.
    whole : bool
        Whether to make its id anew as well.

    Raises
    ------
    DamagedError
        Naming what is not what was written.
    """
    status = read_status(folder, run_id)
    if status is not None:
        check_folder(folder, status.get(HASHES))
        if whole:
            check_id(folder, status)
    return status


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has an id for a name, and a status or some config."""
    if not RUN_ID.fullmatch(folder.name):
        return False
    if os.access(inside(folder, STATUS), os.F_OK):
        return True
    with suppress(OSError):
        return (folder / CONFIG).lstat().st_size > 0
    return False


def runs_in(folder: Path, names: Iterable[str] | None = None) -> tuple[list[Path], list[Path]]:
    """Return the runs' folders in a folder, and those that look like one and are none.

    The latter are copies such as ``<run_id>.bak``, links to folders, and folders of configs: they
    are left alone.

    Parameters
    ----------
    folder : pathlib.Path
    names : iterable of str, optional
        The folders in it, where they are known already.
    """
    with os.scandir(folder) as entries:
        listed = {entry.name: entry.is_symlink() for entry in entries if entry.is_dir()}
    runs, others = [], []
    for name in sorted(listed if names is None else names):
        path = folder / name
        if name.startswith("."):
            continue
        if listed.get(name, True):
            others.append(path)
        elif is_run(path):
            runs.append(path)
        elif (path / STATUS).exists() or (path / CONFIG).exists():
            others.append(path)
    return runs, others


def left_alone(folders: Iterable[Path]) -> list[str]:
    """Say in one line which folders look like runs' and are none."""
    names = [str(folder) for folder in folders]
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"left alone, being no run's own folder: {', '.join(names[:SHOWN])}{more}"]
