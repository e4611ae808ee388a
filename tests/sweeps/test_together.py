"""Commands that share a sweep, and sweeps on whose disk there is no room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records import waiting
from fedbw_sweep.records.place import write_folder
from fedbw_sweep.records.write import RunRecord, announce, is_done
from fedbw_sweep.report import figure
from fedbw_sweep.status import check
from fedbw_sweep.sweeps import run as run_module
from fedbw_sweep.sweeps import sweep as sweep_module
from fedbw_sweep.sweeps.sweep import Sweep
from tests.conftest import ROOT, config_of
from tests.records.test_claims import HOLD
from tests.records.test_waiting import Disk
from tests.records.test_write import finished


def recorded(config: RunConfig) -> RunRecord:
    record = finished(config)
    record.summary |= {"uplink_bytes": 1000, "model_parameters": 250, "dense_message_bytes": 1000}
    return record


def each(train: Callable[[RunConfig], RunRecord]) -> Callable[..., None]:
    """Stand in for `train`, whose runs are those of one trajectory."""

    def stand_in(
        configs: Sequence[RunConfig],
        observe: object,
        ended: Callable[[RunRecord], None],
        store: object,
    ) -> None:
        for config in configs:
            ended(train(config))

    return stand_in


def config(seed: int) -> RunConfig:
    return with_contents(config_of("model=tiny", f"seed={seed}", "records.retry_s=0.1"))


class Backend:
    """Says how many runs go on at a time; nothing here reaches its clients."""

    def runs_at_a_time(self, configs: object) -> int:
        return 1


@pytest.fixture
def configs() -> list[RunConfig]:
    return [config(seed) for seed in range(4)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a run take a twentieth of a second; note which were done."""
    done: list[str] = []
    lock = Lock()

    def train(config: RunConfig) -> RunRecord:
        with lock:
            done.append(config.run_id)
        time.sleep(0.05)
        return recorded(config)

    monkeypatch.setattr(run_module, "train", each(train))
    monkeypatch.setattr(sweep_module, "backend_of", lambda config: Backend())
    monkeypatch.setattr(sweep_module, "WAIT_S", 0.05)
    monkeypatch.setattr(figure, "loss_against_bytes", lambda curves, path: None)
    return done


