"""A bar for each run under way and one for all of them, in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedbw_sweep.console import MB, message_console

_console = message_console()
_lock, _running = Lock(), set[Any]()
_bars = Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    TextColumn("{task.fields[unit]} {task.completed}/{task.total}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[status]}"),
    console=_console,
    transient=True,
    disable=not _console.is_terminal,
)
_all = _bars.add_task("all", unit="run", status="", visible=False)


@contextmanager
def show_progress(label: str, rounds: int, runs: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show one run's rounds, loss and MB as they come; yield what each round's row goes to.

    Parameters
    ----------
    label : str
        The run's name.
    rounds : int
        Rounds of the run.
    runs : int
        Runs of the command.
    """
    task = _bars.add_task(label, total=rounds, unit="round", status="starting")
    with _lock:
        _running.add(task)
        _bars.update(_all, total=runs, visible=runs > 1)
        _bars.start()

    def observe(row: dict[str, Any]) -> None:
        status = f"loss {row['loss']:.3f}, {row['cumulative_bytes'] / MB:.2f} MB"
        _bars.update(task, completed=row["round"], status=status)

    try:
        yield observe
    finally:
        _bars.remove_task(task)
        _bars.advance(_all)
        with _lock:
            _running.remove(task)
            if not _running:
                stop_showing_progress()


def stop_showing_progress() -> None:
    """Take the bars away and give the cursor back, e.g. before the process ends in the middle."""
    _bars.stop()
