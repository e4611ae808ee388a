"""What a sweep's folder weighs, and what in it nobody needs any more."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from fedbw_sweep.records.claims import claimed_by
from fedbw_sweep.records.folder import is_run
from fedbw_sweep.records.place import ASIDE, leftovers, now
from fedbw_sweep.records.schema import CHECKPOINT
from fedbw_sweep.records.status import RUN_ID

_ASIDE = re.compile(rf"{RUN_ID.pattern}{re.escape(ASIDE)}(-\d+)?")

OTHER = "other files"

SET_ASIDE = "records that were set aside"

LEFT = "what commands that are gone left half-written"


def files_in(path: Path) -> Iterator[os.stat_result]:
    """Yield what a file, or each file in a folder, is; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        yield path.lstat()
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name).lstat()


def weigh(sweep_dir: Path) -> pd.DataFrame:
    """Say what the files of a sweep weigh.

    Returns
    -------
    pandas.DataFrame
        A row for each kind of file, ``what``, ``files`` and ``bytes``, the heaviest first.
    """
    rows = []
    gone = leftovers(sweep_dir, now(sweep_dir))
    for path in sweep_dir.iterdir():
        if path.is_dir() and not path.is_symlink() and is_run(path):
            rows += [
                (f"<run_id>/{own.name}", stat.st_size)
                for own in path.iterdir()
                for stat in files_in(own)
            ]
            continue
        what = path.name if path.is_file() else OTHER
        if path in gone:
            what = LEFT
        elif is_set_aside(path):
            what = SET_ASIDE
        rows += [(what, stat.st_size) for stat in files_in(path)]
    weights = pd.DataFrame(rows, columns=["what", "bytes"]).groupby("what")["bytes"]
    table = weights.agg(files="count", bytes="sum").reset_index()
    return table.sort_values(["bytes", "what"], ascending=[False, True], ignore_index=True)


def set_aside_in(sweep_dir: Path) -> list[Path]:
    """Return the records in a sweep's folder that were damaged and set aside."""
    return sorted(path for path in sweep_dir.glob(f"*{ASIDE}*") if is_set_aside(path))


def checkpoints_in(sweep_dir: Path) -> list[Path]:
    """Return the checkpoints of runs in a sweep's folder that no process does."""
    found = (folder / CHECKPOINT for folder in sweep_dir.iterdir() if is_run(folder))
    return sorted(path for path in found if path.is_dir() and claimed_by(path.parent) is None)


def is_set_aside(path: Path) -> bool:
    """Whether a folder is a record that was set aside, by its name."""
    return bool(_ASIDE.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
