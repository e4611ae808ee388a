"""What a run under way says of itself."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import RunConfig

RUNNING = "running.json"


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
        self.path.parent.mkdir(exist_ok=True)
        self.state = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
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
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state), encoding="utf-8")
        temporary.replace(self.path)


def read_running(folder: Path) -> dict[str, Any] | None:
    """Return what a run under way says of itself, or None if nothing runs there.

    A process of this machine that no longer exists is not running; one of another machine is taken
    at its word.
    """
    with suppress(FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        state = dict(json.loads((folder / RUNNING).read_text(encoding="utf-8")))
        if state["host"] != socket.gethostname():
            return state
        with suppress(ProcessLookupError):
            with suppress(PermissionError):  # somebody else's process, but it is there
                os.kill(state["pid"], 0)
            return state
    return None
