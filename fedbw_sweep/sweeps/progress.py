"""A bar for each run under way and one for all of them, in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedbw_sweep.console import size


class Bars:
    """The bars of one sweep; they are there while a run is.

    Parameters
    ----------
    runs : int
        Runs of the sweep.
    console : rich.console.Console
        Where the bars are shown.
    """

    def __init__(self, runs: int, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[unit]} {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self._all = self._bars.add_task("all", total=runs, unit="run", status="", visible=runs > 1)
        self._lock, self._running = Lock(), set[TaskID]()

    def advance(self) -> None:
        """Count one more run as ended."""
        self._bars.advance(self._all)

    @contextmanager
    def run(self, label: str, rounds: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Show one run's rounds, loss and MB as they come; yield what each round's row goes to.

        Parameters
        ----------
        label : str
            The run's name.
        rounds : int
            Rounds of the run.
        """
        task = self._bars.add_task(label, total=rounds, unit="round", status="starting")
        with self._lock:
            self._running.add(task)
            self._bars.start()

        def observe(row: dict[str, Any]) -> None:
            loss = "" if row["loss"] is None else f"loss {row['loss']:.3f}, "
            status = f"{loss}{size(row['cumulative_bytes'])}"
            self._bars.update(task, completed=row["round"], status=status)

        try:
            yield observe
        finally:
            self._bars.remove_task(task)
            with self._lock:
                self._running.remove(task)
                if not self._running:
                    self._bars.stop()
