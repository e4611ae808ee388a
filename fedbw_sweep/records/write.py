"""A run's folder: announced, then written whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from csv import DictWriter
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.markup import escape

from fedbw_sweep.config.identity import RECORD_FORMAT
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import message_console, printable
from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.check import sealed
from fedbw_sweep.records.folder import check_run, is_run
from fedbw_sweep.records.place import set_aside, write_file, write_folder
from fedbw_sweep.records.schema import (
    ARROW,
    CHECKPOINT,
    CONFIG,
    MESSAGES,
    MESSAGES_COLUMNS,
    PARTS,
    PARTS_COLUMNS,
    RESULTS,
    RESULTS_COLUMNS,
    ROUNDS,
    ROUNDS_COLUMNS,
    STATUS,
    TIMING,
    TIMING_COLUMNS,
)
from fedbw_sweep.records.status import trained_on


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

    def files(self) -> dict[str, bytes]:
        """Return what goes into the run's folder, by file name, ``status.json`` last."""
        own = [name for name in ROUNDS_COLUMNS if name != "run_id"]
        rounds = ({k: v for k, v in row.items() if k != "run_id"} for row in self.rounds)
        if unknown := self.summary.keys() - RESULTS_COLUMNS:
            raise ValueError(f"{unknown} are no columns of {RESULTS}: see records/schema.py")
        types = pa.schema([(n, ARROW[c.dtype]) for n, c in MESSAGES_COLUMNS.items()])
        messages = BytesIO()
        pq.write_table(pa.Table.from_pylist(self.messages, types), messages)
        files = {
            CONFIG: _config(self.config),
            ROUNDS: _csv(rounds, own),
            PARTS: _csv(self.parts, PARTS_COLUMNS),
            TIMING: _csv(self.timing, TIMING_COLUMNS),
            MESSAGES: messages.getvalue(),
        }
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
        text = json.dumps(sealed(status, files), indent=2)
        return {**files, STATUS: f"{text}\n".encode()}

    def write(self, sweep_dir: Path) -> bool:
        """Write the run's folder beside its place and rename it there.

        Returns
        -------
        bool
            False if the run is recorded as done already, by another command: that record stays.
        """
        return put_run(self.config.run_id, self.files(), sweep_dir)


def put_run(
    run_id: str, files: Mapping[str, bytes], sweep_dir: Path, *, with_checkpoint: bool = False
) -> bool:
    """Put a run's folder in its place, whole; see `RunRecord.write`.

    Parameters
    ----------
    run_id : str
    files : mapping of str to bytes
        What `RunRecord.files` returns.
    sweep_dir : pathlib.Path
    with_checkpoint : bool
        Whether the checkpoint that is there is kept.

    Raises
    ------
    OSError
        If it cannot be written, as on a full disk; then everything is as it was.
    """
    place = sweep_dir / run_id
    check_and_set_aside(place)
    return write_folder(
        place,
        files,
        lambda there: _device_of(there, run_id) is not None,
        CHECKPOINT if with_checkpoint else None,
    )


def _config(config: RunConfig) -> bytes:
    text: str = yaml.dump(config.science, Dumper=yaml.CSafeDumper, sort_keys=False)
    return text.encode()


def _csv(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> bytes:
    """Write rows as they are; only to build a table of them takes longer than all the rest.

    Raises
    ------
    ValueError
        If a row has what is no column: it would be lost.
    """
    text = StringIO(newline="")
    lines = DictWriter(text, list(columns), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue().encode()


def announce(configs: Iterable[RunConfig], sweep_dir: Path) -> None:
    """Leave a folder with only ``config.yaml`` for each run to do.

    Without it, a run whose process is killed would be missing without a trace. A damaged record
    that is in the way is set aside.
    """
    for config in configs:
        folder = sweep_dir / config.run_id
        if check_and_set_aside(folder) is None and not is_run(folder):
            folder.mkdir(exist_ok=True)
            write_file(folder / CONFIG, _config(config))


def check_and_set_aside(folder: Path) -> dict[str, Any] | None:
    """Return the status of a run's folder; set a damaged one aside, and say so."""
    try:
        return check_run(folder, whole=False)
    except DamagedError as error:
        if (place := set_aside(folder)) is not None:
            message_console().print(escape(printable(f"{error}; set aside as {place.name}")))
        return None


def is_done(config: RunConfig, sweep_dir: Path) -> bool:
    """Whether the run is recorded as done, so that nothing is left to do.

    One that was trained on another device is: it is the same run, whatever computed it. A damaged
    record is not.
    """
    return device_of(config, sweep_dir) is not None


def device_of(config: RunConfig, sweep_dir: Path) -> str | None:
    """Return the device that a run is recorded as done on, cpu or cuda; None if it is not done."""
    return _device_of(sweep_dir / config.run_id, config.run_id)


def _device_of(folder: Path, run_id: str) -> str | None:
    with suppress(DamagedError):
        status = check_run(folder, run_id, whole=False)
        if status is not None and status["status"] == "done":
            return str(status.get("device") or "cpu")
    return None
