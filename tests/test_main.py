"""The command line without Ray: what it refuses, and that it refuses before any training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig

from fedbw_sweep import __main__ as cli
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.federation.job import Job
from fedbw_sweep.federation.runs import Sink
from fedbw_sweep.records.checkpoint import Store
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.sweeps import plugin, preflight, run, sweep

from .conftest import SMALL
from .local import LocalBackend
from .records.seals import seal


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> object:
    """Run the command line in this process; return its exit code and everything it printed."""
    trained = []

    class Backend(LocalBackend):
        def start(self, config: RunConfig) -> None:
            """Nothing is to start."""

        def runs_at_a_time(self, configs: Sequence[RunConfig]) -> int:
            return 1

        def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
            trained.append(job)
            super().run(job, sinks, store)

    monkeypatch.setattr(run, "backend_of", Backend())
    monkeypatch.setattr(preflight, "backend_of", Backend())
    monkeypatch.setattr(sweep, "backend_of", Backend())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, int]:
        # One at a time: in one process all clients share a model.
        monkeypatch.setattr(sys, "argv", ["fedbw_sweep", "backend.runs=1", *arguments])
        trained.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err, len(trained)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compression=zip"], ["compression/zip", "topk"]),
        (["fraction_fit=0"], ["fraction_fit=0", "(0, 1]"]),
        (["fraction_fit=1.5"], ["fraction_fit=1.5", "(0, 1]"]),
        (["num_clients=0"], ["num_clients=0", "at least 1"]),
        (["rounds=-1"], ["rounds=-1", "at least 0"]),
        (["compression=topk", "compression.density=0"], ["compression.density=0", "(0, 1]"]),
        (["compression=topk", "compression.density=2"], ["compression.density=2", "(0, 1]"]),
        (["-m", "compression=topk", "compression.density=0.1,2"], ["compression.density=2"]),
        (["-m", "num_clients=4,5000"], ["num_clients=5000", "at most 843", "min_characters"]),
        (["data=text"], ["data.path=", "a value must be given"]),
        (["data=text", "data.path=none.txt"], ["data.path=none.txt", "no such file"]),
        (["data=text", "data.path=empty.txt"], ["data.path=empty.txt", "empty"]),
        (["data=text", "data.path=bad.parquet"], ["data.path=bad.parquet", "cannot be read"]),
        (["model=hub", "model.name_or_path=no/model"], ["model.name_or_path=no/model", "folder"]),
        (["hydra.run.dir=file/out"], ["file/out", "cannot be written"]),
        (["-m", "seed=1,2", "hydra.sweep.dir=file/out"], ["file/out", "cannot be written"]),
        (["no_such_key=1"], ["no_such_key"]),
        (["-m", "compression=glob(zz*)"], ["compression=glob(zz*)", "names no value", "topk"]),
        (["seed=range(3,3)"], ["seed=range(3,3)", "names no value"]),
        (["sweep=aa,bb"], ["sweep=aa,bb", "makes no difference", "give sweep one value"]),
        (["network=home,4g"], ["network=home,4g", "makes no difference"]),
        (["device=auto,cpu", "logger=none"], ["device=auto,cpu", "makes no difference"]),
        (["seed=1,2,1"], ["two points of the grid are this same run"]),
        (["objective=luck"], ["objective=luck", "loss", "total_bytes"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_stops_before_any_training(
    command: object, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    code, printed, trained = command(*arguments)  # type: ignore[operator]
    assert code != 0
    assert trained == 0
    for word in words:
        assert word in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("results.csv"))


@pytest.mark.slow
def test_a_sweep_skips_what_is_done(command: object, tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, "compression=none,topk", "rounds=1"]
    code, printed, trained = command(*arguments)  # type: ignore[operator]
    assert (code, trained) == (0, 2)
    folder = tmp_path / "outputs" / "main"
    table = pd.read_csv(folder / "results.csv")
    assert table["compression"].tolist() == ["none", "topk"]
    assert "uplink MB" in printed
    before = {p.name: p.read_bytes() for p in folder.glob("*.csv")}

    (folder / table["run_id"][1] / "status.json").unlink()
    code, printed, trained = command(*arguments)  # type: ignore[operator]
    assert (code, trained) == (0, 1)
    assert "1 of 2 runs are done" in printed
    assert before == {p.name: p.read_bytes() for p in folder.glob("*.csv")}

    code, printed, trained = command(*SMALL, "rounds=1")  # type: ignore[operator]
    assert (code, trained) == (0, 0), "a single run is a sweep of one, in the same folder"
    assert "of them were trained on" not in printed
    assert (folder / "loss_against_bytes.png").stat().st_size > 10_000

    status = folder / table["run_id"][0] / "status.json"  # as another machine would record it
    status.write_text(json.dumps({**json.loads(status.read_text()), "device": "cuda"}))
    seal(status.parent)
    code, printed, trained = command(*arguments, "device=cpu")  # type: ignore[operator]
    assert (code, trained) == (0, 0)
    assert "1 of them were trained on cuda and stay as they are" in printed
    assert set(pd.read_csv(folder / "results.csv")["device"]) == {"cpu", "cuda"}


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_sweep(command: object, tmp_path: Path) -> None:
    code, printed, trained = command(  # type: ignore[operator]
        "-m", *SMALL, "lr=1e30,1e-3", "local_steps=3", "rounds=1"
    )
    assert (code, trained) == (1, 2)
    table = pd.read_csv(tmp_path / "outputs" / "main" / "results.csv")
    assert sorted(table["status"]) == ["done", "failed"]
    assert "loss is nan" in table.loc[table["status"] == "failed", "reason"].item()
    assert "loss is nan" in printed


@pytest.mark.slow
def test_an_error_of_ours_ends_a_sweep_as_one(
    command: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: object) -> None:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(RunRecord, "files", wrong)
    code, printed, _ = command("-m", *SMALL, "rounds=1", "seed=1,2")  # type: ignore[operator]
    assert code == 1
    assert "nobody expected this" in printed


@pytest.mark.slow
def test_when_all_runs_fail_their_reasons_are_said(command: object, tmp_path: Path) -> None:
    code, printed, trained = command(*SMALL, "lr=1e30", "optimizer=sgd", "local_steps=3")  # type: ignore[operator]
    assert (code, trained) == (1, 1)
    assert "loss is nan" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "outputs" / "main" / "loss_against_bytes.png").exists()


@pytest.mark.slow
def test_another_sweeper_is_told_the_objective(
    command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    task = plugin.Command.__call__

    def telling(self: plugin.Command, cfg: DictConfig) -> float:
        told.append(task(self, cfg))
        return told[-1]

    monkeypatch.setattr(plugin.Command, "__call__", telling)
    arguments = [*SMALL, "rounds=1", "hydra/sweeper=basic", "objective=uplink_bytes"]
    code, _, trained = command("-m", *arguments, "compression=none,topk")  # type: ignore[operator]
    assert (code, trained) == (0, 2)
    table = pd.read_csv(tmp_path / "outputs" / "main" / "results.csv")
    assert told == table["uplink_bytes"].tolist()
    assert told[0] == 2 * 4 * 1_320_960

    told.clear()
    arguments = [*SMALL, "rounds=1", "hydra/sweeper=basic", "optimizer=sgd", "local_steps=3"]
    code, _, trained = command("-m", *arguments, "lr=1e30,1e-3")  # type: ignore[operator]
    assert (code, trained) == (1, 2), "a run failed"
    assert told[0] == math.inf > told[1]


@pytest.mark.slow
def test_completion_names_the_choices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedbw_sweep", "-sc", "query=bash"],
        env={**os.environ, "COMP_LINE": "fedbw_sweep compression=to"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["compression=topk"]


@pytest.mark.parametrize(
    ("given", "arranged"),
    [
        (["a=1", "-m", "b=1,2"], ["-m", "a=1", "b=1,2"]),
        (["-v", "--multirun", "a=1,2"], ["-m", "a=1,2", "verbose=true"]),
        (["--cfg", "job", "a=1"], ["--cfg", "job", "a=1"]),
    ],
)
def test_flags_may_stand_anywhere(given: list[str], arranged: list[str]) -> None:
    assert cli.arrange(given) == arranged


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_looking_runs_nothing(command: object, tmp_path: Path, flag: str) -> None:
    code, printed, trained = command(flag)  # type: ignore[operator]
    assert (code, trained) == (0, 0)
    for word in ("compression", "num_clients", "fraction_fit", "local_epochs"):
        assert word in printed
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_tensorboard_gets_every_round(command: object, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, _ = command(*SMALL, "logger=tensorboard")  # type: ignore[operator]
    assert code == 0
    folder = tmp_path / "outputs" / "main"
    rounds = pd.read_csv(folder / "rounds.csv")
    logged = EventAccumulator(str(folder / "tensorboard" / rounds["run_id"][0]))
    logged.Reload()
    assert [event.step for event in logged.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in logged.Scalars("loss")] == pytest.approx(rounds["loss"])
    sent = [event.step for event in logged.Scalars("loss over uplink kB")]
    assert sent == [0, 2 * 5_283_840 // 1000, 4 * 5_283_840 // 1000]
