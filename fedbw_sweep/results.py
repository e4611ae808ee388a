"""The sweep's records: columns with types and units, atomic writes, run folders, their tables."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from csv import DictWriter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow import csv

from fedbw_sweep.config import SCHEMA_VERSION, RunConfig, config_columns
from fedbw_sweep.errors import ResultsError

RESULTS, ROUNDS = "results.csv", "rounds.csv"
CONFIG, MESSAGES, PARTS = "config.yaml", "messages.parquet", "parts.csv"
TIMING, STATUS = "timing.csv", "status.json"

AXES = ("compression", "num_clients", "fraction_fit", "rounds", "local_epochs")
"""The five axes of a sweep: the first columns and the order of the rows of ``results.csv``."""


@dataclass(frozen=True)
class Column:
    """A column's pandas dtype and what it means, with its unit."""

    dtype: str
    meaning: str


RESULTS_COLUMNS: Mapping[str, Column] = {
    "run_id": Column("string", "hash of the run's science config and the schema version"),
    "status": Column("string", "done or failed; missing if nothing was recorded"),
    "error": Column("string", "why a failed run failed, or nothing was recorded"),
    "clients_per_round": Column("Int64", "clients sampled each round: max(1, floor(f x n))"),
    "model_parameters": Column("Int64", "coordinates of the vector that travels"),
    "frozen_parameters": Column("Int64", "parameters that neither train nor travel in updates"),
    "dense_message_bytes": Column("Int64", "payload bytes of one message sent dense in fp32"),
    "uplink_bytes": Column("Int64", "payload bytes, clients to server, all rounds"),
    "downlink_bytes": Column("Int64", "payload bytes, server to clients, all rounds"),
    "total_bytes": Column("Int64", "payload bytes in both directions"),
    "frozen_bytes": Column(
        "Int64", "of downlink_bytes, frozen parameters in first messages (initial_model=sent)"
    ),
    "uplink_message_bytes": Column("Int64", "bytes Flower counts, clients to server"),
    "downlink_message_bytes": Column("Int64", "bytes Flower counts, server to clients"),
    "dense_uplink_bytes": Column("Int64", "payload bytes had every update been sent dense in fp32"),
    "dense_downlink_bytes": Column("Int64", "payload bytes had the model been sent dense in fp32"),
    "uplink_ratio": Column("Float64", "compression ratio: dense_uplink_bytes / uplink_bytes"),
    "downlink_ratio": Column("Float64", "dense_downlink_bytes / downlink_bytes"),
    "total_ratio": Column("Float64", "dense bytes in both directions / total_bytes"),
    "bits_per_coordinate": Column(
        "Float64", "mean uplink payload bits per coordinate of an update"
    ),
    "predicted_bytes": Column("Int64", "the seed's formula for total_bytes; empty if unknowable"),
    "prediction": Column(
        "string",
        "exact (methods of fixed size), or estimate: and its basis",
    ),
    "initial_loss": Column("Float64", "held-out loss before training, nats per token"),
    "loss": Column("Float64", "held-out loss after the last round, nats per token"),
    "perplexity": Column("Float64", "exp(loss)"),
    "bits_per_byte": Column("Float64", "held-out loss in bits per UTF-8 byte of text"),
    "model_hash": Column("string", "SHA-256 of the final model's arrays"),
    "schema_version": Column("Int64", "version of the recorded files"),
}
"""Columns of ``results.csv`` beside the run's configuration, which `config_columns` names."""

