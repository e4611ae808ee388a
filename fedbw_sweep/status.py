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

from fedbw_sweep.console import Fitted, duration, errors_end_the_command, output_console
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.running import read_running
from fedbw_sweep.records.schema import TIMING

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
    """Run the command line; exit with 2 if there is no sweep there."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.status", description="Show how far a sweep is."
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="its folder: outputs/<sweep>")
    given = parser.parse_args(arguments)
    with errors_end_the_command():
        _show(*sweep_status(given.sweep))
    return 0


def _show(runs: pd.DataFrame, seconds_left: float) -> None:
    table = Table()
    for name in runs.columns:
        table.add_column(name)
    for run, settings, status, detail in runs.itertuples(index=False):
        table.add_row(run, escape(settings), f"[{STATES[status]}]{status}[/]", escape(detail[:120]))
    output = output_console()
    output.print(Fitted(table))
    counts = runs["status"].value_counts()
    said = ", ".join(f"{counts.get(state, 0)} {state}" for state in STATES)
    left = "" if math.isnan(seconds_left) else f"; about {duration(seconds_left)} left"
    output.print(f"{len(runs)} runs: {said}{left}")


if __name__ == "__main__":
    sys.exit(main())
