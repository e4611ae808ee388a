"""What a sweep weighs, and what in it can be deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep import clean, status
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records import place
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.disk import LEFT, OTHER, SET_ASIDE, weigh
from fedbw_sweep.records.place import host, set_aside
from tests.conftest import refuses
from tests.records.test_write import finished

GONE = f".results.csv.{host()}-{2**22 - 3}-0123abcd"


@pytest.fixture
def sweep(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Two runs, one of them damaged and set aside, and files that are neither's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "fedbw_sweep").mkdir(parents=True)
    (tmp_path / "cache" / "fedbw_sweep" / "contents.json").write_bytes(b"1" * 300)
    folder = tmp_path / "sweep"
    folder.mkdir()
    one, two = run_config("seed=1"), run_config("seed=2")
    finished(one).write(folder)
    finished(two).write(folder)
    set_aside(folder / two.run_id)
    collect(folder)
    (folder / GONE).write_bytes(b"1" * 20)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_bytes(b"1" * 7)
    (folder / f"{one.run_id}.damaged-by-me").mkdir()
    (folder / "link").symlink_to(tmp_path)
    return folder


def test_every_file_is_counted_once(sweep: Path) -> None:
    weights = weigh(sweep).set_index("what")
    files = [path for path in sweep.rglob("*") if path.is_symlink() or not path.is_dir()]
    assert weights["files"].sum() == len(files)
    assert weights["bytes"].sum() == sum(path.lstat().st_size for path in files)
    [run] = (path for path in sweep.iterdir() if len(path.name) == 12)
    for path in run.iterdir():
        assert weights.loc[f"<run_id>/{path.name}"].tolist() == [1, path.stat().st_size]
    assert weights["files"][SET_ASIDE] == len(list(run.iterdir()))
    assert weights.loc[LEFT].tolist() == [1, 20]
    assert weights["files"][OTHER] == 2
    assert weights["bytes"].is_monotonic_decreasing


def test_where_nothing_can_be_written_it_is_counted_too(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> float:
        raise PermissionError(folder)

    before = weigh(sweep)
    monkeypatch.setattr(place, "clock", refused)
    assert weigh(sweep).equals(before)
    assert clean.unneeded([sweep])["leftovers"] == [sweep / GONE]


def test_status_shows_it(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(sweep), "--disk"]) == 0
    printed = capsys.readouterr().out
    assert SET_ASIDE in printed
    assert "<run_id>/messages.parquet" in printed
    refuses(status.main, [str(sweep / "nowhere"), "--disk"])


def test_nothing_is_deleted_unless_it_is_told(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {path for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert clean.main([str(sweep)]) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_symlink()} == there
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("aside", "leftovers", "cache", "300 B", "20 B"))
    [aside] = sweep.glob("*.damaged")
    assert clean.main([str(sweep), "--delete", "aside", "leftovers"]) == 0
    assert "2 deleted" in capsys.readouterr().err
    gone = {path for path in there if not path.exists()}
    assert {path for path in gone if path.parent == sweep} == {aside, sweep / GONE}
    assert clean.main(["--delete", "cache"]) == 0
    assert not (tmp_path / "cache" / "fedbw_sweep").exists()
    assert len(list(sweep.glob("*/status.json"))) == 1
    capsys.readouterr()
    clean.main([str(sweep)])
    assert "there is nothing to delete" in capsys.readouterr().out


def test_what_is_no_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuses(clean.main, [str(tmp_path / "nowhere"), "--delete", "aside"])
    assert "nowhere" in capsys.readouterr().err