ROUNDS_COLUMNS: Mapping[str, Column] = {
    "run_id": Column("string", "the run, as in results.csv"),
    "round": Column("Int64", "communication round; 0 is the initial model"),
    "loss": Column("Float64", "held-out loss after the round, nats per token"),
    "perplexity": Column("Float64", "exp(loss)"),
    "bits_per_byte": Column("Float64", "held-out loss in bits per UTF-8 byte of text"),
    "train_loss": Column("Float64", "clients' mean training loss in the round, nats per token"),
    "clients": Column("Int64", "clients that trained"),
    "uplink_bytes": Column("Int64", "payload bytes, clients to server"),
    "downlink_bytes": Column("Int64", "payload bytes, server to clients"),
    "uplink_message_bytes": Column("Int64", "bytes Flower counts, clients to server"),
    "downlink_message_bytes": Column("Int64", "bytes Flower counts, server to clients"),
    "dense_uplink_bytes": Column("Int64", "payload bytes had every update been sent dense in fp32"),
    "dense_downlink_bytes": Column("Int64", "payload bytes had the model been sent dense in fp32"),
    "uplink_ratio": Column("Float64", "dense_uplink_bytes / uplink_bytes"),
    "downlink_ratio": Column("Float64", "dense_downlink_bytes / downlink_bytes"),
    "predicted_bytes": Column("Int64", "the seed's formula for both directions' payload bytes"),
    "cumulative_uplink_bytes": Column("Int64", "uplink_bytes of this and all earlier rounds"),
    "cumulative_bytes": Column("Int64", "payload bytes of both directions up to this round"),
}

MESSAGES_COLUMNS: Mapping[str, Column] = {
    "round": Column("int64", "communication round, from 1"),
    "client": Column("int64", "the client's number, from 0"),
    "direction": Column("string", "downlink (server to client) or uplink"),
    "payload_bytes": Column("int64", "the encoded model or update"),
    "message_bytes": Column("int64", "all that Flower counts in the message"),
    "dense_bytes": Column("int64", "the same arrays sent dense in fp32"),
    "frozen_bytes": Column("int64", "of payload_bytes, frozen parameters"),
}

PARTS_COLUMNS: Mapping[str, Column] = {
    "tensor": Column("string", "the model's name of it; (all) if no tensor's in particular"),
    "part": Column(
        "string",
        "values, indices (positions), tables (scales, probabilities), factors (of low rank), frame "
        "(and seeds), or exact (not floating point)",
    ),
    "bytes": Column("Int64", "payload bytes, clients to server, of the last round's updates"),
}

TIMING_COLUMNS: Mapping[str, Column] = {
    "round": Column("int64", "communication round; 0 is the initial evaluation"),
    "round_seconds": Column("float64", "wall-clock seconds since the previous row"),
    "evaluate_seconds": Column("float64", "of which the held-out loss"),
    "train_seconds": Column("float64", "clients' training, summed over clients"),
    "encode_seconds": Column("float64", "clients' encoding, summed over clients"),
    "decode_seconds": Column("float64", "the server's decoding of the round's updates"),
}


@dataclass
class RunRecord:
    """What one run leaves, filled in as it goes; `write` puts it on disk.

    Attributes
    ----------
    status, error
        How it ended, and why if it failed.
    summary
        Values of `RESULTS_COLUMNS`.
    rounds, messages, parts, timing
        Rows of the files of the same names.
    environment
        Versions and execution settings: recorded, but no part of the results.
    """

    config: RunConfig
    status: Literal["done", "failed"] = "failed"
    error: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, sweep_dir: Path) -> None:
        """Write the run folder beside its final place and rename it there, ``status.json`` last."""
        folder = Path(mkdtemp(prefix=f".{self.config.run_id}-", dir=sweep_dir))
        try:
            text = yaml.dump(self.config.science, Dumper=yaml.CSafeDumper, sort_keys=False)
            (folder / CONFIG).write_text(text, encoding="utf-8")
            own = [name for name in ROUNDS_COLUMNS if name != "run_id"]
            _write_csv(self.rounds, own, folder / ROUNDS)
            _write_csv(self.parts, PARTS_COLUMNS, folder / PARTS)
            _write_csv(self.timing, TIMING_COLUMNS, folder / TIMING)
            types = pa.schema([(n, _ARROW[c.dtype]) for n, c in MESSAGES_COLUMNS.items()])
            pq.write_table(pa.Table.from_pylist(self.messages, types), folder / MESSAGES)
            status = {
                "schema_version": SCHEMA_VERSION,
                "run_id": self.config.run_id,
                "status": self.status,
                "error": self.error,
                "summary": self.summary,
                "environment": self.environment,
            }
            text = json.dumps(status, indent=2)
            (folder / STATUS).write_text(text + "\n", encoding="utf-8")
            folder.chmod(0o755)
            final = sweep_dir / self.config.run_id
            if final.exists():  # an earlier attempt that failed
                shutil.rmtree(final)
            folder.rename(final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_csv(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], path: Path) -> None:
    """Write rows as they are; only to build a table of them takes longer than all the rest."""
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def _no_rows(columns: Mapping[str, Column]) -> pd.DataFrame:
    """Build an empty table with exactly these columns in their own dtypes."""
    return pd.DataFrame(
        {name: pd.array([], column.dtype) for name, column in columns.items()}  # type: ignore[call-overload]
    )


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return a run folder's ``status.json``, or None if the run never got that far."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ResultsError(f"{folder / STATUS} is damaged: {error}; delete {folder}") from None
        written_by = status.get("schema_version") if isinstance(status, dict) else None
        if written_by != SCHEMA_VERSION:
            raise ResultsError(
                f"{folder} has schema version {written_by}, this version reads "
                f"{SCHEMA_VERSION}; use another sweep folder (sweep=<name>)"
            )
        ended = status.get("status") in STATES and isinstance(status.get("run_id"), str)
        if not ended or not isinstance(status.get("summary") or {}, dict):
            raise ResultsError(
                f"{folder / STATUS} is damaged: no run_id, status or summary; delete {folder}"
            )
        return dict(status)
    return None


