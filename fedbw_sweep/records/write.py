"""A run's folder: announced, then written whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from csv import DictWriter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedbw_sweep.config.identity import RECORD_FORMAT
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.schema import (
    ARROW,
    CONFIG,
    FORMAT_2,
    MESSAGES,
    MESSAGES_COLUMNS,
    PARTS,
    PARTS_COLUMNS,
    READ,
    RESULTS,
    RESULTS_COLUMNS,
    ROUNDS,
    ROUNDS_COLUMNS,
    STATES,
    STATUS,
    TIMING,
    TIMING_COLUMNS,
)


@dataclass
class RunRecord:
    """What one run leaves, filled in as it goes; `write` puts it on disk.

    Attributes
    ----------
    status, end, error
        Whether it was done, how it ended (see `ENDS`), and why if it failed or ended early.
    summary
        Values of `RESULTS_COLUMNS`.
    rounds, messages, parts, timing
        Rows of the files of the same names.
    environment
        Versions and execution settings: recorded, but no part of the results.
    """

    config: RunConfig
    status: Literal["done", "failed"] = "failed"
    end: str = "failed"
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
            rounds = ({k: v for k, v in row.items() if k != "run_id"} for row in self.rounds)
            if unknown := self.summary.keys() - RESULTS_COLUMNS:
                raise ValueError(f"{unknown} are no columns of {RESULTS}: see records/schema.py")
            _write_csv(rounds, own, folder / ROUNDS)
            _write_csv(self.parts, PARTS_COLUMNS, folder / PARTS)
            _write_csv(self.timing, TIMING_COLUMNS, folder / TIMING)
            types = pa.schema([(n, ARROW[c.dtype]) for n, c in MESSAGES_COLUMNS.items()])
            pq.write_table(pa.Table.from_pylist(self.messages, types), folder / MESSAGES)
            status = {
                "schema_version": RECORD_FORMAT,
                "run_id": self.config.run_id,
                "numerics": self.config.numerics,
                "status": self.status,
                "end": self.end,
                "reason": self.error,
                **trained_on(self.environment),
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
    """Write rows as they are; only to build a table of them takes longer than all the rest.

    Raises
    ------
    ValueError
        If a row has what is no column: it would be lost.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = DictWriter(file, list(columns), lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return a run folder's ``status.json``, or None if the run never got that far."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ResultsError(f"{folder / STATUS} is damaged: {error}; delete {folder}") from None
        written_by = status.get("schema_version") if isinstance(status, dict) else None
        if written_by not in READ:
            raise ResultsError(
                f"{folder} has schema version {written_by}, this version reads "
                f"{' and '.join(map(str, READ))}; use another sweep folder (sweep=<name>)"
            )
        if written_by == FORMAT_2:
            status = from_format_2(status)
        ended = status.get("status") in STATES and isinstance(status.get("run_id"), str)
        if not ended or not isinstance(status.get("summary") or {}, dict):
            raise ResultsError(
                f"{folder / STATUS} is damaged: no run_id, status or summary; delete {folder}"
            )
        return {**trained_on(status.get("environment") or {}), **status}
    return None


def trained_on(environment: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the columns `MACHINE` of a run, by what was noted of its environment."""
    device, processor = environment.get("device", "cpu"), environment.get("processor")
    if device == "cpu":
        return {"device": "cpu", "processor": processor}
    return {"device": "cuda", "processor": f"{device}; {processor}"}


def from_format_2(status: dict[str, Any]) -> dict[str, Any]:
    """Return what ``status.json`` of format 2 would say in format 3."""
    error, environment = status.get("error"), status.get("environment") or {}
    return {
        **{key: value for key, value in status.items() if key != "error"},
        "numerics": FORMAT_2,
        "end": end_in_format_2(str(status.get("status")), error),
        "reason": error,
        **trained_on(environment),
    }


def end_in_format_2(status: str, error: str | None) -> str | None:
    """Say how a run of format 2 ended, which has its error alone."""
    if status != "failed":
        return "rounds" if status == "done" else None
    return "diverged" if "lower lr" in str(error) else "failed"


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
    """Whether the run is recorded as done, so that nothing is left to do.

    One that was trained on another device is: it is the same run, whatever computed it.
    """
    return device_of(config, sweep_dir) is not None


def device_of(config: RunConfig, sweep_dir: Path) -> str | None:
    """Return the device that a run is recorded as done on, cpu or cuda; None if it is not done."""
    status = read_status(sweep_dir / config.run_id)
    done = status is not None and status["status"] == "done"
    return status.get("device", "cpu") if status is not None and done else None
