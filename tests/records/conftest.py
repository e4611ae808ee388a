"""A small sweep as it is left on disk, and as its tables alone are copied elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.write import RunRecord
from tests.records.test_write import finished

Build = Callable[..., RunConfig]


@pytest.fixture
def sweep(tmp_path: Path, run_config: Build) -> Path:
    """Three finished runs and a failed one, collected."""
    folder = tmp_path / "here" / "sweep"
    folder.mkdir(parents=True)
    for overrides in (["compression=none"], ["compression=topk"], ["num_clients=3", "lr=0.01"]):
        finished(run_config(*overrides)).write(folder)
    trace = 'Traceback:\n  File "x.py"\nValueError: a "quoted", line'
    RunRecord(run_config("seed=9"), "failed", error=trace).write(folder)
    collect(folder)
    return folder


def other_machine(sweep: Path, name: str = "results.csv") -> Path:
    """Only the two CSVs, as copied from elsewhere."""
    folder = sweep.parent.parent / "there"
    folder.mkdir(exist_ok=True)
    shutil.copy(sweep / "results.csv", folder / name)
    shutil.copy(sweep / "rounds.csv", folder / name.replace("results", "rounds"))
    return folder / name
