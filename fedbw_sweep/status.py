"""``python -m fedbw_sweep.status SWEEP``: what is done, running, failed or missing, and time left.

A run under way keeps ``running.json`` in its folder up to date; the finished run's folder takes its
place.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from fedbw_sweep.console import (
    Fitted,
    duration,
    errors_end_the_command,
    output_console,
    printable,
    size,
)
from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records.check import HASHES
from fedbw_sweep.records.checkpoint import read_checkpoint
from fedbw_sweep.records.disk import weigh
from fedbw_sweep.records.find import find_records
from fedbw_sweep.records.folder import check_run, read_run
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.running import read_running
from fedbw_sweep.records.schema import TIMING, TIMING_COLUMNS
from fedbw_sweep.records.tables import load_alike

STATES = {"done": "green", "running": "cyan", "failed": "red", "missing": "yellow"}


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
    for run, status, error in results[["run_id", "status", "reason"]].itertuples(index=False):
        detail = "" if pd.isna(error) else str(error).strip().splitlines()[-1]
        if (state := running[run]) is not None:
            status, under_way = "running", under_way + 1
            remaining += 1 - state["round"] / max(1, state["rounds"])
            loss = "" if state["loss"] is None else f", loss {state['loss']:.3f}"
            detail = (
                f"round {state['round']} of {state['rounds']}{loss}, "
                f"{duration(time.time() - state['started'])} so far"
            )
        elif status == "missing":
            remaining += 1
        if state is None and status != "done":
            detail = "; ".join(filter(None, [detail, _kept(sweep_dir / run)]))
        rows.append((run, status, detail))
    runs = pd.DataFrame(rows, columns=["run_id", "status", "detail"])
    runs.insert(1, "settings", run_labels(results, varying_settings(results)).to_numpy())
    seconds = []
    for run in runs.loc[runs["status"] == "done", "run_id"] if under_way else ():
        read = read_run(sweep_dir / run, [TIMING])
        timing = load_alike({run: read}, TIMING, TIMING_COLUMNS, [], {})
        if len(timing):
            seconds.append(timing["round_seconds"].sum())
    if not under_way or not seconds:
        return runs, math.nan
    return runs, remaining * float(pd.Series(seconds).median()) / under_way


def _kept(folder: Path) -> str | None:
    """Say how far a run was that is to go on; None if it starts over."""
    try:
        checkpoint = read_checkpoint(folder)
    except DamagedError:
        return None
    return None if checkpoint is None else f"round {checkpoint.round} is kept"


def check(sweep_dir: Path) -> tuple[list[str], int, int]:
    """Check every file of every run in a sweep by its hash, and every id by its config.

    Returns
    -------
    damaged : list of str
        What is not what was written, a line for each run.
    checked, unchecked : int
        Runs that are what was written, and runs that were recorded without hashes.

    Raises
    ------
    ResultsError
        If there is no sweep in the folder, or another version wrote it.
    """
    notes: list[str] = []
    damaged, checked, unchecked = [], 0, 0
    for folder in find_records([sweep_dir], notes)[0]:
        try:
            status = check_run(folder)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        hashed = status is not None and HASHES in status
        checked, unchecked = checked + hashed, unchecked + (not hashed and status is not None)
    return damaged, checked, unchecked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if `check` finds damage, exit with 2 if there is no sweep."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.status", description="Show how far a sweep is."
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="its folder: outputs/<sweep>")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check every file by its hash, and every run's id by its config",
    )
    parser.add_argument("--disk", action="store_true", help="show what its files weigh")
    given = parser.parse_args(arguments)
    with errors_end_the_command():
        if given.check:
            return _show_check(*check(given.sweep))
        if given.disk:
            _show_weights(given.sweep)
            return 0
        _show(*sweep_status(given.sweep))
    return 0


def _show_check(damaged: list[str], checked: int, unchecked: int) -> int:
    output = output_console()
    for line in damaged:
        output.print(f"[red]damaged:[/red] {escape(printable(line))}", soft_wrap=True)
    output.print(
        f"{checked} runs are what was written, {unchecked} have no hashes, {len(damaged)} are "
        "damaged"
    )
    return int(bool(damaged))


def _show_weights(sweep_dir: Path) -> None:
    find_records([sweep_dir], [])
    weights = weigh(sweep_dir)
    table = Table("what")
    for name in ("files", "size"):
        table.add_column(name, justify="right")
    for what, files, weight in weights.itertuples(index=False):
        table.add_row(escape(printable(what)), f"{files:,}", size(weight))
    output = output_console()
    output.print(Fitted(table))
    output.print(f"{weights['files'].sum():,} files, {size(weights['bytes'].sum())}")


def _show(runs: pd.DataFrame, seconds_left: float) -> None:
    table = Table()
    for name in runs.columns:
        table.add_column(name)
    for run, settings, status, detail in runs.itertuples(index=False):
        shown = escape(printable(detail[:120]))
        table.add_row(run, escape(printable(settings)), f"[{STATES[status]}]{status}[/]", shown)
    output = output_console()
    output.print(Fitted(table))
    counts = runs["status"].value_counts()
    said = ", ".join(f"{counts.get(state, 0)} {state}" for state in STATES)
    left = "" if math.isnan(seconds_left) else f"; about {duration(seconds_left)} left"
    output.print(f"{len(runs)} runs: {said}{left}")


if __name__ == "__main__":
    sys.exit(main())