def announce(configs: Iterable[RunConfig], sweep_dir: Path) -> None:
    """Leave a folder with only ``config.yaml`` for each run to do.

    Without it, a run whose process is killed would be missing without a trace.
    """
    for config in configs:
        folder = sweep_dir / config.run_id
        with suppress(FileExistsError):
            folder.mkdir()
            text = yaml.dump(config.science, Dumper=yaml.CSafeDumper, sort_keys=False)
            (folder / CONFIG).write_text(text, encoding="utf-8")


def is_done(config: RunConfig, sweep_dir: Path) -> bool:
    """Whether the run is recorded as done, so that nothing is left to do."""
    status = read_status(sweep_dir / config.run_id)
    return status is not None and status["status"] == "done"


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
            "error": NEVER_RECORDED,
            "schema_version": SCHEMA_VERSION,
            "summary": {},
        }
        science = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), yaml.CSafeLoader)
        own = {key: status[key] for key in ("run_id", "status", "error", "schema_version")}
        rows.append({**config_columns(science), **own, **status["summary"]})
        folders[folder.name] = folder

    names = dict.fromkeys(name for row in rows for name in row if name not in RESULTS_COLUMNS)
    settings = [*AXES, "seed", *sorted(set(names) - {*AXES, "seed"})]
    results = pd.DataFrame(rows, columns=[*settings, *RESULTS_COLUMNS], dtype=object)
    whole = [name for name in settings if _is_whole(results[name])]
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    results = results.astype({**dtypes, **dict.fromkeys(whole, "Int64")})
    results = results.sort_values([*AXES, "seed", "run_id"], ignore_index=True)
    own = {name: column for name, column in ROUNDS_COLUMNS.items() if name != "run_id"}
    rounds = _load_alike(folders, ROUNDS, own, [])
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
    folders, tables = _find([paths] if isinstance(paths, str | Path) else paths)
    notes: list[str] = []
    found = []
    for table in tables:
        try:
            found.append(_read_csv_runs(table, notes))
        except ResultsError as error:
            if table.parent not in {folder.parent for folder in folders}:
                raise
            notes.append(f"{error}; read the run folders beside it instead")
    environments, own, folder_of = {}, [], {}
    for folder in folders:
        row, environment = _read_run(folder, notes)
        own.append(row)
        folder_of[row["run_id"]] = folder
        if environment is not None:
            environments[row["run_id"]] = environment
    rows = pd.concat([_results_frame(own), *(f[_RESULTS_AND_SOURCE] for f in found)])
    results = _each_run_once(rows.reset_index(drop=True), notes)
    if results.empty:
        raise ResultsError(f"{', '.join(map(str, [*folders, *tables]))}: holds no whole run")
    configs = _Configs(folder_of)
    settings, unknown = _settings(results["run_id"], found, configs)
    for run, why in unknown.items():
        notes.append(f"run {run}: its settings are unknown: {why}")
        results.loc[results["run_id"] == run, ["status", "error"]] = ["missing", notes[-1]]
    results = pd.concat([settings, results], axis=1)
    results = results.sort_values([*AXES, "seed", "run_id"], ignore_index=True)
    from_folder = {run: folder_of[run] for run in results["run_id"] if run in folder_of}
    return Records(
        results,
        _load_rounds(from_folder, _finished_elsewhere(found, folders, results), notes),
        _load_messages(from_folder if messages else {}),
        _load_alike(from_folder if messages else {}, TIMING, TIMING_COLUMNS, notes),
        _load_alike(from_folder, PARTS, PARTS_COLUMNS, notes),
        configs,
        environments,
        notes,
    )


