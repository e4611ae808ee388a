"""A sweep's own tables, rebuilt from its run folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fedbw_sweep.config.identity import RECORD_FORMAT
from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.check import write_sums
from fedbw_sweep.records.find import columns_of
from fedbw_sweep.records.folder import left_alone, read_run, runs_in
from fedbw_sweep.records.place import write_file
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
from fedbw_sweep.records.tables import count_as_missing, load_alike


def collect(sweep_dir: Path, notes: list[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rebuild a sweep's ``results.csv`` and ``rounds.csv`` from its run folders.

    Parameters
    ----------
    sweep_dir : pathlib.Path
    notes : list of str, optional
        What is damaged, so that its run is missing, and what was left alone is added.

    Returns
    -------
    results : pandas.DataFrame
        A row per run: its configuration, then `RESULTS_COLUMNS`; ordered by the axes and the seed.
        Runs that were announced and not recorded yet are ``missing``.
    rounds : pandas.DataFrame
        A row per run and round, `ROUNDS_COLUMNS`, the runs in the same order.
    """
    runs, others = runs_in(sweep_dir)
    notes = [] if notes is None else notes
    notes += left_alone(others)
    rows, read = [], {}
    for folder in runs:
        run = read_run(folder, [ROUNDS, CONFIG])
        columns, damage = {}, run.damage
        try:
            columns = columns_of(run.science())
        except (DamagedError, FileNotFoundError) as error:
            damage = damage or str(error)
        if damage is not None or run.status is None:
            notes += [damage] if damage else []
            own = {"run_id": folder.name, "status": "missing", "schema_version": RECORD_FORMAT}
            rows.append({**columns, **own, "reason": damage or NEVER_RECORDED})
            continue
        own = {key: run.status.get(key) for key in OF_STATUS}
        rows.append({**columns, **(run.status.get("summary") or {}), **own})
        read[folder.name] = run

    names = dict.fromkeys(name for row in rows for name in row if name not in RESULTS_COLUMNS)
    settings = [*AXES, "seed", *sorted(set(names) - {*AXES, "seed"})]
    results = pd.DataFrame(rows, columns=[*settings, *RESULTS_COLUMNS], dtype=object)
    whole = [name for name in settings if _is_whole(results[name])]
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    results = results.astype({**dtypes, **dict.fromkeys(whole, "Int64")})
    results = results.sort_values(
        [*AXES, "seed", "run_id"],
        ignore_index=True,
        key=_sortable,
    )
    of_round = {name: column for name, column in ROUNDS_COLUMNS.items() if name != "run_id"}
    damaged: dict[str, str] = {}
    rounds = load_alike(read, ROUNDS, of_round, notes, damaged)
    notes += damaged.values()
    count_as_missing(results, damaged)
    place = rounds["run_id"].map({run: place for place, run in enumerate(results["run_id"])})
    rounds = rounds.loc[place.sort_values(kind="stable").index].reset_index(drop=True)
    tables = {RESULTS: _csv(results), ROUNDS: _csv(rounds)}
    for name, data in tables.items():
        write_file(sweep_dir / name, data)
    write_sums(sweep_dir, tables)
    return results, rounds


def _sortable(values: pd.Series) -> pd.Series:
    """Let lists, which a stranger may put where a number belongs, be sorted too."""
    if values.dtype != object:
        return values
    return values.map(lambda value: str(value) if isinstance(value, list) else value)


def _is_whole(values: Iterable[Any]) -> bool:
    present = [value for value in values if not pd.isna(value)]
    return bool(present) and all(
        isinstance(value, int) and not isinstance(value, bool) for value in present
    )


def _csv(table: pd.DataFrame) -> bytes:
    text: str = table.to_csv(index=False)
    return text.encode()
