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

from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.schema import (
    ARROW,
    MESSAGES,
    MESSAGES_COLUMNS,
    ROUNDS,
    ROUNDS_COLUMNS,
    STATUS,
    Column,
)


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


def read_whole_lines(path: Path, notes: list[str]) -> bytes:
    """Return a CSV's bytes up to its last whole line; every file we write ends with one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
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
        if (number := Decimal(text)) == int(number):
            return int(number)
    raise pa.ArrowInvalid(f"column {name} has {text}, which is no whole number")


def parse_csv(path: Path, data: bytes, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Parse a CSV that must have `columns` and may have others.

    It may have been written again by another program: with ``2.0`` for 2, or an index.
    """
    types = {name: ARROW[column.dtype] for name, column in columns.items()}
    try:
        try:
            table = _read(data, types)
        except pa.ArrowInvalid:
            table = _read_as_others_write(data, types)
        table = table.drop_columns([n for n in table.column_names if not n or n == "Unnamed: 0"])
        missing = {n for n, column in columns.items() if column.required} - set(table.column_names)
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        if twice:
            raise ResultsError(f"{path} has the column {', '.join(sorted(twice))} more than once")
        if pa.binary() in table.schema.types:
            raise ResultsError(f"{path} cannot be read as a CSV of this version: it is not UTF-8")
    except (pa.ArrowInvalid, OverflowError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read as a CSV of this version: {error}") from None
    if missing:
        raise ResultsError(
            f"{path} has no column {', '.join(name for name in columns if name in missing)}: "
            "written by another version, or not by fedbw_sweep; docs/columns.md lists the columns"
        )
    frame: pd.DataFrame = table.to_pandas(types_mapper=_NULLABLE.get)
    return _with_all(frame, columns)


def _with_all(table: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Give a table all of `columns` in their own dtypes, those that it lacks without a value."""
    absent = {name: None for name in columns if name not in table}
    return table.assign(**absent).astype({name: column.dtype for name, column in columns.items()})


def load_rounds(
    folders: Mapping[str, Path], tables: Mapping[Path, set[str]], notes: list[str]
) -> pd.DataFrame:
    """Read the rounds of every run, from its folder or the CSV beside its results.

    Raises
    ------
    ResultsError
        If one round of a run has different numbers in two places.
    """
    own = {name: column for name, column in ROUNDS_COLUMNS.items() if name != "run_id"}
    parts = [_no_rows(ROUNDS_COLUMNS), *_read_alike(folders, ROUNDS, own, notes)]
    known = {run for part in parts for run in part["run_id"].unique()}
    for run in [run for run in folders if run not in known]:
        path = folders[run] / ROUNDS
        if not path.exists() and (folders[run] / STATUS).exists():
            notes.append(f"run {run}: {path} is missing, so its rounds are unknown")
    for source, runs in tables.items():
        path = source.with_name(source.name.replace("results", "rounds"))
        if path == source or not path.exists():
            if not runs <= set(folders):
                notes.append(f"{source} has no {path.name} beside it, so its rounds are unknown")
            continue
        part = parse_csv(path, read_whole_lines(path, notes), ROUNDS_COLUMNS)
        parts.append(part.loc[part["run_id"].isin(runs), list(ROUNDS_COLUMNS)])
    dtypes = {name: column.dtype for name, column in ROUNDS_COLUMNS.items()}
    rounds = pd.concat(parts, ignore_index=True).astype(dtypes)
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


def load_alike(
    folders: Mapping[str, Path], name: str, own: Mapping[str, Column], notes: list[str]
) -> pd.DataFrame:
    """Read a CSV of every run that has it."""
    columns = {"run_id": ROUNDS_COLUMNS["run_id"], **own}
    tables = [_no_rows(columns), *_read_alike(folders, name, own, notes)]
    dtypes = {name: column.dtype for name, column in columns.items()}
    return pd.concat(tables, ignore_index=True)[list(columns)].astype(dtypes)


def _read_alike(
    folders: Mapping[str, Path], name: str, columns: Mapping[str, Column], notes: list[str]
) -> Iterator[pd.DataFrame]:
    """Read a CSV of every run that has it; those with the same header as one, for speed."""
    alike: dict[bytes, list[tuple[str, Path, bytes]]] = defaultdict(list)
    for run, folder in folders.items():
        path = folder / name
        with suppress(FileNotFoundError):
            header, _, body = read_whole_lines(path, notes).partition(b"\n")
            alike[header].append((run, path, body))
    for header, files in alike.items():
        data = b"\n".join([header, b"".join(body for _, _, body in files)])
        lengths = [body.count(b"\n") for _, _, body in files]
        try:
            table = parse_csv(files[0][1], data, columns)
            whole = len(table) == sum(lengths)
        except ResultsError:
            whole = False
        if not whole:  # one by one, to name the file, or because of empty lines
            alone = [parse_csv(path, header + b"\n" + body, columns) for _, path, body in files]
            table, lengths = pd.concat(alone, ignore_index=True), list(map(len, alone))
        runs = pd.Series([run for run, _, _ in files], dtype="string")
        table["run_id"] = runs.repeat(lengths).array  # never a million Python strings
        yield table[["run_id", *columns]]


def load_messages(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Read the ``messages.parquet`` of every run that has one."""
    parts = [_no_rows(MESSAGES_COLUMNS).assign(run_id=pd.Series(dtype="string"))]
    for run, folder in folders.items():
        path = folder / MESSAGES
        if path.exists():
            try:
                table = pq.read_table(path, partitioning=None)
            except (pa.ArrowInvalid, OSError) as error:
                raise ResultsError(f"{path} is damaged: {error}; leave {folder} out") from None
            lacking = {name for name, column in MESSAGES_COLUMNS.items() if column.required}
            if lacking := lacking - set(table.column_names):
                raise ResultsError(f"{path} has no column {', '.join(sorted(lacking))}")
            own = table.select([n for n in table.column_names if n in MESSAGES_COLUMNS])
            parts.append(_with_all(own.to_pandas(), MESSAGES_COLUMNS).assign(run_id=run))
    messages = pd.concat(parts, ignore_index=True)
    dtypes = {"run_id": "string", **{n: column.dtype for n, column in MESSAGES_COLUMNS.items()}}
    return messages[list(dtypes)].astype(dtypes)
