"""Records of unlike machines: compared within a tolerance, and never mixed unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.read import load, load_records
from tests.records.conftest import Build, other_machine
from tests.records.seals import seal
from tests.records.test_write import finished


def trained_on(sweep: Path, **environment: str) -> Path:
    """A copy of a sweep whose runs say that another machine trained them."""
    copy = Path(shutil.copytree(sweep, sweep.parent.parent / "elsewhere"))
    for path in copy.glob("*/status.json"):
        status = json.loads(path.read_text())
        own = {"device": "cpu", "processor": "Xeon, 8 cores", **environment}
        path.write_text(json.dumps({**status, **own}))
        seal(path.parent)
    collect(copy)
    return copy


def scaled(sweep: Path, run: str, loss: float) -> None:
    """Multiply the losses of a run."""
    status = json.loads((sweep / run / "status.json").read_text())
    status["summary"]["loss"] *= loss
    (sweep / run / "status.json").write_text(json.dumps(status))
    rounds = pd.read_csv(sweep / run / "rounds.csv")
    rounds.assign(loss=rounds["loss"] * loss).to_csv(sweep / run / "rounds.csv", index=False)
    seal(sweep / run)
    collect(sweep)


@pytest.mark.slow
@pytest.mark.parametrize("only_tables", [False, True])
def test_a_run_of_unlike_machines_may_differ_in_last_digits(
    sweep: Path, run_config: Build, only_tables: bool
) -> None:
    for path in sweep.glob("*/status.json"):
        status = json.loads(path.read_text())
        path.write_text(json.dumps({**status, "processor": "EPYC, 2 cores"}))
        seal(path.parent)
    collect(sweep)
    other = trained_on(sweep)
    run = run_config("compression=topk").run_id
    scaled(other, run, loss=1.008)
    theirs = other_machine(other) if only_tables else other
    records = load_records([sweep, theirs])
    assert records.results.set_index("run_id")["loss"][run] == 2.5, "the first counts"
    own = records.rounds[records.rounds["run_id"] == run]["loss"]
    assert own.tolist() == [1 / 3, 4 / 3, 7 / 3]
    assert records.environments.keys() == set(records.results["run_id"])
    [note] = [note for note in records.notes if run in note]
    assert "was done on EPYC, 2 cores (" in note
    assert "and Xeon, 8 cores (" in note
    scaled(other, run, loss=1.008)  # 1.6% in all
    theirs = other_machine(other) if only_tables else other
    with pytest.raises(ResultsError, match=f"run {run} has loss 2.5 in"):
        load([sweep, theirs])


@pytest.mark.slow
def test_a_run_of_one_machine_may_not(sweep: Path, run_config: Build) -> None:
    other, again = trained_on(sweep), sweep.parent.parent / "again"
    shutil.copytree(other, again)
    run = run_config("compression=topk").run_id
    scaled(again, run, loss=1 + 1e-15)
    with pytest.raises(ResultsError, match=f"run {run} has loss 2.5 in"):
        load([other, again])


@pytest.mark.slow
def test_runs_of_two_devices_are_told_apart(sweep: Path, run_config: Build) -> None:
    other = sweep.parent.parent / "other"
    other.mkdir()
    finished(run_config("compression=topk", "seed=2")).write(other)
    gpu = trained_on(other, device="cuda")
    records = load_records([sweep, gpu])
    assert "device" in varying_settings(records.results)
    assert "device=cuda" in "".join(run_labels(records.results, ["device"]))
    assert "the runs differ in device (cpu, cuda), which tells them apart" in records.notes
    assert "device" not in varying_settings(load(sweep))
