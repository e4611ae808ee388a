"""Which runs are trained together, and from what they go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.errors import DamagedError
from fedbw_sweep.federation.books import books_key
from fedbw_sweep.federation.runs import end_of, own_row
from fedbw_sweep.records.checkpoint import ROUNDS, Checkpoint, Made, read_checkpoint
from fedbw_sweep.records.claims import claimed_by
from fedbw_sweep.records.schema import CHECKPOINT

Start = tuple[list[RunConfig], Checkpoint | None]
"""Runs that are trained together, those of more rounds first, and what they go on from."""


def together(configs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """Group runs that train the same and are executed alike, those of more rounds first."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        executed = config.model_dump_json(include=set(EXECUTION_KEYS))
        groups.setdefault(f"{config.trajectory} {executed}", []).append(config)
    return [sorted(group, key=lambda config: -config.rounds) for group in groups.values()]


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint and the rows of its rounds, by the runs' methods; see `books_key`."""

    checkpoint: Checkpoint
    rounds: list[Mapping[str, Any]]

    def serves(self, config: RunConfig) -> bool:
        """Whether a run can go on from it: the run did not end before, nor ends without parts."""
        key = books_key(config.compression)
        if not all(key in rows for rows in self.rounds):
            return False
        *before, last = (end_of(config, own_row(config, rows[key])) for rows in self.rounds)
        return not any(before) and (last is None or self.checkpoint.whole)


class Kept:
    """The checkpoints that a command's runs may go on from.

    Parameters
    ----------
    sweep_dir : pathlib.Path
    source : pathlib.Path or None
        A further folder, of a sweep or a run.
    say : callable
        Called with each line for the user; it may be the same one again.
    """

    def __init__(self, sweep_dir: Path, source: Path | None, say: Callable[[str], None]) -> None:
        self.say = say
        self._found: dict[str, list[Path]] = {}
        folders = _with_checkpoints(sweep_dir)
        if source is not None:
            folders += _with_checkpoints(source)
        for folder in folders:
            if (checkpoint := self._read(folder)) is not None:
                self._found.setdefault(checkpoint.made.trajectory, []).append(folder)

    def starts(self, configs: Sequence[RunConfig], sweep_dir: Path, made: Made) -> Iterator[Start]:
        """Split runs of one trajectory by what they go on from: as much as is there.

        Parameters
        ----------
        configs : sequence of RunConfig
            Those of more rounds first; this process has claimed them.
        sweep_dir : pathlib.Path
        made : Made
            By what their states are made.
        """
        own = [sweep_dir / config.run_id for config in configs]
        others = [f for f in self._found.get(made.trajectory, []) if f not in own]
        others = [folder for folder in others if claimed_by(folder) is None]
        candidates = [*self._candidates(own + others, made)]
        left = list(configs)
        while left:
            fitting = [each for each in candidates if each.serves(left[0])]
            best = max(fitting, key=lambda each: each.checkpoint.round, default=None)
            if best is not None and not self._is_whole(best.checkpoint):
                candidates.remove(best)
                continue
            group = [c for c in left if best is None or best.serves(c)]
            yield group, None if best is None else best.checkpoint
            left = [config for config in left if config not in group]

    def _candidates(self, folders: Iterable[Path], made: Made) -> Iterator[_Candidate]:
        for folder in folders:
            if (checkpoint := self._read(folder)) is None:
                continue
            if (why := made.differs(checkpoint.made)) is not None:
                self.say(f"{checkpoint.folder} is not gone on from: {why}")
                continue
            try:
                rows = [json.loads(line)["rows"] for line in checkpoint.log(ROUNDS).splitlines()]
            except DamagedError as error:
                self.say(f"{error}; it is not gone on from")
                continue
            if len(rows) == checkpoint.round + 1:
                yield _Candidate(checkpoint, rows)

    def _is_whole(self, checkpoint: Checkpoint) -> bool:
        try:
            checkpoint.check()
        except DamagedError as error:
            self.say(f"{error}; it is not gone on from")
            return False
        return True

    def _read(self, folder: Path) -> Checkpoint | None:
        try:
            return read_checkpoint(folder)
        except DamagedError as error:
            self.say(f"{error}; it is not gone on from")
            return None


def _with_checkpoints(folder: Path) -> list[Path]:
    """Return a folder, or those in it, that have a checkpoint."""
    if (folder / CHECKPOINT).is_dir():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if (path / CHECKPOINT).is_dir())
