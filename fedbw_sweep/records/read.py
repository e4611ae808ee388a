"""Records of any number of places -> typed tables, each run once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedbw_sweep.config.renames import rename_columns
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.check import digest, read_sums
from fedbw_sweep.records.compare import OF_PREDICTION, Tolerance
from fedbw_sweep.records.files import TABLE_LIMIT, read_file
from fedbw_sweep.records.find import Configs, find_records, read_settings
from fedbw_sweep.records.folder import Run, read_run
from fedbw_sweep.records.labels import mixed
from fedbw_sweep.records.schema import (
    AXES,
    FORMAT_2,
    MACHINE,
    MESSAGES,
    NEVER_RECORDED,
    OF_STATUS,
    PARTS,
    PARTS_COLUMNS,
    READ,
    RESULTS_AND_SOURCE,
    RESULTS_COLUMNS,
    ROUNDS,
    STATES,
    TIMING,
    TIMING_COLUMNS,
)
from fedbw_sweep.records.status import RUN_ID, end_in_format_2
from fedbw_sweep.records.tables import (
    count_as_missing,
    load_alike,
    load_messages,
    load_rounds,
    parse_csv,
    whole_lines,
)


@dataclass(frozen=True)
class Records:
    """What was read from any number of places, each run once.

    Attributes
    ----------
    results : pandas.DataFrame
        A row per run: its configuration, `RESULTS_COLUMNS`, then ``source``, where it was read.
        Settings that are whole numbers in every run are Int64, other numbers Float64, truth values
        boolean, all else string.
    rounds : pandas.DataFrame
        A row per run and round, `ROUNDS_COLUMNS`.
    messages : pandas.DataFrame
        A row per message: ``run_id``, then `MESSAGES_COLUMNS`. None of runs known only from a CSV.
    timing : pandas.DataFrame
        Wall-clock seconds of each run's rounds: ``run_id``, then `TIMING_COLUMNS`; as `messages`.
    parts : pandas.DataFrame
        Where the bytes of each run's last round are: ``run_id``, then `PARTS_COLUMNS`. None of runs
        known only from a CSV, or recorded before there was ``parts.csv``.
    configs : mapping of str to dict
        The science config of each run that has a folder, by ``run_id``, as in ``config.yaml``.
    environments : dict of str to dict
        Versions and execution settings of each run that has a folder, by ``run_id``.
    notes : list of str
        What was odd but tolerated.
    """

    results: pd.DataFrame
    rounds: pd.DataFrame
    messages: pd.DataFrame
    timing: pd.DataFrame
    parts: pd.DataFrame
    configs: Mapping[str, Mapping[str, Any]]
    environments: Mapping[str, Mapping[str, Any]]
    notes: list[str]


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Return the results of every run found in `paths`; see `load_records`."""
    return load_records(paths, messages=False).results


