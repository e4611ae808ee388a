"""Processes that draw while the report's own reads runs, and writes tables and the page.

Matplotlib and Altair take seconds to import: only these processes do.
"""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any


@cache
def pool() -> ProcessPoolExecutor:
    """Return the processes, which start when they are first given something to do."""
    return ProcessPoolExecutor(2, get_context("spawn"), _prepare)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the report's process to answer
    import fedbw_sweep.report.figure  # noqa: F401  # while there is nothing to draw yet


def chart_script() -> str:
    """See `charts.script`."""
    from fedbw_sweep.report import charts

    return charts.script()


def chart_specifications() -> dict[str, Any]:
    """See `charts.specifications`."""
    from fedbw_sweep.report import charts

    return charts.specifications()


def draw(name: str, *arguments: Any) -> None:
    """Draw one of `figure`'s figures."""
    from fedbw_sweep.report import figure

    getattr(figure, name)(*arguments)
