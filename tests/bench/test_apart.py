"""Peers in processes of their own: what is measured, and what is said of those that fail."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fedbw_sweep.bench import apart
from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.bench.peers import ADAPTERS, Adapter
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.testing import layout_of

LAYOUT = layout_of((30, 20))
UPDATES = [np.full(LAYOUT.size, value, np.float32) for value in (1, 3)]


def whole(name: str, decode: Callable[[bytes], FloatVector] | None = None) -> Codec:
    def read(payload: bytes) -> FloatVector:
        return np.frombuffer(payload, np.float32)

    return Codec(name, lambda update, _: update.tobytes(), decode or read)


def imports_not(layout: Layout) -> Iterator[Codec]:
    raise ModuleNotFoundError("no module named dependency\nand more")
    yield


def partly_works(layout: Layout) -> Iterator[Codec]:
    yield Codec("b 1", lambda update, _: bytes(-1), lambda payload: UPDATES[0])
    yield whole("b 2")
    yield whole("b short", lambda payload: UPDATES[0][1:])
    yield whole("b nan", lambda payload: UPDATES[0] * np.nan)
    yield whole("b 3")


def dies(layout: Layout) -> Iterator[Codec]:
    os._exit(3)
    yield


def measure(
    monkeypatch: pytest.MonkeyPatch, adapters: dict[str, Adapter]
) -> tuple[list[str], list[str]]:
    """Return the names of the rows, and what was said."""
    monkeypatch.setattr(apart, "ADAPTERS", adapters)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tables = list(apart.measure_peers(LAYOUT, UPDATES, seed=0, repeats=1))
    rows = [row for table in tables for row in table.to_dict("records")]
    assert all(row["bits"] == 32 and row["nmse"] == 0 for row in rows)
    return [row["method"] for row in rows], [str(warning.message) for warning in said]


def test_nothing_installed_yields_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ADAPTERS:
        monkeypatch.setitem(sys.modules, package, None)
    assert measure(monkeypatch, ADAPTERS) == ([], [])


@pytest.mark.slow
def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    version = pytest.__version__
    rows, said = measure(monkeypatch, {"numpy": imports_not, "rich": dies, "pytest": partly_works})
    assert rows == [f"b 2 (pytest {version})", f"b 3 (pytest {version})"]
    assert said == [
        "numpy is left out: ModuleNotFoundError: no module named dependency",
        "rich is left out: its process died",
        "b 1 is left out: ValueError: negative count",
        "b short is left out: ValueError: decoded to another shape, NaN or infinity",
        "b nan is left out: ValueError: decoded to another shape, NaN or infinity",
    ]