def load_records(paths: str | Path | Iterable[str | Path], *, messages: bool = True) -> Records:
    """Read runs from run folders, sweep folders, any folder above them, and ``results.csv`` files.

    A run recorded in several places is taken once, a run folder before a CSV and a finished run
    before a failed one. A folder without ``status.json`` is a run of status ``missing``.

    Parameters
    ----------
    paths : path or iterable of paths
        Where to look. The rounds of a run known only from a CSV are in the file beside it whose
        name says ``rounds`` for ``results``.
    messages : bool
        Whether to read every run's ``messages.parquet`` as well, the largest of the files, and
        ``timing.csv``.

    Raises
    ------
    ResultsError
        If a path does not exist or holds no run, a file was written by another schema version or
        not by this program, or one run is recorded with different numbers in two places.
    """
    notes: list[str] = []
    damaged: dict[str, str] = {}
    folders, tables = find_records([paths] if isinstance(paths, str | Path) else paths, notes)
    names = (ROUNDS, PARTS, MESSAGES, TIMING) if messages else (ROUNDS, PARTS)
    runs, own = {}, []
    for folder in folders:
        row, runs[str(folder)] = _read_run(folder, names, notes)
        own.append(row)
    # The folder of a run with hashes counts before the table that was made of it.
    above = {path: path.resolve() for path in {folder.parent for folder in folders}}
    counts: dict[Path, set[str]] = {path: set() for path in above.values()}
    for run in runs.values():
        if run.damage is not None or run.hashes is not None:
            counts[above[run.folder.parent]].add(run.run_id)
    hashed = set[str]().union(*counts.values())
    found, of_settings = [], []
    for table in tables:
        try:
            rows, checked = _read_csv_runs(table, notes)
        except ResultsError as error:
            if table.parent.resolve() not in counts:
                raise
            notes.append(f"{error}; read the run folders beside it instead")
            continue
        known = rows["run_id"].isin(counts.get(table.parent.resolve(), set()))
        found.append(rows[~known])
        of_settings.append(rows[(known & checked) | ~rows["run_id"].isin(hashed)])
    rows = pd.concat([_results_frame(own), *(f[RESULTS_AND_SOURCE] for f in found)])
    results, unlike = _each_run_once(rows.reset_index(drop=True), notes)
    if results.empty:
        raise ResultsError(f"{', '.join(map(str, [*folders, *tables]))}: holds no whole run")
    places = [(row["run_id"], row["source"]) for row in reversed(own)]
    places += results[["run_id", "source"]].itertuples(index=False)
    of_run = {name: runs[source] for name, source in places if source in runs}
    counted = {name: of_run[name] for name in results["run_id"] if name in of_run}
    configs = Configs(of_run)
    settings, unknown = read_settings(results["run_id"], of_settings, configs)
    for name, why in unknown.items():
        if name not in of_run or of_run[name].damage is None:
            damaged[name] = f"run {name}: its settings are unknown: {why}"
    elsewhere = _finished_elsewhere(found, folders, results, unlike)
    read = {
        "rounds": load_rounds(counted, elsewhere, notes, damaged),
        "messages": load_messages(counted, damaged),
        "timing": load_alike(counted, TIMING, TIMING_COLUMNS, notes, damaged),
        "parts": load_alike(counted, PARTS, PARTS_COLUMNS, notes, damaged),
    }
    if damaged:
        notes += damaged.values()
        count_as_missing(results, damaged)
        read = {name: table[~table["run_id"].isin(damaged)] for name, table in read.items()}
    notes += _unchecked(results, counted)
    results = pd.concat([settings, results], axis=1)
    results = results.sort_values([*AXES, "seed", "run_id"], ignore_index=True)
    notes += mixed(results)
    environments = {
        name: run.status.get("environment") or {}
        for name, run in of_run.items()
        if run.status is not None
    }
    return Records(results, **read, configs=configs, environments=environments, notes=notes)


def _unchecked(results: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """Say in one line how many runs there is nothing to check by."""
    recorded = results.loc[results["status"] != "missing", "run_id"]
    count = sum(run not in runs or runs[run].hashes is None for run in recorded)
    if not count:
        return []
    return [
        f"{count} of {len(recorded)} runs are unchecked: they were recorded without hashes, or are "
        "known from a table alone"
    ]


def _read_run(folder: Path, names: Iterable[str], notes: list[str]) -> tuple[dict[str, Any], Run]:
    """Return a run folder's row of results, and what was read of it."""
    run, source = read_run(folder, names), str(folder)
    if run.status is None:
        notes += [run.damage] if run.damage else []
        reason = run.damage or f"{NEVER_RECORDED}, or delete {folder}"
        row = {"run_id": run.run_id, "status": "missing", "reason": reason, "source": source}
        return row, run
    own = {key: run.status.get(key) for key in OF_STATUS}
    summary = run.status.get("summary") or {}
    known = {name: value for name, value in summary.items() if name in RESULTS_COLUMNS}
    return {**known, **own, "source": source}, run


def _results_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=RESULTS_AND_SOURCE, dtype=object)
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    return table.astype({**dtypes, "source": "string"})


