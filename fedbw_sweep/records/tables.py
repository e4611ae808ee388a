"""CSV files of records -> typed tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from fedbw_sweep.console import printable
from fedbw_sweep.errors import DamagedError, ResultsError
from fedbw_sweep.records.files import TABLE_LIMIT, read_file
from fedbw_sweep.records.folder import Run
from fedbw_sweep.records.schema import (
    ARROW,
    MESSAGES,
    MESSAGES_COLUMNS,
    METRICS,
    ROUNDS,
    ROUNDS_COLUMNS,
    Column,
)

MOST_COLUMNS, MOST_MESSAGES, MOST_ROUNDS = 1000, 4_000_000, 10_000_000
"""Columns of a CSV, rows of a ``messages.parquet`` and rounds of a run that are read."""

DIRECTIONS = {"uplink", "downlink"}

_CONTROL = bytes([*range(0x20), 0x7F]).translate(None, b"\t\n\r")
"""Control characters within ASCII, but those that a CSV has between its values."""


def count_as_missing(results: pd.DataFrame, damaged: Mapping[str, str]) -> None:
    """Leave nothing of damaged runs in a table of results but their ids and what is wrong."""
    for run, why in damaged.items():
        at = results["run_id"] == run
        results.loc[at, [*METRICS, "end"]] = pd.NA
        results.loc[at, "status"] = "missing"
        results.loc[at, "reason"] = why


def _no_rows(columns: Mapping[str, Column]) -> pd.DataFrame:
    """Build an empty table with exactly these columns in their own dtypes."""
    return pd.DataFrame(
        {name: pd.array([], column.dtype) for name, column in columns.items()}  # type: ignore[call-overload]
    )


_NULLABLE: Mapping[pa.DataType, Any] = {
    pa.int64(): pd.Int64Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.string(): pd.StringDtype(),
    pa.null(): pd.StringDtype(),
}


def whole_lines(path: Path, data: bytes, notes: list[str]) -> bytes:
    """Return a CSV's bytes up to its last whole line; every file we write ends with one."""
    end = data.rfind(b"\n") + 1
    while data.count(b'"', 0, end) % 2:  # a line end inside a quoted error is not a row's
        end = data.rfind(b"\n", 0, end - 1) + 1
    if end == len(data):
        return data
    notes.append(f"{path}: its last line is cut off and was left out; copy the file again")
    return data[:end]


def _read(data: bytes, types: Mapping[str, pa.DataType]) -> pa.Table:
    return csv.read_csv(
        pa.BufferReader(data),
        parse_options=csv.ParseOptions(newlines_in_values=b'"' in data),
        convert_options=csv.ConvertOptions(
            column_types=dict(types),
            null_values=[""],  # "none" is a compression method
            strings_can_be_null=True,
        ),
    )