def sweep_of(configs: list[RunConfig], folder: Path) -> Sweep:
    announce(configs, folder)
    return Sweep(configs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("commands", [2, 4])
def test_commands_on_one_sweep_do_each_run_once(
    configs: list[RunConfig], trained: list[str], tmp_path: Path, commands: int
) -> None:
    sweeps = [sweep_of(configs[i:] + configs[:i], tmp_path) for i in range(commands)]
    with ThreadPoolExecutor(commands) as threads:
        for ended in [threads.submit(sweep.run) for sweep in sweeps]:
            ended.result(60)
    assert sorted(trained) == sorted(config.run_id for config in configs)
    assert check(tmp_path) == ([], 4, 0)
    assert [sweep.show() for sweep in sweeps] == [0] * commands
    assert not list(tmp_path.rglob("claim.*"))


@pytest.mark.slow
def test_a_run_of_a_command_that_is_killed_is_taken_over(
    configs: list[RunConfig], trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(configs, tmp_path)
    place = tmp_path / configs[1].run_id
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), "600"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(sweep.run)
        deadline = time.monotonic() + 60
        while len(trained) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        assert configs[1].run_id not in trained
        holder.kill()
        holder.communicate()
        ended.result(60)
    assert trained[-1] == configs[1].run_id
    assert f"waiting for 1 runs that process {holder.pid} on" in capsys.readouterr().err
    assert sweep.show() == 0


@pytest.mark.slow
def test_a_failed_run_takes_no_finished_ones_place(
    configs: list[RunConfig],
    trained: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another machine, whose claim had no beat for too long, was faster after all."""

    def train(config: RunConfig) -> RunRecord:
        record = recorded(config)
        files = record.files()
        write_folder(tmp_path / config.run_id, files)
        record.status, record.error = "failed", "too hot"
        return record

    monkeypatch.setattr(run_module, "train", each(train))
    sweep = sweep_of(configs[:2], tmp_path)
    sweep.run()
    assert is_done(configs[0], tmp_path)
    assert sweep.show() == 0


@pytest.mark.slow
def test_a_run_deleted_under_a_sweep_is_said(
    configs: list[RunConfig],
    trained: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = sweep_of(configs, tmp_path)
    sweep.run()
    shutil.rmtree(tmp_path / configs[2].run_id)
    assert sweep.show() == 1
    assert f"run {configs[2].run_id} was deleted while the sweep ran" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_is_deleted_loses_only_what_was_done(
    configs: list[RunConfig],
    trained: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    sweep = sweep_of(configs, folder)

    def train(config: RunConfig) -> RunRecord:
        if config is sweep.configs[2]:
            shutil.rmtree(folder)
        return recorded(config)

    monkeypatch.setattr(run_module, "train", each(train))
    sweep.run()
    assert [is_done(config, folder) for config in configs] == [False, False, True, True]
    assert sweep.show() == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 4, 9, 20])
def test_what_a_full_disk_refuses_is_said_and_done_again(
    configs: list[RunConfig],
    trained: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.setattr(waiting, "PAUSE_S", 0.05)
    sweep = sweep_of(configs, tmp_path)
    disk = Disk(monkeypatch, number)
    sweep.run()
    assert len(trained) == 4, "other runs go on"
    assert sweep.show() == 1
    said = capsys.readouterr().err
    assert all(f"{line}\n" in said for line in sweep.lost)
    assert "is lost: No space left on device" in said
    assert not list(tmp_path.glob(".*"))
    disk.left = 10_000
    again = sweep_of(configs, tmp_path)
    again.run()
    assert again.show() == 0
    assert check(tmp_path) == ([], 4, 0)
    assert sorted(trained[4:]) == sorted(line.split()[1] for line in sweep.lost)


SMALL_DISK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.sweeps import test_together as tests

folder = Path(sys.argv[1])
tests.run_module.train = tests.each(tests.recorded)
tests.waiting.PAUSE_S = 0.05
tests.sweep_module.backend_of = lambda config: tests.Backend()
sweep = tests.sweep_of([tests.config(seed) for seed in range(8)], folder)
sweep.run()
print(len(sweep.lost), sweep.show(), [path.name for path in folder.glob(".*")])
"""


def in_namespaces(*command: str) -> list[str]:
    """Run a command as root of namespaces of its own; skip where that is not allowed."""
    unshare = ["unshare", "--map-root-user", *command]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("namespaces are not allowed here")
    return unshare


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """8 runs of some 30 kB on a disk of 150 kB."""
    script = 'mount -t tmpfs -o size=150k none "$1" && exec "$2" -c "$3" "$1"'
    command = in_namespaces("--mount", "sh", "-c", script, "sh")
    ended = subprocess.run(
        [*command, str(tmp_path), sys.executable, SMALL_DISK],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lost, code, hidden = ended.stdout.splitlines()[-1].split(" ", 2)
    assert 0 < int(lost) < 8, ended.stdout
    assert (code, hidden) == ("1", "[]")


@pytest.mark.slow
def test_two_machines_that_share_a_folder(tmp_path: Path) -> None:
    """Each in a network and a process table of its own: only the folder says who does a run."""
    apart = in_namespaces("--net", "--uts", "--pid", "--fork", "--mount-proc")
    named = 'hostname "$1" && shift && exec "$@"'
    holders = [
        subprocess.Popen(
            [*apart, "sh", "-c", named, "sh", name, sys.executable, "-c", HOLD, str(tmp_path), "4"],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for name in ("one", "two", "three")
    ]  # fmt: skip
    said = sorted(holder.communicate()[0].strip() for holder in holders)
    assert said == ["False", "False", "True"]
    [claim] = tmp_path.glob("claim.*.json")
    assert json.loads(claim.read_text())["name"] in ("one", "two", "three")