def _read_csv_runs(path: Path, notes: list[str]) -> tuple[pd.DataFrame, bool]:
    """Read a table of results, its settings first, and say whether it is as it was written."""
    data = read_file(path, TABLE_LIMIT, follow=True)
    table = parse_csv(path, whole_lines(path, data, notes), RESULTS_COLUMNS)
    old = table["schema_version"] == FORMAT_2
    if old.any():
        table = rename_columns(table)
        table["reason"] = table["reason"].where(~old, table.pop("error"))
        rows = table.loc[old, ["status", "reason"]].astype(object).itertuples(index=False)
        table.loc[old, "end"] = [end_in_format_2(*row) for row in rows]
        table.loc[old, "numerics"] = FORMAT_2
    if lacking := [name for name in [*AXES, "seed"] if name not in table]:
        raise ResultsError(f"{path} has no column {', '.join(lacking)}: its runs are unknown")
    if table["run_id"].isna().any():
        raise ResultsError(f"{path} has a run without run_id")
    if not (named := table["run_id"].str.fullmatch(RUN_ID.pattern)).all():
        name = table.loc[~named, "run_id"].iloc[0]
        raise ResultsError(f"{path} has the run_id {name}, which is not twelve hexadecimal digits")
    if not set(table["status"]) <= set(STATES):
        raise ResultsError(f"{path} has a run whose status is none of {', '.join(STATES)}")
    versions = set(table["schema_version"].dropna()) | (
        {None} if table["schema_version"].isna().any() else set()
    )
    if versions - set(READ):
        listed = ", ".join(sorted(map(str, versions)))
        raise ResultsError(
            f"{path} has rows of schema version {listed}, this version reads "
            f"{' and '.join(map(str, READ))}; "
            "leave the others out or run them again"
        )
    again = int(table.duplicated().sum())
    if again:
        notes.append(f"{path}: {again} row(s) stand there twice; each counts once")
    table = table.drop_duplicates(ignore_index=True).assign(source=str(path))
    return table, digest(data) == read_sums(path.parent).get(path.name)


def _each_run_once(rows: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, set[str]]:
    """Keep the best record of each run, and name the runs that unlike machines have done.

    Of those, numbers may differ within a `Tolerance`; of all others, not at all.

    Raises
    ------
    ResultsError
        If a run was finished twice with different numbers.
    """
    rank = rows["status"].map({"done": 0, "failed": 1}).fillna(2)
    rows = rows.iloc[rank.argsort(kind="stable")]
    again = rows.duplicated("run_id")
    first = rows[~again].set_index("run_id")
    other = rows[again & (rows["status"] == "done")]
    kept = first.loc[other["run_id"]].reset_index()
    other = other.reset_index(drop=True)
    machines = [(kept[name] != other[name]).fillna(False) for name in MACHINE]
    unlike = pd.concat(machines, axis=1).any(axis=1)
    for name in [name for name in RESULTS_COLUMNS if name not in MACHINE]:
        lacking = other[name].isna(), kept[name].isna()
        equal = (other[name] == kept[name]).fillna(False) | (lacking[0] & lacking[1])
        if not RESULTS_COLUMNS[name].required:  # one of them may have been recorded earlier
            equal |= lacking[0] | lacking[1]
        for at in equal.index[~equal]:
            if unlike[at] and name in OF_PREDICTION:
                continue
            fixed = str(kept["prediction"][at]) == "exact"
            tolerance = Tolerance.of(fixed_size=fixed) if unlike[at] else Tolerance()
            if tolerance.differ(name, kept[name][at], other[name][at]):
                raise ResultsError(
                    f"run {kept['run_id'][at]} has {name} {kept[name][at]} in {kept['source'][at]} "
                    f"and {other[name][at]} in {other['source'][at]}: leave one of them out"
                )
    said = other[unlike].drop_duplicates(["run_id", *MACHINE])  # a folder, and the table beside it
    for at in said.index:
        places = " and ".join(
            f"{table['processor'][at]} ({table['source'][at]})" for table in (kept, other)
        )
        notes.append(f"run {kept['run_id'][at]} was done on {places}: the first counts")
    superseded = rows[again & (rows["status"] == "failed")]
    for run, source in superseded[["run_id", "source"]].itertuples(index=False):
        if first.loc[run, "status"] == "done":
            notes.append(f"run {run} failed in {source} and is done in {first.loc[run, 'source']}")
    return rows[~again].reset_index(drop=True), set(kept["run_id"][unlike])


def _finished_elsewhere(
    tables: Iterable[pd.DataFrame],
    folders: Iterable[Path],
    results: pd.DataFrame,
    unlike: set[str],
) -> dict[Path, set[str]]:
    """Return the runs that tables other than those beside the run folders have as they count.

    Of `unlike` runs only the record that counts does: another has other last digits.
    """
    beside = {folder.parent for folder in folders}
    status = dict(zip(results["run_id"], results["status"], strict=True))
    of_source = dict(zip(results["run_id"], results["source"], strict=True))
    found = {}
    for table in tables:
        for source, rows in table.groupby("source"):
            if Path(str(source)).parent not in beside:
                counts = rows["status"] == rows["run_id"].map(status)
                counts &= ~rows["run_id"].isin(unlike) | (rows["run_id"].map(of_source) == source)
                found[Path(str(source))] = set(rows.loc[counts, "run_id"])
    return found
