"""What a sweep's status says of done, running, failed and missing runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbw_sweep import status
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.claims import claimed
from fedbw_sweep.records.running import RUNNING, Heartbeat, read_running
from fedbw_sweep.records.write import announce
from fedbw_sweep.status import sweep_status

from .conftest import refuses
from .records.test_write import finished

Build = Callable[..., RunConfig]


@pytest.fixture
def sweep(run_config: Build, tmp_path: Path) -> Iterator[tuple[Path, list[RunConfig]]]:
    """Two runs done in 10 and 30 s, one failed, one at round 1 of 4, one never started."""
    configs = [run_config("model=tiny", "rounds=4", f"seed={seed}") for seed in range(5)]
    announce(configs, tmp_path)
    for config, seconds in zip(configs, (10, 30), strict=False):
        record = finished(config)
        for row in record.timing:
            row["round_seconds"] = seconds / len(record.timing)
        record.write(tmp_path)
    failed = finished(configs[2])
    failed.status, failed.error = "failed", "Traceback\nValueError: too hot"
    failed.write(tmp_path)
    with claimed(tmp_path / configs[3].run_id, 60):
        Heartbeat(configs[3], tmp_path)({"round": 1, "loss": 3.25})
        yield tmp_path, configs


@pytest.mark.slow
def test_every_state_is_told_with_its_reason(sweep: tuple[Path, list[RunConfig]]) -> None:
    folder, configs = sweep
    runs, left = sweep_status(folder)
    told = runs.set_index("run_id")
    assert [told["status"][config.run_id] for config in configs] == [
        "done", "done", "failed", "running", "missing"
    ]  # fmt: skip
    assert told["detail"][configs[2].run_id] == "ValueError: too hot"
    assert "round 1 of 4, loss 3.250" in told["detail"][configs[3].run_id]
    assert "never recorded" in told["detail"][configs[4].run_id]
    assert "seed=3" in told["settings"][configs[3].run_id]
    # (three quarters of a run + a whole one) x the median of 10 and 30 s, one at a time
    assert left == pytest.approx(1.75 * 20)


def test_a_dead_process_is_not_running(sweep: tuple[Path, list[RunConfig]]) -> None:
    folder, configs = sweep
    run = folder / configs[3].run_id
    assert read_running(run) == json.loads((run / RUNNING).read_text())
    [claim] = run.glob("claim.*.json")
    said = json.loads(claim.read_text())
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    claim.write_text(json.dumps({**said, "pid": int(gone.stdout)}))
    assert read_running(run) is None
    claim.write_text(json.dumps({**said, "host": "another"}))
    assert read_running(run) is not None
    (run / RUNNING).write_text("{")
    assert read_running(run) is None
    runs, left = sweep_status(folder)
    assert runs["status"].tolist().count("missing") == 2
    assert math.isnan(left)


def test_the_finished_run_takes_the_place_of_the_running_one(
    sweep: tuple[Path, list[RunConfig]],
) -> None:
    folder, configs = sweep
    finished(configs[3]).write(folder)
    assert not (folder / configs[3].run_id / RUNNING).exists()
    assert sweep_status(folder)[0].set_index("run_id")["status"][configs[3].run_id] == "done"


def test_the_command(
    sweep: tuple[Path, list[RunConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([str(sweep[0])]) == 0
    printed = capsys.readouterr().out
    assert "5 runs: 2 done, 1 running, 1 failed, 1 missing; about 35.0 s left" in printed
    refuses(status.main, [str(sweep[0] / "nowhere")])
    assert "nowhere" in capsys.readouterr().err
