"""One process does a run, and a claim ends with its process or when it is no longer renewed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedbw_sweep.records.claims import claim, claimed, claimed_by

STALE_S = 60

HOLD = """
import sys, time
from pathlib import Path
from fedbw_sweep.records.claims import claim
print(claim(Path(sys.argv[1]), 120) is not None, flush=True)
time.sleep(float(sys.argv[2]))
"""


def elsewhere(path: Path) -> None:
    """Let a claim say that another host made it."""
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "host": "00000000", "name": "another"}))


@pytest.mark.slow
def test_only_one_has_it_until_it_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    folder = tmp_path / "run"
    own = claim(folder, STALE_S)
    assert own is not None
    assert claim(folder, STALE_S) is None
    assert claimed_by(folder) is not None
    assert f"process {os.getpid()} on" in str(claimed_by(folder))
    assert "job 17" in str(claimed_by(folder))
    own.release()
    assert claimed_by(folder) is None
    assert claim(folder, STALE_S) is not None


@pytest.mark.slow
def test_it_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "600"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert claim(folder, STALE_S) is None
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert claim(folder, STALE_S) is not None


def test_a_pid_that_is_anothers_now_holds_nothing(tmp_path: Path) -> None:
    own = claim(tmp_path, STALE_S)
    assert own is not None
    said = json.loads(own.path.read_text())
    own.path.write_text(json.dumps({**said, "started": said["started"] - 100}))
    assert claim(tmp_path, STALE_S) is not None


def test_another_hosts_ends_without_a_beat(tmp_path: Path) -> None:
    theirs = claim(tmp_path, STALE_S)
    assert theirs is not None
    elsewhere(theirs.path)
    assert claim(tmp_path, STALE_S) is None
    os.utime(theirs.path, (time.time() - 90,) * 2)
    assert theirs.beat()
    assert claim(tmp_path, STALE_S) is None
    os.utime(theirs.path, (time.time() - 90,) * 2)
    own = claim(tmp_path, STALE_S)
    assert own is not None
    assert own.path.name == "claim.2.json"
    assert not theirs.beat(), "who was taken for dead finds out"
    assert own.beat()


def test_half_a_claim_counts_as_another_hosts(tmp_path: Path) -> None:
    (tmp_path / "claim.1.json").write_text('{"ho')
    assert claim(tmp_path, STALE_S) is None
    os.utime(tmp_path / "claim.1.json", (time.time() - 130,) * 2)
    assert claim(tmp_path, STALE_S) is not None


@pytest.mark.slow
def test_it_is_renewed_in_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path, 0.4) as own:
        assert own is not None
        before = own.path.stat().st_mtime_ns
        time.sleep(0.5)
        assert own.path.stat().st_mtime_ns > before
        with claimed(tmp_path, STALE_S) as other:
            assert other is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """The claim before is dead, so that all take over at the same time."""
    dead = claim(tmp_path, STALE_S)
    assert dead is not None
    elsewhere(dead.path)
    os.utime(dead.path, (time.time() - 1000,) * 2)
    all_of_them = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), "5"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = [process.communicate()[0].strip() for process in all_of_them]
    assert sorted(said) == ["False", "False", "False", "True"]
