"""A full disk: nothing is half-written, what was recorded stays, and what waits is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records import waiting
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.place import host, leftovers, remove
from fedbw_sweep.records.running import Heartbeat
from fedbw_sweep.records.waiting import Writer
from fedbw_sweep.records.write import announce, is_done
from fedbw_sweep.status import check
from tests.records.test_write import finished

Build = Callable[..., RunConfig]

WRITTEN = ("config", "rounds", "parts", "timing", "messages", "status", "none")


class Disk:
    """Refuses the writes from the one of a number on, half of it written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left, write = number, Path.write_bytes

        def write_bytes(path: Path, data: bytes) -> int:
            self.left -= 1
            if self.left < 0:
                write(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("number", range(6), ids=WRITTEN[:6])
def test_a_full_disk_leaves_all_as_it_was(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    one, two = run_config("seed=1"), run_config("seed=2")
    finished(one).write(tmp_path)
    announce([two], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    disk = Disk(monkeypatch, number)
    with pytest.raises(OSError, match="No space left"):
        finished(two).write(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not list(tmp_path.glob(".*"))
    disk.left = 100
    assert finished(two).write(tmp_path)
    assert check(tmp_path) == ([], 2, 0)


@pytest.mark.parametrize("number", range(3), ids=["results", "rounds", "sums"])
def test_tables_are_whole_or_as_before(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    finished(run_config("seed=1")).write(tmp_path)
    collect(tmp_path)
    finished(run_config("seed=2")).write(tmp_path)
    Disk(monkeypatch, number)
    with pytest.raises(OSError, match="No space left"):
        collect(tmp_path)
    lines = (tmp_path / "results.csv").read_text().count("\n")
    assert lines == (2 if number == 0 else 3)
    assert not list(tmp_path.glob(".*"))


def test_what_waits_is_written_when_there_is_room(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = run_config("seed=1"), run_config("seed=2")
    said: list[str] = []
    monkeypatch.setattr(waiting, "PAUSE_S", 0.05)
    disk = Disk(monkeypatch, 0)
    writer = Writer(tmp_path, said.append, retry_s=60)
    assert writer.write(one.run_id, finished(one).files()) is False
    assert f"run {one.run_id} cannot be written: No space left" in said[0]
    disk.left = 1000
    assert writer.write(two.run_id, finished(two).files()) is True
    assert writer.finish() == []
    assert said[-1] == f"run {one.run_id} is written after all"
    assert is_done(one, tmp_path)
    assert is_done(two, tmp_path)


def test_what_waits_too_long_is_lost_and_said(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    said: list[str] = []
    monkeypatch.setattr(waiting, "PAUSE_S", 0.05)
    Disk(monkeypatch, 0)
    writer = Writer(tmp_path, said.append, retry_s=0.1)
    writer.write(config.run_id, finished(config).files())
    assert writer.finish() == [f"run {config.run_id} is lost: No space left on device"]
    assert said[-1].endswith("is lost: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_fails_no_running_run(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, 0)
    Heartbeat(run_config(), tmp_path)({"round": 1, "loss": 2.0})
    assert list((tmp_path / run_config().run_id).iterdir()) == []


def test_leftovers_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    gone, now = 2**22 - 3, 10_000.0
    names = {
        f".results.csv.{host()}-{gone}-0123abcd": True,
        f".0123456789ab.{host()}-{gone}-0123abcd": True,
        f".results.csv.{host()}-{os.getpid()}-0123abcd": False,
        ".results.csv.0badcafe-7-0123abcd": True,  # another host's, hours old
        ".rounds.csv.1234": True,  # as earlier versions named them
        ".0123456789ab-x_y8z7w6": True,
        ".hydra": False,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".results.csv.0badcafe-8-0123abcd").touch()
    os.utime(tmp_path / ".results.csv.0badcafe-8-0123abcd", (now - 60,) * 2)
    found = leftovers(tmp_path, now)
    assert {path.name for path in found} == {name for name, goes in names.items() if goes}
    for path in found:
        remove(path)
    left = {name for name, goes in names.items() if not goes}
    assert {path.name for path in tmp_path.iterdir()} == left | {".results.csv.0badcafe-8-0123abcd"}
