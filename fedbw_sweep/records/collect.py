"""A sweep's own tables, rebuilt from its run folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedbw_sweep.config.defaults import with_defaults
from fedbw_sweep.config.identity import RECORD_FORMAT, config_columns
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.records.schema import (
    AXES,
    CONFIG,
    NEVER_RECORDED,
    OF_STATUS,
    RESULTS,
    RESULTS_COLUMNS,
    ROUNDS,
    ROUNDS_COLUMNS,
)
from fedbw_sweep.records.tables import load_alike
from fedbw_sweep.records.write import read_status


def collect(sweep_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rebuild a sweep's ``results.csv`` and ``rounds.csv`` from its run folders.

    Returns
    -------
    results : pandas.DataFrame
        A row per run: its configuration, then `RESULTS_COLUMNS`; ordered by the axes and the seed.
        Runs that were announced and not recorded yet are ``missing``.
    rounds : pandas.DataFrame
        A row per run and round, `ROUNDS_COLUMNS`, the runs in the same order.
    """
    rows, folders = [], {}
    for folder in sorted(sweep_dir.iterdir()):
        if folder.name.startswith(".") or not (folder / CONFIG).exists():
            continue
        status = read_status(folder) or {
            "run_id": folder.name,
            "status": "missing",
            "reason": NEVER_RECORDED,
            "schema_version": RECORD_FORMAT,
            "summary": {},
        }
        science = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), yaml.CSafeLoader)
        own = {key: status.get(key) for key in OF_STATUS}
        columns = config_columns(with_defaults(rename_settings(science)))
        rows.append({**columns, **status["summary"], **own})
        folders[folder.name] = folder

    names = dict.fromkeys(name for row in rows for name in row if name not in RESULTS_COLUMNS)
    settings = [*AXES, "seed", *sorted(set(names) - {*AXES, "seed"})]
    results = pd.DataFrame(rows, columns=[*settings, *RESULTS_COLUMNS], dtype=object)
    whole = [name for name in settings if _is_whole(results[name])]
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    results = results.astype({**dtypes, **dict.fromkeys(whole, "Int64")})
    results = results.sort_values([*AXES, "seed", "run_id"], ignore_index=True)
    of_round = {name: column for name, column in ROUNDS_COLUMNS.items() if name != "run_id"}
    rounds = load_alike(folders, ROUNDS, of_round, [])
    place = rounds["run_id"].map({run: place for place, run in enumerate(results["run_id"])})
    rounds = rounds.loc[place.sort_values(kind="stable").index].reset_index(drop=True)
    _write_atomically(results, sweep_dir / RESULTS)
    _write_atomically(rounds, sweep_dir / ROUNDS)
    return results, rounds


def _is_whole(values: Iterable[Any]) -> bool:
    present = [value for value in values if not pd.isna(value)]
    return bool(present) and all(
        isinstance(value, int) and not isinstance(value, bool) for value in present
    )


def _write_atomically(table: pd.DataFrame, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table.to_csv(temporary, index=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
