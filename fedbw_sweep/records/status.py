"""A run's ``status.json``: read, checked, and of whatever format as of today's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbw_sweep.errors import DamagedError, ResultsError
from fedbw_sweep.records.check import check_status
from fedbw_sweep.records.files import LIMITS, Place, inert, inside, parse_json, read_file
from fedbw_sweep.records.schema import FORMAT_2, OF_STATUS, READ, RESULTS_COLUMNS, STATES, STATUS

RUN_ID = re.compile(r"[0-9a-f]{12}")


def read_status(folder: Path, run_id: str | None = None) -> dict[str, Any] | None:
    """Return a run folder's ``status.json``, or None if the run never got that far.

    Control characters in its texts are written as escapes.

    Parameters
    ----------
    folder : pathlib.Path
    run_id : str, optional
        The run whose folder it is; by default the one that it is named after.

    Raises
    ------
    DamagedError
        If it is not what was written, or is of another run than its folder.
    ResultsError
        If another version wrote it, or it cannot be read.
    """
    path = inside(folder, STATUS)
    run_id = run_id or id_of_folder(folder)
    if folder.is_symlink():
        raise DamagedError(f"{folder} is a link, which is not followed")
    try:
        data = read_file(path, LIMITS[STATUS])
    except FileNotFoundError:
        return None
    status = parse_json(path, data)
    if status.get("schema_version") not in READ:
        raise ResultsError(
            f"{folder} has schema version {status.get('schema_version')}, this version reads "
            f"{' and '.join(map(str, READ))}; use another sweep folder (sweep=<name>)"
        )
    check_status(path, status)
    if b"\\u" in data or not data.isascii():
        status = inert(status)
    if status["schema_version"] == FORMAT_2:
        status = from_format_2(status)
    _check_kinds(path, status)
    if status["run_id"] != run_id:
        raise DamagedError(f"{path} is damaged: it is {status['run_id']}'s, not {run_id}'s")
    return {**trained_on(status.get("environment") or {}), **status}


def id_of_folder(folder: Path) -> str:
    """Return the name of a run's folder, however its path is written."""
    return folder.name if RUN_ID.fullmatch(folder.name) else folder.resolve().name


def _check_kinds(path: Place, status: Mapping[str, Any]) -> None:
    """Check that what is said has the types of its columns.

    Raises
    ------
    DamagedError
        Naming the first that has not.
    """
    run_id, summary = status.get("run_id"), status.get("summary")
    environment = status.get("environment")
    if not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
        raise DamagedError(f"{path} is damaged: no run_id of twelve hexadecimal digits")
    if status.get("status") not in STATES or not isinstance(summary or {}, dict):
        raise DamagedError(f"{path} is damaged: no status or summary")
    if not isinstance(environment or {}, dict):
        raise DamagedError(f"{path} is damaged: its environment is none")
    for name, value in (summary or {}).items():
        _check_kind(path, name, value)
    for name in OF_STATUS:
        _check_kind(path, name, status.get(name))


_KINDS = {"string": (str,), "Int64": (int,), "Float64": (float, int)}

_KINDS_OF = {name: _KINDS[column.dtype] for name, column in RESULTS_COLUMNS.items()}


def _check_kind(path: Place, name: str, value: Any) -> None:
    kinds = _KINDS_OF.get(name)
    if kinds is None or value is None:
        return
    if type(value) not in kinds or (type(value) is int and not -(2**63) <= value < 2**63):
        raise DamagedError(
            f"{path} is damaged: {name} is {str(value)[:80]}, which is no "
            f"{RESULTS_COLUMNS[name].dtype}"
        )


def trained_on(environment: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the columns `MACHINE` of a run, by what was noted of its environment."""
    device, processor = environment.get("device", "cpu"), environment.get("processor")
    if device == "cpu":
        return {"device": "cpu", "processor": processor}
    return {"device": "cuda", "processor": f"{device}; {processor}"}


def from_format_2(status: dict[str, Any]) -> dict[str, Any]:
    """Return what ``status.json`` of format 2 would say in format 3."""
    error, environment = status.get("error"), status.get("environment")
    return {
        **{key: value for key, value in status.items() if key != "error"},
        "numerics": FORMAT_2,
        "end": end_in_format_2(str(status.get("status")), error),
        "reason": error,
        **trained_on(environment if isinstance(environment, dict) else {}),
    }


def end_in_format_2(status: str, error: str | None) -> str | None:
    """Say how a run of format 2 ended, which has its error alone."""
    if status != "failed":
        return "rounds" if status == "done" else None
    return "diverged" if "lower lr" in str(error) else "failed"
