"""Processes that draw and write while the report's own reads runs, and makes tables and the page.

Matplotlib and Altair take seconds to import: only these processes do.
"""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

from fedbw_sweep.report.render import Rendered


@cache
def pool() -> ProcessPoolExecutor:
    """Return the processes, which start when they are first given something to do."""
    return ProcessPoolExecutor(2, get_context("spawn"), _prepare)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the report's process to answer
    import fedbw_sweep.report.figure  # noqa: F401  # while there is nothing to draw yet


def charts() -> tuple[dict[str, Any], str]:
    """Return `charts.specifications` and `charts.script`, in one process: imports take longer."""
    from fedbw_sweep.report import charts

    return charts.specifications(), charts.script()


def write_table(table: Rendered, folder: Path) -> None:
    """See `Rendered.write`."""
    table.write(folder)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as it is."""
    table.to_csv(path, index=False)


def draw(name: str, *arguments: Any) -> None:
    """Draw one of `figure`'s figures."""
    from fedbw_sweep.report import figure

    getattr(figure, name)(*arguments)
