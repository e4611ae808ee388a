"""Peers are measured in processes of their own: one package's library may break another's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context

import pandas as pd

from fedbw_sweep.bench.measures import measure
from fedbw_sweep.bench.peers import ADAPTERS, Adapter, working
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.training.process import prepare_process


def measure_peers(
    layout: Layout, updates: list[FloatVector], seed: int, repeats: int
) -> Iterator[pd.DataFrame]:
    """Yield what `measure` says of each peer package that is installed.

    Warns
    -----
    RuntimeWarning
        For a package or codec that is installed and does not work, with its error.
    """
    for package, adapter in ADAPTERS.items():
        if find_spec(package) is None:
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                asked = pool.submit(_measure, package, adapter, layout, updates, seed, repeats)
                table, said = asked.result()
            except BrokenProcessPool:
                said = [f"{package} is left out: its process died"]
            else:
                yield table
        for line in said:
            warnings.warn(line, RuntimeWarning, stacklevel=2)


def _measure(
    package: str,
    adapter: Adapter,
    layout: Layout,
    updates: list[FloatVector],
    seed: int,
    repeats: int,
) -> tuple[pd.DataFrame, list[str]]:
    """Return a package's rows, and what is to be said of what does not work."""
    prepare_process()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codecs = list(working(package, adapter, layout, updates[0]))
    # What the package itself warns of is its own affair.
    said = [str(warning.message) for warning in caught if " is left out: " in str(warning.message)]
    return measure(layout, updates, codecs, seed, repeats), said
