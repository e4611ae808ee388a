"""Files of records, which may be anybody's: read within limits, and nothing in them is run."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedbw_sweep.console import CONTROL, printable
from fedbw_sweep.errors import DamagedError, ResultsError
from fedbw_sweep.records.schema import CONFIG, MESSAGES, PARTS, ROUNDS, STATUS, TIMING

Place = str | os.PathLike[str]
"""The path of a file."""

LIMITS = {
    CONFIG: 2**20,
    STATUS: 2**24,
    ROUNDS: 2**26,
    PARTS: 2**24,
    TIMING: 2**26,
    MESSAGES: 2**26,
}
"""Bytes that each file of a run's folder may have."""

TABLE_LIMIT = 2**31
"""Bytes that a sweep's ``results.csv`` or ``rounds.csv`` may have."""

NESTING = 30
"""How deep values may be nested in a ``config.yaml`` or a ``status.json``."""

_FEW = 1000
"""A YAML text with fewer line ends, dashes and brackets cannot be nested deep enough to matter."""

_MALFORMED = (
    yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""What PyYAML and json raise of texts that are not what they should be."""


def inside(folder: Path, name: str) -> str:
    """Return the path of a file in a folder as text: to join Paths takes longer than to read."""
    return f"{folder}{os.sep}{name}"


def read_file(path: Place, limit: int, *, follow: bool = False) -> bytes:
    """Read a regular file.

    Parameters
    ----------
    path : str or pathlib.Path
    limit : int
        Bytes that it may have.
    follow : bool
        Whether it may be a link.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    DamagedError
        If it is a link, no regular file, or too large.
    ResultsError
        If it cannot be read.
    """
    # A named pipe opens at once, rather than when somebody writes into it.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        opened = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{path} is a link, which is not followed") from None
        if error.errno == errno.ENXIO:  # a socket
            raise DamagedError(f"{path} is no regular file") from None
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    try:
        about = os.fstat(opened)
        if not stat.S_ISREG(about.st_mode):
            raise DamagedError(f"{path} is no regular file")
        if about.st_size > limit:
            raise DamagedError(f"{path} has {about.st_size:,} bytes, at most {limit:,} are read")
        data = os.read(opened, about.st_size)
        while len(data) < about.st_size and (more := os.read(opened, about.st_size - len(data))):
            data += more
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(opened)
    return data


def parse_json(path: Place, data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    DamagedError
        If it is not one, or nested too deep.
    """
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise DamagedError(f"{path} is damaged: it is no JSON object")
        if data.count(b"{") + data.count(b"[") > NESTING:
            _check_nesting(values)
    except _MALFORMED as error:
        raise DamagedError(f"{path} is damaged: {_first_line(error)}") from None
    return values


def parse_settings(path: Place, data: bytes) -> dict[str, Any]:
    """Parse a ``config.yaml``: a mapping of texts, numbers, truth values, lists and mappings.

    Raises
    ------
    DamagedError
        If it is not one, is nested too deep, refers to its own parts or holds control characters.
    """
    try:
        marks = sum(data.count(mark) for mark in (b"\n", b"\r", b"-", b"?", b"[", b"{"))
        if marks > _FEW or b"&" in data:
            _refuse_bombs(data)
        values = yaml.load(data, yaml.CSafeLoader)
        if not isinstance(values, dict):
            raise DamagedError(f"{path} is damaged: it is not a mapping of settings")
        _check_plain(values)
        if b"\\" in data or not data.isascii():  # else the parser has refused them
            _refuse_control(values)
    except _MALFORMED as error:
        raise DamagedError(f"{path} is damaged: {_first_line(error)}") from None
    return values


def inert(value: Any) -> Any:
    """Return plain values with the control characters of their texts as escapes."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): inert(inner) for key, inner in value.items()}
    return [inert(inner) for inner in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).replace("\n", " "))


def _refuse_bombs(data: bytes) -> None:
    """Refuse a YAML text that would become larger, or nested deeper, than it looks."""
    depth = 0
    for event in yaml.parse(data, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it refers to its own part {event.anchor}, as no record does")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > NESTING:
            raise ValueError(f"its values are nested more than {NESTING} deep")


def _check_nesting(value: Any, depth: int = 0) -> None:
    if depth > NESTING:
        raise ValueError(f"its values are nested more than {NESTING} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_nesting(inner, depth + 1)


def _check_plain(values: Mapping[Any, Any], depth: int = 0) -> None:
    """Refuse what no setting is: dates, sets, bytes, keys that are no texts."""
    if depth > NESTING:
        raise ValueError(f"its values are nested more than {NESTING} deep")
    for key, value in values.items():
        if type(key) is not str:
            raise ValueError(f"its key {key!r} is no text")
        kind = type(value)
        if kind is dict:
            _check_plain(value, depth + 1)
        elif kind is list:
            _check_plain(dict(zip(map(str, range(len(value))), value, strict=True)), depth + 1)
        elif kind is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"its number {value:.3g} has more than 64 bits")
        elif kind not in (str, int, float, bool, type(None)):
            raise ValueError(f"its value {value!r} is no setting")


def _refuse_control(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_control(key)
            _refuse_control(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_control(inner)
    elif isinstance(value, str) and CONTROL.search(value):
        raise ValueError(f"its text {value!r} holds control characters")
