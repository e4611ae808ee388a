"""A run's state between its rounds, on disk: the folder ``checkpoint/`` in the run's own.

``state.json`` names every other file with its size and SHA-256, and is renamed into its place when
they are on the disk. So whenever a process is killed, it names a whole state. Files that only grow
are named with the length that counts. What a save leaves unchanged it does not write again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.check import canonical, digest
from fedbw_sweep.records.files import parse_json
from fedbw_sweep.records.place import hidden
from fedbw_sweep.records.schema import CHECKPOINT
from fedbw_sweep.records.trees import parse_tree, write_tree

STATE = "state.json"


LOGS = ROUNDS, UPDATES = "rounds", "updates"
"""The files that grow: a line of JSON for each round, and updates to the clients' models."""

FORMAT = 1
"""Version of these files; another version's are not gone on from."""

STATE_LIMIT = 2**28
"""Bytes that ``state.json`` may have."""


@dataclass(frozen=True)
class Made:
    """By what a state was made: only the same may go on from it.

    Attributes
    ----------
    trajectory : str
        What its runs have in common; see `trajectory_of`.
    versions : mapping of str to str
        Of the packages that compute.
    device : str
        cpu, or a GPU's name.
    """

    trajectory: str
    versions: Mapping[str, str]
    device: str

    def differs(self, other: Made) -> str | None:
        """Say in what another's state was made differently; None if in nothing."""
        if other.trajectory != self.trajectory:
            return "it is of another run, or of another version's"
        if other.device != self.device:
            return f"it was made on {other.device}, not on {self.device}"
        for name, version in self.versions.items():
            if (before := other.versions.get(name)) != version:
                return f"it was made with {name} {before}, not {version}"
        return None


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint: its name, how many of its bytes count, and their SHA-256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its ``state.json`` states it; files are checked when they are read.

    Attributes
    ----------
    folder : pathlib.Path
    made : Made
    round : int
        The last round that is over.
    whole : bool
        Whether a run may end with that round: the parts of its uplink were counted.
    processors : list of str
        Those that its rounds were trained on, in order.
    trees, logs : dict of str to Entry
        The files written whole, and those that grow.
    """

    folder: Path
    made: Made
    round: int
    whole: bool
    processors: list[str]
    trees: dict[str, Entry]
    logs: dict[str, Entry]

    def tree(self, name: str) -> Any:
        """Read a file that was written whole.

        Raises
        ------
        DamagedError
            If it is not what was written.
        """
        entry = self.trees[name]
        return parse_tree(self.folder / entry.file, self._data(entry))

    def log(self, name: str) -> bytes:
        """Read what counts of a file that grows.

        Raises
        ------
        DamagedError
            If it is not what was written.
        """
        return self._data(self.logs[name])

    def check(self) -> None:
        """Check every file.

        Raises
        ------
        DamagedError
            Naming the first that is not what was written.
        """
        for entry in [*self.trees.values(), *self.logs.values()]:
            self._data(entry)

    def _data(self, entry: Entry) -> bytes:
        path = self.folder / entry.file
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < entry.size:
                    raise DamagedError(f"{path} is damaged: it is cut")
                data = file.read(entry.size)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        if digest(data) != entry.sha256:
            raise DamagedError(f"{path} is damaged: it is not what was written, by its hash")
        return data


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read what a run's folder says of its checkpoint; None if it has none.

    Raises
    ------
    DamagedError
        If it is not what was written, or another version wrote it.
    """
    path = folder / CHECKPOINT / STATE
    try:
        if path.parent.is_symlink() or path.stat().st_size > STATE_LIMIT:
            raise DamagedError(f"{path} is none of this package's")
        said = parse_json(path, path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if said.get("format") != FORMAT:
        raise DamagedError(f"{path} is another version's: format {said.get('format')}")
    own = said.pop("sha256", None)
    if own != _own_digest(said):
        raise DamagedError(f"{path} is damaged: it is not what was written, by its own hash")
    try:
        entries = {
            kind: {name: Entry(*values) for name, values in said[kind].items()}
            for kind in ("trees", "logs")
        }
        for entry in [*entries["trees"].values(), *entries["logs"].values()]:
            if Path(entry.file).name != entry.file or entry.size < 0:
                raise ValueError(entry.file)
        return Checkpoint(
            path.parent, Made(**said["made"]), int(said["round"]), bool(said["whole"]),
            [str(name) for name in said["processors"]], **entries,
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


class Store:
    """Writes the checkpoints of runs that are trained together, one after the other.

    Parameters
    ----------
    run_folder : pathlib.Path
        Of the run that trains for longest; the others end before.
    made : Made
        By what its states are made.
    processor : str
        What trains from now on.
    keep_bytes : float
        Up to which weight the last one is kept.
    start : Checkpoint or None
        What to go on from, here or in another run's folder.
    say : callable
        Called with each line for the user.
    """

    def __init__(
        self,
        run_folder: Path,
        made: Made,
        processor: str,
        keep_bytes: float,
        start: Checkpoint | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.made, self.keep_bytes = run_folder / CHECKPOINT, made, keep_bytes
        self.processor, self.say, self._complained = processor, say, False
        self.restart(start)

    def restart(self, start: Checkpoint | None) -> None:
        """Go on from a checkpoint, or from none."""
        self.start = start
        self.saved = -1  # the round of the last one
        own = start is not None and start.folder == self.folder
        self._trees = dict(start.trees) if start is not None and own else {}
        self._logs = {name: _Log(self.folder, name) for name in LOGS}
        before = [] if start is None else start.processors
        self.processors = [*before, *([self.processor] if self.processor not in before else [])]
        if start is not None and own:
            self.saved = start.round
            for name, entry in start.logs.items():
                self._logs[name] = _Log(self.folder, name, entry.size, start.log(name))

    @property
    def weight(self) -> int:
        """Bytes of the last checkpoint."""
        entries = [*self._trees.values(), *(log.entry for log in self._logs.values())]
        return sum(entry.size for entry in entries)

    @property
    def is_kept(self) -> bool:
        """Whether it is light enough to be kept when its run has ended."""
        return self.weight <= self.keep_bytes

    def complain(self, error: Exception) -> None:
        """Say, once, that states cannot be written."""
        if not self._complained:
            why = getattr(error, "strerror", None) or error
            self.say(f"{self.folder} cannot be written: {why}; without it a run starts over")
        self._complained = True

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that grows; it counts from the next save on.

        Raises
        ------
        OSError
            If it cannot be written now; the next call, or the next save, tries again.
        """
        self.folder.mkdir(exist_ok=True)
        self._logs[name].append(data)

    def save(self, number: int, whole: bool, trees: Iterable[tuple[str, Any]]) -> None:
        """Write a state.

        Parameters
        ----------
        number, whole
            See `Checkpoint`.
        trees : iterable of (str, tree)
            The parts of the state that have changed since the last one that was saved, each taken
            when the one before is written.

        Raises
        ------
        OSError
            If it cannot be written; then the last one stays.
        TypeError
            If a part holds what `write_tree` does not take.
        """
        self.folder.mkdir(exist_ok=True)
        changed = {}
        for name, tree in trees:
            file = f"{name}.{number}"
            changed[name] = Entry(file, *write_tree(self.folder / file, tree))
        for log in self._logs.values():
            log.sync()
        entries = {**self._trees, **changed}
        state = {
            "format": FORMAT,
            "made": vars(self.made),
            "round": number,
            "whole": whole,
            "processors": self.processors,
            "trees": {name: list(vars(entry).values()) for name, entry in entries.items()},
            "logs": {name: list(vars(log.entry).values()) for name, log in self._logs.items()},
        }
        _write_synced(
            self.folder / STATE, json.dumps({**state, "sha256": _own_digest(state)}).encode()
        )
        self._trees, self.saved = entries, number
        self._remove_others()

    def copy_to(self, run_folder: Path) -> None:
        """Keep the last state for another run as well, which has just ended.

        Raises
        ------
        OSError
            If it cannot be written; then the other run has none.
        """
        place = run_folder / CHECKPOINT
        with suppress(FileNotFoundError):
            shutil.rmtree(place)
        copy = hidden(place)
        try:
            copy.mkdir()
            for file in self._files():
                shutil.copyfile(self.folder / file, copy / file)
            shutil.copyfile(self.folder / STATE, copy / STATE)
            copy.rename(place)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _files(self) -> Iterator[str]:
        yield from (entry.file for entry in self._trees.values())
        yield from (log.name for log in self._logs.values())

    def _remove_others(self) -> None:
        own = {STATE, *self._files()}
        for path in self.folder.iterdir():
            if path.name not in own:
                path.unlink(missing_ok=True)


class _Log:
    """A file that grows; what is beyond its end was written by a process that was killed."""

    def __init__(self, folder: Path, name: str, size: int = 0, data: bytes = b"") -> None:
        self.name, self.path, self.size = name, folder / name, size
        self.digest, self.waiting = hashlib.sha256(data), b""

    @property
    def entry(self) -> Entry:
        """Its file, as far as it is written."""
        return Entry(self.name, self.size, self.digest.hexdigest())

    def append(self, data: bytes) -> None:
        self.waiting += data
        self._write()

    def _write(self) -> None:
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(self.waiting)
        self.digest.update(self.waiting)
        self.size += len(self.waiting)
        self.waiting = b""

    def sync(self) -> None:
        """See to it that what was appended is on the disk."""
        self._write()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def _own_digest(state: Mapping[str, Any]) -> str:
    return digest(canonical(state).encode())


def _write_synced(path: Path, data: bytes) -> None:
    """Rename a file into its place once it is on the disk; then the rename is, too."""
    temporary = hidden(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(PermissionError):  # where a folder cannot be opened, as on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