NEVER_RECORDED = "was announced but never recorded: run the sweep again"
STATES = "done", "failed", "missing"

_RESULTS_AND_SOURCE = [*RESULTS_COLUMNS, "source"]
_RUN_ID = re.compile(r"[0-9a-f]{12}")
_NULLABLE: Mapping[pa.DataType, Any] = {
    pa.int64(): pd.Int64Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.string(): pd.StringDtype(),
    pa.null(): pd.StringDtype(),
}
_ARROW = {
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
}


class _Configs(Mapping[str, Mapping[str, Any]]):
    """Each run's ``config.yaml``, read when asked for: parsing 10,000 takes seconds."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def __getitem__(self, run_id: str) -> Mapping[str, Any]:
        path = self._folders[run_id] / CONFIG
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ResultsError(f"{path} is damaged: {error}") from None
        if not isinstance(config, dict):
            raise ResultsError(f"{path} is damaged: it is not a mapping of settings")
        return config

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


def _find(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the run folders and the tables of results in `paths`, each once."""
    folders: dict[Path, Path] = {}
    tables: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ResultsError(f"{path} does not exist; give run folders, sweep folders or CSVs")
        if path.is_file():
            tables[path.resolve()] = path
            continue
        whole, found = path.resolve(), False
        for root, names, files in os.walk(whole):
            inner = Path(root[len(str(whole)) :].lstrip(os.sep))
            names[:] = sorted(name for name in names if not name.startswith("."))
            here = whole / inner
            if STATUS in files or (CONFIG in files and _RUN_ID.fullmatch(here.name)):
                folders[here] = path / inner
                names.clear()
                found = True
                continue
            if RESULTS in files:
                tables[here / RESULTS] = path / inner / RESULTS
                found = True
            runs = {
                name  # need not be listed, which takes long for 10,000
                for name in names
                if _RUN_ID.fullmatch(name) and (here / name / STATUS).exists()
            }
            folders |= {here / name: path / inner / name for name in sorted(runs)}
            names[:] = [name for name in names if name not in runs]
            found = found or bool(runs)
        if not found:
            raise ResultsError(f"{path} holds no run: no {STATUS} and no {RESULTS} in or below it")
    return list(folders.values()), list(tables.values())


def _read_run(folder: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a run folder's row of results and its environment."""
    try:
        status = read_status(folder)
        reason = f"{NEVER_RECORDED}, or delete {folder}"
    except ResultsError as error:
        if "damaged" not in str(error):
            raise
        status, reason = None, str(error)
        notes.append(reason)
    if status is None:
        run_id = folder.resolve().name
        row = {"run_id": run_id, "status": "missing", "error": reason, "source": str(folder)}
        return row, None
    own = {key: status.get(key) for key in ("run_id", "status", "error", "schema_version")}
    summary = status.get("summary") or {}
    known = {name: value for name, value in summary.items() if name in RESULTS_COLUMNS}
    return {**known, **own, "source": str(folder)}, status.get("environment") or {}


def _results_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=_RESULTS_AND_SOURCE, dtype=object)
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    try:
        return table.astype({**dtypes, "source": "string"})
    except (TypeError, ValueError) as error:
        for row in rows if len(rows) > 1 else []:
            _results_frame([row])
        [row] = rows
        raise ResultsError(f"{row['source']}/{STATUS} is damaged: {error}") from None


