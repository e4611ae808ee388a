"""Nested plain values and arrays <-> a file of nothing else: JSON, then the arrays as .npy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.errors import DamagedError

Arrays = list[NDArray[np.generic]]

PLAIN = (str, bool, int, float, type(None))


NOT_ONE = (
    ValueError, TypeError, LookupError, MemoryError, RecursionError, SyntaxError, TokenError,
)  # fmt: skip
"""What NumPy and json raise of files that are no trees; NumPy parses headers as Python literals."""


def write_tree(path: Path, tree: Any) -> tuple[int, str]:
    """Write a file, and see to it that it is on the disk.

    Parameters
    ----------
    path : pathlib.Path
    tree : dict, list, tuple, bytes, ndarray, str, int, float, bool or None
        Of any depth. Arrays are written from where they lie.

    Returns
    -------
    size : int
        Bytes.
    sha256 : str
        Of them, in hexadecimal digits.

    Raises
    ------
    TypeError
        If the tree holds anything else.
    OSError
        If the file cannot be written.
    """
    arrays: Arrays = []
    text = json.dumps(_taken_apart(tree, arrays)).encode()
    with path.open("wb") as file:
        hashed = _Hashed(file)
        for array in (np.frombuffer(text, np.uint8), *arrays):
            np.lib.format.write_array(hashed, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return hashed.size, hashed.digest.hexdigest()


def parse_tree(path: Path, data: bytes) -> Any:
    """Make of a file's content what `write_tree` was given.

    Raises
    ------
    DamagedError
        If it is no such file.
    """
    file = BytesIO(data)

    def arrays() -> Iterator[NDArray[np.generic]]:
        while file.tell() < len(data):
            yield np.lib.format.read_array(file, allow_pickle=False)

    try:
        text, *rest = arrays()
        return _put_together(json.loads(text.tobytes()), rest)
    except NOT_ONE as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


class _Hashed:
    """Hashes what goes into a file on its way."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += self.file.write(data)


def _taken_apart(tree: Any, arrays: Arrays) -> Any:
    """Return what JSON can say of a tree; its arrays are added to `arrays`."""
    if isinstance(tree, bytes):
        arrays.append(np.frombuffer(tree, np.uint8))
        return {"bytes": len(arrays) - 1}
    if isinstance(tree, np.ndarray):
        arrays.append(tree)
        return {"array": len(arrays) - 1}
    if isinstance(tree, dict):
        return {"dict": [[key, _taken_apart(value, arrays)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_taken_apart(value, arrays) for value in tree]}
    if type(tree) not in PLAIN:
        raise TypeError(f"a {type(tree).__name__} cannot be kept")
    return tree


def _put_together(said: Any, arrays: Arrays) -> Any:
    """Undo `_taken_apart`."""
    if not isinstance(said, dict):
        return said
    [[kind, value]] = said.items()
    if kind == "bytes":
        return arrays[value].tobytes()
    if kind == "array":
        return arrays[value]
    if kind == "dict":
        return {key: _put_together(each, arrays) for key, each in value}
    values = [_put_together(each, arrays) for each in value]
    return tuple(values) if kind == "tuple" else values
