"""The sweep's records: columns with types and units, atomic writes, run folders, their tables."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import pandas as pd
import yaml

from fedbw_sweep.config import SCHEMA_VERSION, RunConfig
from fedbw_sweep.errors import ResultsError

RESULTS, ROUNDS = "results.csv", "rounds.csv"
CONFIG, MESSAGES, TIMING, STATUS = "config.yaml", "messages.parquet", "timing.csv", "status.json"

AXES = ("compression", "num_clients", "fraction_fit", "rounds", "local_epochs")
"""The five axes of a sweep: the first columns and the order of the rows of ``results.csv``."""


@dataclass(frozen=True)
class Column:
    """A column's pandas dtype and what it means, with its unit."""

    dtype: str
    meaning: str


RESULTS_COLUMNS: Mapping[str, Column] = {
    "run_id": Column("string", "hash of the run's science config and the schema version"),
    "status": Column("string", "done or failed"),
    "error": Column("string", "why a failed run failed"),
    "clients_per_round": Column("Int64", "clients sampled each round: max(1, floor(f x n))"),
    "model_parameters": Column("Int64", "coordinates of the vector that travels"),
    "dense_message_bytes": Column("Int64", "payload bytes of one message sent dense in fp32"),
    "uplink_bytes": Column("Int64", "payload bytes, clients to server, all rounds"),
    "downlink_bytes": Column("Int64", "payload bytes, server to clients, all rounds"),
    "total_bytes": Column("Int64", "payload bytes in both directions"),
    "uplink_message_bytes": Column("Int64", "bytes Flower counts, clients to server"),
    "downlink_message_bytes": Column("Int64", "bytes Flower counts, server to clients"),
    "dense_uplink_bytes": Column("Int64", "payload bytes had every update been sent dense in fp32"),
    "uplink_ratio": Column("Float64", "compression ratio: dense_uplink_bytes / uplink_bytes"),
    "total_ratio": Column("Float64", "dense bytes in both directions / total_bytes"),
    "bits_per_coordinate": Column(
        "Float64", "mean uplink payload bits per coordinate of an update"
    ),
    "predicted_bytes": Column("Int64", "the seed's formula for total_bytes; empty if unknowable"),
    "prediction": Column("string", "exact (a fixed-size method) or estimate"),
    "initial_loss": Column("Float64", "held-out loss before training, nats per token"),
    "loss": Column("Float64", "held-out loss after the last round, nats per token"),
    "perplexity": Column("Float64", "exp(loss)"),
    "bits_per_byte": Column("Float64", "held-out loss in bits per UTF-8 byte of text"),
    "model_hash": Column("string", "SHA-256 of the final model's arrays"),
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
    "uplink_ratio": Column("Float64", "dense_uplink_bytes / uplink_bytes"),
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
}

TIMING_COLUMNS: Mapping[str, Column] = {
    "round": Column("int64", "communication round; 0 is the initial evaluation"),
    "round_seconds": Column("float64", "wall-clock seconds since the previous row"),
    "evaluate_seconds": Column("float64", "of which the held-out loss"),
    "train_seconds": Column("float64", "clients' training, summed over clients"),
    "encode_seconds": Column("float64", "clients' encoding, summed over clients"),
}


def config_columns(science: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a science config to dotted columns; a group's own name stands under the group.

    ``{"data": {"name": "text", "alpha": 1.0}}`` gives the columns ``data`` and ``data.alpha``.
    """
    columns: dict[str, Any] = {}
    for key, value in science.items():
        if not isinstance(value, Mapping):
            columns[key] = value
            continue
        for inner, inner_value in value.items():
            if inner == "_target_":
                continue
            name = key if inner == "name" else f"{key}.{inner}"
            is_plain = inner_value is None or isinstance(inner_value, str | int | float | bool)
            columns[name] = inner_value if is_plain else json.dumps(inner_value, sort_keys=True)
    return columns


@dataclass
class RunRecord:
    """What one run leaves, filled in as it goes; `write` puts it on disk.

    Attributes
    ----------
    status, error
        How it ended, and why if it failed.
    summary
        Values of `RESULTS_COLUMNS`.
    rounds, messages, timing
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
    timing: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, sweep_dir: Path) -> None:
        """Write the run folder beside its final place and rename it there, ``status.json`` last."""
        folder = Path(mkdtemp(prefix=f".{self.config.run_id}-", dir=sweep_dir))
        try:
            text = yaml.safe_dump(self.config.science, sort_keys=False)
            (folder / CONFIG).write_text(text, encoding="utf-8")
            frame(self.rounds, ROUNDS_COLUMNS).drop(columns="run_id").to_csv(
                folder / ROUNDS, index=False
            )
            frame(self.messages, MESSAGES_COLUMNS).to_parquet(folder / MESSAGES, index=False)
            frame(self.timing, TIMING_COLUMNS).to_csv(folder / TIMING, index=False)
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


def frame(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> pd.DataFrame:
    """Build a table with exactly these columns in their own dtypes."""
    table = pd.DataFrame(list(rows), columns=list(columns))
    return table.astype({name: column.dtype for name, column in columns.items()})


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return a run folder's ``status.json``, or None if the run never got that far."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ResultsError(f"{folder / STATUS} is damaged: {error}; delete {folder}") from None
        if status.get("schema_version") != SCHEMA_VERSION:
            raise ResultsError(
                f"{folder} has schema version {status.get('schema_version')}, this version reads "
                f"{SCHEMA_VERSION}; use another sweep folder (sweep=<name>)"
            )
        return dict(status)
    return None


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
    rounds : pandas.DataFrame
        A row per run and round, `ROUNDS_COLUMNS`, the runs in the same order.
    """
    rows, rounds = [], {}
    for folder in sorted(sweep_dir.iterdir()):
        if folder.name.startswith(".") or (status := read_status(folder)) is None:
            continue
        science = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        own = {key: status[key] for key in ("run_id", "status", "error")}
        rows.append({**config_columns(science), **own, **status["summary"]})
        dtypes = {name: column.dtype for name, column in ROUNDS_COLUMNS.items()}
        own_rounds = pd.read_csv(folder / ROUNDS, dtype=dtypes)
        rounds[folder.name] = own_rounds.assign(run_id=folder.name)[list(dtypes)]

    names = dict.fromkeys(name for row in rows for name in row if name not in RESULTS_COLUMNS)
    settings = [*AXES, "seed", *sorted(set(names) - {*AXES, "seed"})]
    results = pd.DataFrame(rows, columns=[*settings, *RESULTS_COLUMNS], dtype=object)
    whole = [name for name in settings if _is_whole(results[name])]
    dtypes = {name: column.dtype for name, column in RESULTS_COLUMNS.items()}
    results = results.astype({**dtypes, **dict.fromkeys(whole, "Int64")})
    results = results.sort_values([*AXES, "seed", "run_id"], ignore_index=True)
    in_order = [rounds[run] for run in results["run_id"]]
    all_rounds = pd.concat(in_order, ignore_index=True) if in_order else frame([], ROUNDS_COLUMNS)
    _write_atomically(results, sweep_dir / RESULTS)
    _write_atomically(all_rounds, sweep_dir / ROUNDS)
    return results, all_rounds


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
