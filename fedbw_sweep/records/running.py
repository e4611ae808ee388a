"""What a run under way says of itself."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.claims import claimed_by
from fedbw_sweep.records.files import parse_json, read_file
from fedbw_sweep.records.place import write_file

RUNNING = "running.json"

LIMIT = 2**16
"""Bytes that it may have."""


class Heartbeat:
    """Keeps a run's ``running.json`` up to date; called with each row of its ``rounds.csv``.

    Parameters
    ----------
    config : RunConfig
        The run.
    sweep_dir : pathlib.Path
        Where its folder is, or will be.
    """

    def __init__(self, config: RunConfig, sweep_dir: Path) -> None:
        self.path = sweep_dir / config.run_id / RUNNING
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
        self.state = {
            "started": time.time(),
            "rounds": config.rounds,
            "round": 0,
            "loss": None,
        }
        self._write()

    def __call__(self, row: dict[str, Any]) -> None:
        """Note a finished round."""
        self.state |= {"round": row["round"], "loss": row["loss"]}
        self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk fails no run
            write_file(self.path, json.dumps(self.state).encode())


def read_running(folder: Path) -> dict[str, Any] | None:
    """Return what a run under way says of itself, or None if no process has claimed it."""
    path = folder / RUNNING
    if not path.exists() or claimed_by(folder) is None:
        return None
    with suppress(FileNotFoundError, ResultsError):
        state = parse_json(path, read_file(path, LIMIT))
        kinds = {"started": int | float, "rounds": int, "round": int}
        if not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
            return None
        if not isinstance(state.get("loss"), int | float | None):
            return None
        return state
    return None
