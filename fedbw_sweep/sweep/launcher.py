"""The runs of a command: do what is not done yet, show how it goes, and tabulate the outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.markup import escape

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import MB, duration, message_console, output_console, printable
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import varying_settings
from fedbw_sweep.records.running import Heartbeat
from fedbw_sweep.records.write import is_done
from fedbw_sweep.report.measure import cell_curves
from fedbw_sweep.report.table import describe_bytes, summary_table
from fedbw_sweep.sweep.loggers import logged
from fedbw_sweep.sweep.progress import show_progress

FIGURE = "loss_against_bytes.png"

COLLECT_SHARE = 0.02
"""The tables are rebuilt after a run unless that would take more than this share of the time."""

_console = message_console()


@dataclass
class Command:
    """What the command at hand is doing. Empty in a process that another launcher started.

    Attributes
    ----------
    cells
        The command's runs, each once, and `folder` where they go.
    varying
        The settings that tell the runs apart.
    """

    cells: list[RunConfig] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    varying: list[str] = field(default_factory=list)

    def begin(self, cells: Sequence[RunConfig], folder: Path) -> None:
        """Take on runs, of which several may be the same one."""
        self.cells, self.folder = list({cell.run_id: cell for cell in cells}.values()), folder
        self.varying = _varying(self.cells)

    def label(self, config: RunConfig) -> str:
        """Name a run by what varies between the command's."""
        own = config_columns(config.science)
        names = self.varying or _varying([config])
        return " ".join(f"{name}={own[name]}" for name in names if not pd.isna(own.get(name)))


command = Command()

_collecting = Lock()

_collected_until = 0.0  # on time.monotonic()'s clock


def run_cell(cfg: DictConfig) -> None:
    """Do the run a composed config describes: the command's only one, or a launcher's."""
    _run(with_contents(RunConfig.from_hydra(cfg)), Path(HydraConfig.get().runtime.output_dir))


def run_all() -> None:
    """Do the command's runs, which were checked.

    One run alone leaves cores idle at the end of each round, so there are several at a time, on one
    pool of workers, where the backend can.
    """
    folder = command.folder
    todo = [cell for cell in command.cells if not is_done(cell, folder)]
    if not todo:
        return
    at_a_time = backend_of(todo[0].backend).runs_at_a_time(todo)
    if at_a_time == 1:  # in this thread: some backends insist on the main one
        for cell in todo:
            _run(cell, folder)
        return
    with ThreadPoolExecutor(at_a_time) as threads:
        for run in [threads.submit(_run, cell, folder) for cell in todo]:
            run.result()


def _run(config: RunConfig, folder: Path) -> None:
    """Do one run unless it is recorded as done, say how it went, and renew the tables."""
    if is_done(config, folder):
        return
    from fedbw_sweep.sweep.run import execute

    label = command.label(config)
    progress = show_progress(label, config.rounds, len(command.cells))
    with progress as show, logged(config, folder) as log:
        beat = Heartbeat(config, folder)

        def observe(row: dict[str, Any]) -> None:
            for watcher in (show, beat, log):
                watcher(row)

        record = execute(config, folder, observe)
    if record.status == "done":
        first, last = record.rounds[0], record.rounds[-1]
        outcome = (
            f"loss {first['loss']:.3f} -> {last['loss']:.3f}, "
            f"uplink {last['cumulative_uplink_bytes'] / MB:.2f} MB"
        )
    else:
        outcome = f"[red]failed[/red]: {escape(str(record.error).strip().splitlines()[-1])}"
    seconds = sum(row["round_seconds"] for row in record.timing)
    _console.print(f"{label}: {outcome} ({duration(seconds)})")
    _renew_tables(folder)


def _renew_tables(folder: Path) -> None:
    """Rebuild the sweep's tables, unless they have just been: `finish` does it in any case."""
    global _collected_until
    with _collecting:
        started = time.monotonic()
        if started >= _collected_until:
            collect(folder)
            took = time.monotonic() - started
            _collected_until = time.monotonic() + took * (1 / COLLECT_SHARE - 1)


def finish() -> int:
    """Print the sweep's table, draw its figure and return the exit code: 1 if any run failed."""
    if not command.cells:  # --help, --cfg and the like
        return 0
    # Imported here: matplotlib is needed only now.
    from fedbw_sweep.report.figure import loss_against_bytes

    notes: list[str] = []
    results, rounds = collect(command.folder, notes)
    for note in notes:
        _console.print(f"note: {escape(printable(note))}")
    mine = results[results["run_id"].isin([cell.run_id for cell in command.cells])]
    output = output_console()
    output.print(summary_table(mine))
    for line in describe_bytes(mine):
        output.print(line, soft_wrap=True)
    figure = command.folder / FIGURE
    loss_against_bytes(cell_curves(mine, rounds), figure)
    _console.print(f"{command.folder}/: results.csv, rounds.csv, {FIGURE} and a folder per run")
    failed = mine[mine["status"] == "failed"]
    for _, row in failed.iterrows():
        _console.print(f"[red]failed[/red] {row['run_id']}: {escape(row['reason'].strip())}")
    return int(len(failed) > 0)


def _varying(cells: list[RunConfig]) -> list[str]:
    """Return the settings that tell runs apart."""
    return varying_settings(pd.DataFrame([config_columns(c.science) for c in cells], dtype=object))