def _read_as_others_write(data: bytes, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Read whole numbers that are spelt ``2.0``, as pandas spells them beside missing ones."""
    whole = [name for name, kind in types.items() if kind == pa.int64()]
    table = _read(data, {**types, **dict.fromkeys(whole, pa.string())})
    for at, name in enumerate(table.column_names):
        if name in whole:
            numbers = [_whole(name, text) for text in table.column(at).to_pylist()]
            table = table.set_column(at, name, pa.array(numbers, pa.int64()))
    return table


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    with suppress(InvalidOperation, OverflowError, ValueError):
        if abs(number := Decimal(text)) < 2**63 and number == int(number):
            return int(number)
    raise pa.ArrowInvalid(f"column {name} has {text}, which is no whole number")


def parse_csv(path: Path, data: bytes, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Parse a CSV that must have `columns` and may have others.

    It may have been written again by another program: with ``2.0`` for 2, or an index. Control
    characters in its texts become escapes.
    """
    if data.partition(b"\n")[0].count(b",") > MOST_COLUMNS:
        raise DamagedError(f"{path} has more than {MOST_COLUMNS} columns")
    types = {name: ARROW[column.dtype] for name, column in columns.items()}
    try:
        try:
            table = _read(data, types)
        except pa.ArrowInvalid:
            table = _read_as_others_write(data, types)
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        if twice:
            names = ", ".join(sorted(name or "without a name" for name in twice))
            raise DamagedError(f"{path} has the column {names} more than once")
        table = table.drop_columns([n for n in table.column_names if not n or n == "Unnamed: 0"])
        missing = {n for n, column in columns.items() if column.required} - set(table.column_names)
        for name in set(table.column_names) & columns.keys():
            if columns[name].dtype == "int64" and table.column(name).null_count:
                raise DamagedError(f"{path}: {name} lacks a value in some rows")
        if pa.binary() in table.schema.types:
            raise DamagedError(f"{path} cannot be read as a CSV of this version: it is not UTF-8")
    except (pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read as a CSV of this version: {error}") from None
    if missing:
        raise DamagedError(
            f"{path} has no column {', '.join(name for name in columns if name in missing)}: "
            "written by another version, or not by fedbw_sweep; docs/columns.md lists the columns"
        )
    frame: pd.DataFrame = table.to_pandas(types_mapper=_NULLABLE.get)
    texts = [name for name, dtype in frame.dtypes.items() if dtype == "string"]
    if texts and (len(data.translate(None, _CONTROL)) < len(data) or not data.isascii()):
        for name in texts:
            frame[name] = frame[name].map(printable, na_action="ignore").astype("string")
        frame = frame.rename(columns=lambda name: printable(str(name)))
    return _with_all(frame, columns)


def _with_all(table: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Give a table all of `columns` in their own dtypes, those that it lacks without a value."""
    absent = {name: None for name in columns if name not in table}
    return table.assign(**absent).astype({name: column.dtype for name, column in columns.items()})


def load_rounds(
    runs: Mapping[str, Run],
    tables: Mapping[Path, set[str]],
    notes: list[str],
    damaged: dict[str, str],
) -> pd.DataFrame:
    """Read the rounds of every run, from its folder or the CSV beside its results.

    Parameters
    ----------
    runs : mapping of str to Run
        By ``run_id``.
    tables : mapping of pathlib.Path to set of str
        Tables of results, and the runs that are known from each.
    notes : list of str
        What was odd but tolerated is added.
    damaged : dict of str to str
        Runs whose file is damaged, and how, are added; they have no rows.

    Raises
    ------
    ResultsError
        If one round of a run has different numbers in two places, or a table is damaged.
    """
    own = {name: column for name, column in ROUNDS_COLUMNS.items() if name != "run_id"}
    parts = [_no_rows(ROUNDS_COLUMNS), *_read_alike(runs, ROUNDS, own, notes, damaged)]
    parts = [_numbered(part, damaged) for part in parts]
    of_folders = len(parts)
    known = {run for part in parts for run in part["run_id"].unique()}
    for run in runs.keys() - known - damaged.keys():
        if ROUNDS not in runs[run].files and runs[run].status is not None:
            path = runs[run].folder / ROUNDS
            notes.append(f"run {run}: {path} is missing, so its rounds are unknown")
    for source, of_table in tables.items():
        path = source.with_name(source.name.replace("results", "rounds"))
        if path == source or not path.exists():
            if not of_table <= set(runs):
                notes.append(f"{source} has no {path.name} beside it, so its rounds are unknown")
            continue
        data = whole_lines(path, read_file(path, TABLE_LIMIT), notes)
        part = parse_csv(path, data, ROUNDS_COLUMNS)
        parts.append(part.loc[part["run_id"].isin(of_table), list(ROUNDS_COLUMNS)])
    dtypes = {name: column.dtype for name, column in ROUNDS_COLUMNS.items()}
    rounds = pd.concat(parts, ignore_index=True).astype(dtypes)
    if len(parts) == of_folders:
        return rounds
    key = ["run_id", "round"]
    if (unknown := rounds[key].isna().any(axis=1)).any():
        run = rounds.loc[unknown, "run_id"].iloc[0]
        raise ResultsError(f"run {run} has a round without number, or no name, in its {ROUNDS}")
    if not rounds.duplicated(key).any():
        return rounds
    rounds = rounds.drop_duplicates(ignore_index=True)
    if (again := rounds.duplicated(key)).any():
        run, number = rounds.loc[again, key].iloc[0]
        raise ResultsError(
            f"run {run} has different numbers for round {number} in two places: leave one out"
        )
    return rounds


def _numbered(rounds: pd.DataFrame, damaged: dict[str, str]) -> pd.DataFrame:
    """Leave out the runs that have a round without number, or with two."""
    key = ["run_id", "round"]
    wrong = ~rounds["round"].between(0, MOST_ROUNDS).fillna(False)
    if not wrong.any() and not rounds.duplicated(key).any():
        return rounds
    rounds = rounds.drop_duplicates(ignore_index=True)
    wrong = ~rounds["round"].between(0, MOST_ROUNDS).fillna(False) | rounds.duplicated(key)
    for run in rounds.loc[wrong, "run_id"].unique():
        damaged[run] = f"run {run}: its {ROUNDS} is damaged: a round has no number, or two rows"
    return rounds[~rounds["run_id"].isin(damaged)]


def load_alike(
    runs: Mapping[str, Run],
    name: str,
    own: Mapping[str, Column],
    notes: list[str],
    damaged: dict[str, str],
) -> pd.DataFrame:
    """Read a CSV of every run that has it; for `notes` and `damaged` see `load_rounds`."""
    columns = {"run_id": ROUNDS_COLUMNS["run_id"], **own}
    tables = [_no_rows(columns), *_read_alike(runs, name, own, notes, damaged)]
    dtypes = {name: column.dtype for name, column in columns.items()}
    return pd.concat(tables, ignore_index=True)[list(columns)].astype(dtypes)


def _read_alike(
    runs: Mapping[str, Run],
    name: str,
    columns: Mapping[str, Column],
    notes: list[str],
    damaged: dict[str, str],
) -> Iterator[pd.DataFrame]:
    """Parse a CSV of every run that has it; those with the same header as one, for speed."""
    alike: dict[bytes, list[tuple[str, Path, bytes]]] = defaultdict(list)
    for run, read in runs.items():
        if name in read.files:
            path = read.folder / name
            header, _, body = whole_lines(path, read.files[name], notes).partition(b"\n")
            alike[header].append((run, path, body))
    for header, files in alike.items():
        data = b"\n".join([header, b"".join(body for _, _, body in files)])
        lengths = [body.count(b"\n") for _, _, body in files]
        try:
            table = parse_csv(files[0][1], data, columns)
            whole = len(table) == sum(lengths)
        except DamagedError:
            whole = False
        if not whole:  # one by one, to name the file, or because of empty lines
            alone = {}
            for run, path, body in files:
                try:
                    alone[run] = parse_csv(path, header + b"\n" + body, columns)
                except DamagedError as error:
                    damaged[run] = str(error)
            if not alone:
                continue
            table = pd.concat(alone.values(), ignore_index=True)
            lengths = list(map(len, alone.values()))
            files = [file for file in files if file[0] in alone]
        names = pd.Series([run for run, _, _ in files], dtype="string")
        table["run_id"] = names.repeat(lengths).array  # never a million Python strings
        yield table[["run_id", *columns]]


def load_messages(runs: Mapping[str, Run], damaged: dict[str, str]) -> pd.DataFrame:
    """Parse the ``messages.parquet`` of every run that has one; for `damaged` see `load_rounds`."""
    parts = [_no_rows(MESSAGES_COLUMNS).assign(run_id=pd.Series(dtype="string"))]
    for run, read in runs.items():
        if MESSAGES in read.files:
            try:
                own = parse_messages(read.folder / MESSAGES, read.files[MESSAGES])
            except DamagedError as error:
                damaged[run] = str(error)
                continue
            parts.append(_with_all(own, MESSAGES_COLUMNS).assign(run_id=run))
    messages = pd.concat(parts, ignore_index=True)
    dtypes = {"run_id": "string", **{n: column.dtype for n, column in MESSAGES_COLUMNS.items()}}
    return messages[list(dtypes)].astype(dtypes)


def parse_messages(path: Path, data: bytes) -> pd.DataFrame:
    """Parse a ``messages.parquet``: those of its columns that are known.

    Raises
    ------
    DamagedError
        If it is none, lacks a column, or would become much larger than it is.
    """
    try:
        # Texts stay in a dictionary: a long one in each of a million rows is one text here.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["direction"])
        about = file.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        if max(about.num_rows, sum(group.num_rows for group in groups)) > MOST_MESSAGES:
            raise DamagedError(f"{path} has more than {MOST_MESSAGES:,} rows")
        names = [name for name in file.schema_arrow.names if name in MESSAGES_COLUMNS]
        if lacking := [
            n for n, column in MESSAGES_COLUMNS.items() if column.required and n not in names
        ]:
            raise DamagedError(f"{path} has no column {', '.join(sorted(lacking))}")
        if len(set(names)) < len(names):
            raise DamagedError(f"{path} has a column more than once")
        for group in groups:
            for number in range(group.num_columns):
                if group.column(number).compression not in ("SNAPPY", "UNCOMPRESSED"):
                    raise DamagedError(f"{path} is compressed by another method than Snappy")
        table = file.read(columns=names, use_threads=False)
        for name, values in zip(names, table.columns, strict=True):
            whole = pa.types.is_integer(values.type)
            if name == "direction":
                whole = pa.types.is_dictionary(values.type) and all(
                    set(chunk.dictionary.to_pylist()) <= DIRECTIONS for chunk in values.chunks
                )
            if not whole or values.null_count:
                raise DamagedError(f"{path}: {name} has values of another kind, or lacks some")
        frame: pd.DataFrame = table.to_pandas()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    return frame
