"""``python -m fedbw_sweep.status SWEEP``: what is done, running, failed or missing, and time left.

A run under way keeps ``running.json`` in its folder up to date; the finished run's folder takes its
place.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedbw_sweep.config import RunConfig
from fedbw_sweep.console import output_console
from fedbw_sweep.errors import FedbwError
from fedbw_sweep.report.table import run_labels, varying_settings
from fedbw_sweep.results import TIMING, load_records

RUNNING = "running.json"
STATES = {"done": "green", "running": "cyan", "failed": "red", "missing": "yellow"}


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


def sweep_status(sweep_dir: Path) -> tuple[pd.DataFrame, float]:
    """Say how far a sweep is.

    Returns
    -------
    runs : pandas.DataFrame
        A row per run: ``run_id``, ``settings`` that tell it apart, ``status``, ``detail``.
    seconds_left : float
        Estimated from the finished runs; NaN before one is finished or when nothing is under way.

    Raises
    ------
    ResultsError
        If there is no sweep in the folder.
    """
    results = load_records(sweep_dir, messages=False).results
    running = {run: read_running(sweep_dir / run) for run in results["run_id"]}
    rows, remaining, under_way = [], 0.0, 0
    for run, status, error in results[["run_id", "status", "error"]].itertuples(index=False):
        detail = "" if pd.isna(error) else str(error).strip().splitlines()[-1]
        if (state := running[run]) is not None:
            status, under_way = "running", under_way + 1
            remaining += 1 - state["round"] / max(1, state["rounds"])
            loss = "" if state["loss"] is None else f", loss {state['loss']:.3f}"
            detail = (
                f"round {state['round']} of {state['rounds']}{loss}, "
                f"{_duration(time.time() - state['started'])} so far"
            )
        elif status == "missing":
            remaining += 1
        rows.append((run, status, detail))
    runs = pd.DataFrame(rows, columns=["run_id", "status", "detail"])
    runs.insert(1, "settings", run_labels(results, varying_settings(results)).to_numpy())
    seconds = [
        pd.read_csv(sweep_dir / run / TIMING)["round_seconds"].sum()
        for run in runs.loc[runs["status"] == "done", "run_id"]
        if (sweep_dir / run / TIMING).exists()
    ]
    if not under_way or not seconds:
        return runs, math.nan
    return runs, remaining * float(pd.Series(seconds).median()) / under_way


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 2 if there is no sweep there."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.status", description="Show how far a sweep is."
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="its folder: outputs/<sweep>")
    given = parser.parse_args(arguments)
    try:
        runs, seconds_left = sweep_status(given.sweep)
    except FedbwError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        return 2
    table = Table()
    for name in runs.columns:
        table.add_column(name)
    for run, settings, status, detail in runs.itertuples(index=False):
        table.add_row(run, escape(settings), f"[{STATES[status]}]{status}[/]", escape(detail[:120]))
    output = output_console()
    output.print(table)
    counts = runs["status"].value_counts()
    said = ", ".join(f"{counts.get(state, 0)} {state}" for state in STATES)
    left = "" if math.isnan(seconds_left) else f"; about {_duration(seconds_left)} left"
    output.print(f"{len(runs)} runs: {said}{left}")
    return 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