def _read_csv_runs(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read a table of results, wherever it came from; its settings come first."""
    table = _parse_csv(path, _read_whole_lines(path, notes), RESULTS_COLUMNS)
    if lacking := [name for name in [*AXES, "seed"] if name not in table]:
        raise ResultsError(f"{path} has no column {', '.join(lacking)}: its runs are unknown")
    if table["run_id"].isna().any():
        raise ResultsError(f"{path} has a run without run_id")
    if not set(table["status"]) <= set(STATES):
        raise ResultsError(f"{path} has a run whose status is none of {', '.join(STATES)}")
    versions = set(table["schema_version"].dropna()) | (
        {None} if table["schema_version"].isna().any() else set()
    )
    if versions - {SCHEMA_VERSION}:
        listed = ", ".join(sorted(map(str, versions)))
        raise ResultsError(
            f"{path} has rows of schema version {listed}, this version reads {SCHEMA_VERSION}; "
            "leave the others out or run them again"
        )
    again = int(table.duplicated().sum())
    if again:
        notes.append(f"{path}: {again} row(s) stand there twice; each counts once")
    return table.drop_duplicates(ignore_index=True).assign(source=str(path))


def _read_whole_lines(path: Path, notes: list[str]) -> bytes:
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


def _parse_csv(path: Path, data: bytes, columns: Mapping[str, Column]) -> pd.DataFrame:
    """Parse a CSV that must have `columns` and may have others."""
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            parse_options=csv.ParseOptions(newlines_in_values=b'"' in data),
            convert_options=csv.ConvertOptions(
                column_types={name: _ARROW[column.dtype] for name, column in columns.items()},
                null_values=[""],  # "none" is a compression method
                strings_can_be_null=True,
            ),
        )
        missing = set(columns) - set(table.column_names)
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        if twice:
            raise ResultsError(f"{path} has the column {', '.join(sorted(twice))} more than once")
        if pa.binary() in table.schema.types:
            raise ResultsError(f"{path} cannot be read as a CSV of this version: it is not UTF-8")
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read as a CSV of this version: {error}") from None
    if missing:
        raise ResultsError(
            f"{path} has no column {', '.join(name for name in columns if name in missing)}: "
            "written by another version, or not by fedbw_sweep; docs/columns.md lists the columns"
        )
    frame: pd.DataFrame = table.to_pandas(types_mapper=_NULLABLE.get)
    return frame.astype({name: column.dtype for name, column in columns.items()})


def _settings(
    runs: pd.Series[str], tables: Iterable[pd.DataFrame], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, dict[str, Exception]]:
    """Return the settings of `runs`, a row for each, and why those of some are unknown.

    A ``run_id`` is a hash of them, so that any CSV will do; without one, the run's folder.
    """
    beside = [name for name in _RESULTS_AND_SOURCE if name != "run_id"]
    own = [table.drop(columns=beside).set_index("run_id") for table in tables]
    _refuse_contradictions(own)
    read: dict[str, dict[str, Any]] = {}
    unknown: dict[str, Exception] = {}
    for run in runs[~runs.isin({run for table in own for run in table.index})]:
        try:
            read[run] = config_columns(configs[run])
        except (ResultsError, OSError) as error:
            unknown[run] = error
    own.append(pd.DataFrame(list(read.values()), index=list(read), dtype=object))
    known = pd.concat(own)
    known = known[~known.index.duplicated()].reindex(runs)
    names = [*AXES, "seed", *sorted(set(map(str, known)) - {*AXES, "seed"})]
    nothing = pd.Series(index=known.index, dtype=object)
    typed = {name: _typed(known.get(name, nothing)) for name in names}
    return pd.DataFrame(typed).reset_index(drop=True), unknown


def _refuse_contradictions(settings: Sequence[pd.DataFrame]) -> None:
    """Refuse tables that say different settings of one run, whose ``run_id`` is their hash.

    Raises
    ------
    ResultsError
        Naming the run and the setting.
    """
    known = pd.concat([pd.DataFrame(), *settings])
    again = known[known.index.duplicated(keep=False)]
    kinds = again.groupby(level=0).nunique().gt(1)
    for name in kinds.columns[kinds.any(axis=0)]:
        run = str(kinds.index[kinds[name]][0])
        values = ", ".join(map(str, again[name][again.index == run].dropna().unique()))
        raise ResultsError(f"run {run} has {name} {values} in different tables: one was changed")


def _each_run_once(rows: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Keep the best record of each run.

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
    for name in RESULTS_COLUMNS:
        equal = (other[name] == kept[name]).fillna(False) | (other[name].isna() & kept[name].isna())
        if not equal.all():
            at = int((~equal).to_numpy().argmax())
            raise ResultsError(
                f"run {kept['run_id'][at]} has {name} {kept[name][at]} in {kept['source'][at]} and "
                f"{other[name][at]} in {other['source'][at]}: leave one of them out"
            )
    superseded = rows[again & (rows["status"] == "failed")]
    for run, source in superseded[["run_id", "source"]].itertuples(index=False):
        if first.loc[run, "status"] == "done":
            notes.append(f"run {run} failed in {source} and is done in {first.loc[run, 'source']}")
    return rows[~again].reset_index(drop=True)


def _typed(values: pd.Series) -> pd.Series:
    """Give a setting's column the type all its values have in common."""
    if values.dtype != object:
        return values
    kinds = {type(value) for value in values.dropna()}
    for allowed, dtype in (({int}, "Int64"), ({int, float}, "Float64"), ({bool}, "boolean")):
        if kinds and kinds <= allowed:
            return values.astype(pd.api.types.pandas_dtype(dtype))
    return values.astype("string")


def _finished_elsewhere(
    tables: Iterable[pd.DataFrame], folders: Iterable[Path], results: pd.DataFrame
) -> dict[Path, set[str]]:
    """Return the runs that tables other than those beside the run folders have as they count."""
    beside = {folder.parent for folder in folders}
    status = dict(zip(results["run_id"], results["status"], strict=True))
    found = {}
    for table in tables:
        for source, rows in table.groupby("source"):
            if Path(str(source)).parent not in beside:
                counts = rows["status"] == rows["run_id"].map(status)
                found[Path(str(source))] = set(rows.loc[counts, "run_id"])
    return found


def _load_rounds(
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
        part = _parse_csv(path, _read_whole_lines(path, notes), ROUNDS_COLUMNS)
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


def _load_alike(
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
            header, _, body = _read_whole_lines(path, notes).partition(b"\n")
            alike[header].append((run, path, body))
    for header, files in alike.items():
        data = b"\n".join([header, b"".join(body for _, _, body in files)])
        lengths = [body.count(b"\n") for _, _, body in files]
        try:
            table = _parse_csv(files[0][1], data, columns)
            whole = len(table) == sum(lengths)
        except ResultsError:
            whole = False
        if not whole:  # one by one, to name the file, or because of empty lines
            alone = [_parse_csv(path, header + b"\n" + body, columns) for _, path, body in files]
            table, lengths = pd.concat(alone, ignore_index=True), list(map(len, alone))
        runs = pd.Series([run for run, _, _ in files], dtype="string")
        table["run_id"] = runs.repeat(lengths).array  # never a million Python strings
        yield table[["run_id", *columns]]


def _load_messages(folders: Mapping[str, Path]) -> pd.DataFrame:
    parts = [_no_rows(MESSAGES_COLUMNS).assign(run_id=pd.Series(dtype="string"))]
    for run, folder in folders.items():
        path = folder / MESSAGES
        if path.exists():
            try:
                table = pq.read_table(path, partitioning=None, columns=list(MESSAGES_COLUMNS))
            except (pa.ArrowInvalid, OSError) as error:
                raise ResultsError(f"{path} is damaged: {error}; leave {folder} out") from None
            if lacking := set(MESSAGES_COLUMNS) - set(table.column_names):
                raise ResultsError(f"{path} has no column {', '.join(sorted(lacking))}")
            parts.append(table.to_pandas().assign(run_id=run))
    messages = pd.concat(parts, ignore_index=True)
    dtypes = {"run_id": "string", **{n: column.dtype for n, column in MESSAGES_COLUMNS.items()}}
    return messages[list(dtypes)].astype(dtypes)
