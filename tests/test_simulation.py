"""The command line on real Ray, end to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from .conftest import ROOT, SMALL

pytestmark = pytest.mark.ray

PYTHIA_BYTES = 56_270_848

GRID = ("-m", *SMALL, "compression=none,topk,int8", "seed=1,2")
HALF = (*GRID[:-1], "seed=2")
"""Each of its three cells is also one of the grid's six: it must leave the same rows."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command as a user would, from a folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedbw_sweep", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def sweep(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run the command to its end; return what it printed."""
    process = start(folder, *arguments)
    printed, _ = process.communicate()
    assert process.returncode == code, printed
    return printed


def assert_same_runs(folder: Path, whole: Path) -> None:
    """Every row of `folder`'s tables stands in `whole`'s, to the letter and in the same order."""
    for name in ("results.csv", "rounds.csv"):
        lines, expected = ((f / name).read_text().splitlines() for f in (folder, whole))
        assert len(lines) > 1
        assert lines == [line for line in expected if line in set(lines)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The six-cell sweep with one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = sweep(folder, *GRID, "backend.workers=1")
    return folder / "outputs" / "main", printed


def test_a_sweep_leaves_a_row_per_cell(undisturbed: tuple[Path, str]) -> None:
    folder, printed = undisturbed
    results = pd.read_csv(folder / "results.csv")
    assert results[["compression", "seed"]].to_numpy().tolist() == [
        [name, seed] for name in ("int8", "none", "topk") for seed in (1, 2)
    ]
    assert (results["status"] == "done").all()
    assert (results["loss"] < results["initial_loss"] - 0.05).all()
    assert len(pd.read_csv(folder / "rounds.csv")) == 6 * 3
    for noise in ("WARNING", "INFO", "ray", "Traceback", "deprecated"):
        assert noise not in printed, printed


def test_messages_on_ray_are_those_of_the_table(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    results = pd.read_csv(folder / "results.csv").set_index("run_id")
    for run_id, row in results.iterrows():
        messages = pd.read_parquet(folder / str(run_id) / "messages.parquet")
        sums = messages.groupby("direction")["payload_bytes"].sum()
        assert sums["uplink"] == row["uplink_bytes"]
        assert sums["downlink"] == row["downlink_bytes"] == 4 * 4 * 1_320_960


def test_two_workers_give_the_same_bytes(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    sweep(tmp_path, *HALF, "backend.workers=2")
    assert_same_runs(tmp_path / "outputs" / "main", undisturbed[0])


def test_a_killed_sweep_resumes(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path, *HALF, "backend.workers=2")
    folder = tmp_path / "outputs" / "main"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*/status.json"))) < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)  # into the second run
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/status.json")}
    assert 1 <= len(kept) < 3
    printed = sweep(tmp_path, *HALF, "backend.workers=2")
    assert f"{len(kept)} of 3 runs are done" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_runs(folder, undisturbed[0])


def test_a_client_that_diverges_fails_its_run_alone(tmp_path: Path) -> None:
    printed = sweep(tmp_path, "-m", *SMALL, "lr=1e30,1e-3", "local_steps=3", code=1)
    results = pd.read_csv(tmp_path / "outputs" / "main" / "results.csv")
    assert sorted(results["status"]) == ["done", "failed"]
    [reason] = results["error"].dropna()
    assert "client" in reason
    assert "loss is nan" in reason
    assert reason in printed
    assert "Traceback" not in printed


def test_the_lesson(tmp_path: Path) -> None:
    printed = sweep(tmp_path, "experiment=seed")
    [results] = pd.read_csv(tmp_path / "outputs" / "seed" / "results.csv").to_dict("records")
    folder = tmp_path / "outputs" / "seed" / results["run_id"]
    messages = pd.read_parquet(folder / "messages.parquet")
    assert messages["payload_bytes"].tolist() == [PYTHIA_BYTES] * 4
    assert results["total_bytes"] == results["predicted_bytes"] == 225_083_392
    assert results["loss"] == results["initial_loss"]
    assert "56,270,848 B = 53.66 MiB = 56.27 MB" in printed
