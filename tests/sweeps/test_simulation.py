"""The command line on real Ray, end to end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf

from fedbw_sweep.config.section import CONF
from fedbw_sweep.records.collect import collect
from tests.conftest import ROOT, SMALL

pytestmark = pytest.mark.ray

PYTHIA_BYTES = 56_270_848

STOP_S = 30
"""For Ctrl-C: far more than the few seconds that it takes, for tests may share the cores."""

FEDERATION = ("-m", *SMALL, "num_clients=5", "rounds=5", "local_steps=40", "clients.dropout=0.4")
"""Clients come again, some drop out, and each trains for long enough to be met at work."""

GRID = (*FEDERATION, "compression@downlink=none,topk", "compression=none,topk,lowrank")
HALF = (*FEDERATION, "compression@downlink=topk", "compression=none,topk,lowrank")
"""Each of its three cells is also one of the grid's six: it must leave the same rows.

Clients hold something from round to round: the model that updates on the way down are added to
and, but for the first cell, what they did not send.
"""
ONE = (*FEDERATION, "compression@downlink=topk", "compression=topk")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command as a user would, from a folder of its own."""
    folder.mkdir(exist_ok=True)
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


def workers_of(pid: int) -> list[psutil.Process]:
    """Every process that a command has started."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def rows_of(table: Path) -> list[dict[str, str]]:
    """Return a table's rows to the letter, without what other runs of its sweep have more."""
    with table.open(encoding="utf-8", newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_runs(folder: Path, whole: Path) -> None:
    """Every row of `folder`'s tables stands in `whole`'s, to the letter and in the same order."""
    for name in ("results.csv", "rounds.csv"):
        rows = rows_of(folder / name)
        assert rows
        assert rows == [row for row in rows_of(whole / name) if row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The six-cell sweep with one worker, one run at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = sweep(folder, *GRID, "backend.workers=1", "backend.runs=1")
    return folder / "outputs" / "main", printed


def test_a_sweep_leaves_a_row_per_run(undisturbed: tuple[Path, str]) -> None:
    folder, printed = undisturbed
    results = pd.read_csv(folder / "results.csv")
    names = [name for name in ("lowrank", "none", "topk") for _ in range(2)]
    assert results["compression"].tolist() == names
    assert not results.duplicated(["compression", "downlink"]).any()
    assert (results["status"] == "done").all()
    assert (results["loss"] < results["initial_loss"] - 0.05).all()
    assert len(pd.read_csv(folder / "rounds.csv")) == 6 * 6
    for noise in ("WARNING", "INFO", "ray", "Traceback", "deprecated"):
        assert noise not in printed, printed


def test_messages_on_ray_are_those_of_the_table(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    results = pd.read_csv(folder / "results.csv").set_index("run_id")
    for run_id, row in results.iterrows():
        messages = pd.read_parquet(folder / str(run_id) / "messages.parquet")
        sums = messages.groupby("direction")["payload_bytes"].sum()
        assert sums["uplink"] == row["uplink_bytes"]
        assert sums["downlink"] == row["downlink_bytes"]
        count = messages["direction"].value_counts()
        assert count["downlink"] == 5 * 2
        assert 0 < count["uplink"] < count["downlink"], "no client dropped out"
        if row["downlink"] == "none":
            assert row["downlink_bytes"] == 5 * 2 * 4 * 1_320_960
        else:  # updates to the models that the clients hold
            assert row["downlink_ratio"] > 3


def _unfinished(folder: Path) -> list[Path]:
    states = folder.glob("*/checkpoint/state.json")
    return [path for path in states if not (path.parents[1] / "status.json").exists()]


def kill_within_a_run(process: subprocess.Popen[str], folder: Path) -> None:
    """Kill a command and all that it has started, once a run that is not done has kept a state."""
    deadline = time.monotonic() + 300
    while not _unfinished(folder):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for each in [*workers_of(process.pid), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


def test_flowers_own_simulation_changes_no_byte(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """It tells nothing of what clients keep: runs whose clients keep nothing have checkpoints."""
    methods = "compression=none,topk", "compression@downlink=none"
    printed = sweep(tmp_path, *FEDERATION, *methods, "backend=flower", "backend.workers=2")
    assert printed.count("no checkpoints: backend=flower hides what clients keep") == 1
    assert len(list(tmp_path.rglob("state.json"))) == 1
    assert_same_runs(tmp_path / "outputs" / "main", undisturbed[0])


def test_jobs_of_joblib_go_on(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    arguments = *ONE, "hydra/launcher=joblib", "backend.workers=1"
    folder = tmp_path / "outputs" / "main"
    kill_within_a_run(start(tmp_path, *arguments), folder)
    assert _unfinished(folder)
    assert "goes on after round" in sweep(tmp_path, *arguments)
    assert_same_runs(folder, undisturbed[0])


def test_the_slurm_example_with_submitits_local_executor(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """The example as it is, but for what only Slurm knows."""
    own = yaml.safe_load((CONF / "hydra" / "launcher" / "slurm.yaml").read_text(encoding="utf-8"))
    there = {field.name for field in fields(LocalQueueConf)}
    here = {key: value for key, value in own.items() if key in there}
    assert {"cpus_per_task", "mem_gb", "timeout_min"} <= set(here)
    choice = tmp_path / "conf" / "hydra" / "launcher" / "slurm_here.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text(yaml.safe_dump({"defaults": ["submitit_local"], **here}))
    launcher = ("--config-dir", str(tmp_path / "conf"), "hydra/launcher=slurm_here")
    folder = tmp_path / "outputs" / "main"
    kill_within_a_run(start(tmp_path, *launcher, *ONE, "backend.workers=1"), folder)
    [state] = _unfinished(folder)
    reached = json.loads(state.read_text())["round"]
    sweep(tmp_path, *launcher, *ONE, "backend.workers=1")
    assert_same_runs(folder, undisturbed[0])
    logs = "".join(path.read_text() for path in folder.rglob(".submitit/*/*.err"))
    assert f"goes on after round {reached}" in logs or f"after round {reached + 1}" in logs


def kill_workers(process: subprocess.Popen[str], most: int, seen: Counter[str]) -> int:
    """Kill workers in the middle of their work; return how many, fewer if the command ends.

    The names of all processes that were looked at are counted in `seen`.
    """
    killed = 0
    while killed < most and process.poll() is None:
        for worker in workers_of(process.pid):
            with suppress(psutil.NoSuchProcess):  # it may have ended by itself
                seen[name := worker.name()] += 1
                if killed < most and name == "ray::_answer":
                    worker.kill()
                    killed += 1
                    time.sleep(0.5)
        time.sleep(0.01)
    return killed


def test_two_commands_share_one_sweep(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    """Each run is done once; nor do more workers, other runs or killed ones change a byte."""
    disturbed = start(tmp_path, *HALF, "backend.workers=2", "backend.runs=1")
    seen = Counter[str]()
    killed = kill_workers(disturbed, 1, seen)
    several = start(tmp_path, *HALF, "backend.workers=4", "backend.runs=2")
    killed += kill_workers(disturbed, 1, seen)
    printed = [process.communicate()[0] for process in (disturbed, several)]
    assert [disturbed.returncode, several.returncode] == [0, 0], printed
    assert_same_runs(tmp_path / "outputs" / "main", undisturbed[0])
    assert "".join(printed).count(" -> ") == 3, printed  # a line for each run that was done
    assert killed, (seen, printed)


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "hung up"),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_leaves_finished_runs_and_no_process(
    tmp_path: Path, sent: signal.Signals, word: str
) -> None:
    process = start(tmp_path, "-m", *SMALL, "rounds=1,200", "backend.runs=1")
    while not list(tmp_path.glob("outputs/main/*/status.json")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # into the second run
    own = [psutil.Process(process.pid), *workers_of(process.pid)]
    assert len(own) > 5
    os.killpg(process.pid, sent)  # as a terminal does
    printed, _ = process.communicate(timeout=STOP_S)
    assert process.returncode == 128 + sent
    [reached] = [json.loads(p.read_text())["round"] for p in tmp_path.rglob("running.json")]
    [state] = _unfinished(tmp_path / "outputs" / "main")
    assert json.loads(state.read_text())["round"] >= reached, "the state is written first"
    assert f"{word}: finished runs and rounds are kept; the same command goes on" in printed
    assert len(list(tmp_path.glob("outputs/main/*/status.json"))) == 1
    assert not list(tmp_path.glob("outputs/main/.*"))
    _, alive = psutil.wait_procs(own, timeout=STOP_S)
    assert not alive


@pytest.mark.parametrize("seconds", [3, 6])
def test_ctrl_c_while_it_starts_leaves_no_process(tmp_path: Path, seconds: int) -> None:
    process = start(tmp_path, *GRID)
    time.sleep(seconds)
    own = [psutil.Process(process.pid), *workers_of(process.pid)]
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=STOP_S)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(own, timeout=STOP_S)
    assert not alive


def test_a_killed_sweep_resumes(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path, *HALF, "backend.workers=1", "backend.runs=1")
    folder = tmp_path / "outputs" / "main"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*/status.json"))) < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_within_a_run(process, folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/status.json")}
    assert 1 <= len(kept) < 3
    results, _ = collect(folder)
    missing = results[results["status"] == "missing"]
    assert len(missing) == len(results) - len(kept) == 3 - len(kept)
    assert missing["reason"].str.contains("was announced but never recorded").all()
    printed = sweep(tmp_path, *HALF, "backend.workers=1")
    assert "goes on after round" in printed, printed
    assert f"{len(kept)} of 3 runs are done" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_runs(folder, undisturbed[0])


def test_a_client_that_diverges_fails_its_run_alone(tmp_path: Path) -> None:
    printed = sweep(
        tmp_path, "-m", *SMALL, "lr=1e30,1e-3", "local_steps=3", "backend.workers=1", code=1
    )
    results = pd.read_csv(tmp_path / "outputs" / "main" / "results.csv")
    assert sorted(results["status"]) == ["done", "failed"]
    [reason] = results["reason"].dropna()
    assert "client" in reason
    assert "loss is nan" in reason
    assert reason in printed
    assert "Traceback" not in printed


def test_the_lesson(tmp_path: Path) -> None:
    printed = sweep(tmp_path, "experiment=lesson", "backend.workers=1")
    [results] = pd.read_csv(tmp_path / "outputs" / "lesson" / "results.csv").to_dict("records")
    folder = tmp_path / "outputs" / "lesson" / results["run_id"]
    messages = pd.read_parquet(folder / "messages.parquet")
    assert messages["payload_bytes"].tolist() == [PYTHIA_BYTES] * 4
    assert results["total_bytes"] == results["predicted_bytes"] == 225_083_392
    assert results["loss"] == results["initial_loss"]
    assert "56,270,848 B = 53.66 MiB = 56.27 MB" in printed
