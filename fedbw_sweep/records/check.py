"""Whether a record is what was written: the one place that says so.

``status.json`` holds, under `HASHES`, the SHA-256 of each file of the run's folder and, as its own,
that of its canonical JSON without this one hash. Hashes without a key find accidents and careless
edits; whoever makes them right again is found by doing the run again alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedbw_sweep.config.identity import RECORD_FORMAT, numerics_of, run_id_of
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.errors import ConfigError, DamagedError
from fedbw_sweep.records.files import LIMITS, Place, parse_settings, read_file
from fedbw_sweep.records.place import write_file
from fedbw_sweep.records.schema import CONFIG, STATUS

HASHES, SUMS = "sha256", "SHA256SUMS"


canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sealed(status: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Add the hashes to what a ``status.json`` says.

    Parameters
    ----------
    status : mapping
        Without hashes, or with those of another time.
    files : mapping of str to bytes
        The other files of the run's folder, by name.
    """
    hashes = {name: digest(data) for name, data in sorted(files.items())}
    whole = {**status, HASHES: hashes}
    return {**whole, HASHES: {**hashes, STATUS: _own_digest(whole)}}


def _own_digest(status: Mapping[str, Any]) -> str:
    others = {name: value for name, value in status[HASHES].items() if name != STATUS}
    return digest(canonical({**status, HASHES: others}).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes of a sweep's tables, by name: the lines of its ``SHA256SUMS``."""
    with suppress(FileNotFoundError, DamagedError, UnicodeDecodeError):
        text = read_file(folder / SUMS, LIMITS[CONFIG]).decode()
        pairs = [line.split("  ", 1) for line in text.splitlines()]
        return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
    return {}


def write_sums(folder: Path, tables: Mapping[str, bytes]) -> None:
    """Write the hashes of a sweep's tables; ``sha256sum -c SHA256SUMS`` checks them as well."""
    lines = [f"{digest(data)}  {name}\n" for name, data in tables.items()]
    write_file(folder / SUMS, "".join(lines).encode())


def check_status(path: Place, status: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Check a ``status.json`` by its own hash.

    Returns
    -------
    hashes : mapping of str to str, or None
        Of the other files, by name; None if the record was made before there were any.

    Raises
    ------
    DamagedError
        If it is not what was written.
    """
    hashes: Mapping[str, str] | None = status.get(HASHES)
    if hashes is None:
        return None
    plain = isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
    try:
        whole = plain and hashes.get(STATUS) == _own_digest(status)
    except (RecursionError, ValueError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is damaged: it is not what was written, by its own hash")
    return hashes


def check_file(path: Place, data: bytes | None, hashes: Mapping[str, str] | None) -> None:
    """Check the content of one file of a run's folder; None stands for a file that is not there.

    Raises
    ------
    DamagedError
        If the record has another content, or has no such file.
    """
    if hashes is None:
        return
    expected = hashes.get(os.fspath(path).rpartition(os.sep)[2])
    if data is None:
        if expected is not None:
            raise DamagedError(f"{path} is missing, which the record has")
    elif expected is None:
        raise DamagedError(f"{path} is none of the record's files")
    elif digest(data) != expected:
        raise DamagedError(f"{path} is damaged: it is not what was written, by its hash")


def check_folder(folder: Path, hashes: Mapping[str, str] | None) -> None:
    """Check the content of every file that a record has a hash of.

    Raises
    ------
    DamagedError
        Naming the first that is not what was written.
    """
    for name in hashes or ():
        if name == STATUS:
            continue
        if Path(name).name != name:
            raise DamagedError(f"{folder / STATUS} is damaged: {name!r} is no file's name")
        path = folder / name
        try:
            data = read_file(path, LIMITS.get(name, max(LIMITS.values())))
        except FileNotFoundError:
            data = None
        check_file(path, data, hashes)


def check_id(folder: Path, status: Mapping[str, Any]) -> None:
    """Check that a run's ``config.yaml`` makes its id.

    Raises
    ------
    DamagedError
        If it makes another, is not there, or is no config.
    """
    path = folder / CONFIG
    try:
        science = parse_settings(path, read_file(path, LIMITS[CONFIG]))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    if status["schema_version"] != RECORD_FORMAT:
        return  # ids were made in another way
    made = id_of(path, science, status["numerics"])
    if made != status["run_id"]:
        raise DamagedError(
            f"{path} is not what {status['run_id']} was made of (it makes {made}): it was changed, "
            "or another version means something else by it"
        )


def id_of(path: Place, science: Mapping[str, Any], numerics: int | None = None) -> str:
    """Make the id that a ``config.yaml`` makes, by default at today's `numerics`.

    Raises
    ------
    DamagedError
        If its settings are none.
    """
    try:
        settings = rename_settings(science)
        return run_id_of(settings, numerics_of(settings) if numerics is None else numerics)
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
