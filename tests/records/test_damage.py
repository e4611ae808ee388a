"""Every way a record is damaged: named, counted as missing, set aside and done again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedbw_sweep import status
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.folder import check_run
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import announce, device_of, is_done
from fedbw_sweep.status import check
from tests.records.seals import seal, unseal
from tests.records.test_write import finished

Build = Callable[..., RunConfig]


@pytest.fixture
def two(run_config: Build, tmp_path: Path) -> tuple[Path, RunConfig, RunConfig]:
    """A sweep of two finished runs with unlike losses."""
    one, other = run_config("seed=1"), run_config("compression=topk")
    finished(one, loss=2.5).write(tmp_path)
    finished(other, loss=3.5).write(tmp_path)
    collect(tmp_path)
    return tmp_path, one, other


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit(folder: Path, other: Path) -> None:
    path = folder / "rounds.csv"
    path.write_text(path.read_text().replace("0.3333", "0.3334", 1))


def cut(folder: Path, other: Path) -> None:
    path = folder / "rounds.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def lose(folder: Path, other: Path) -> None:
    (folder / "rounds.csv").unlink()


def swap(folder: Path, other: Path) -> None:
    path = other / "rounds.csv"
    path.write_text(path.read_text().replace("0.3333333333333333", "0.25"))
    seal(other)
    shutil.copy(path, folder / "rounds.csv")


def edit_summary(folder: Path, other: Path) -> None:
    edit_json(folder / "status.json", lambda status: status["summary"].update(loss=1.5))


def edit_reason(folder: Path, other: Path) -> None:
    edit_json(folder / "status.json", lambda status: status.update(reason="x"))


def edit_a_hash(folder: Path, other: Path) -> None:
    edit_json(folder / "status.json", lambda s: s["sha256"].update({"parts.csv": "0" * 64}))


def edit_lr(folder: Path, other: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))


def copy_over(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def link(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def edit_messages(folder: Path, other: Path) -> None:
    messages = pd.read_parquet(folder / "messages.parquet")
    messages.assign(payload_bytes=1).to_parquet(folder / "messages.parquet", index=False)


def edit_parts(folder: Path, other: Path) -> None:
    path = folder / "parts.csv"
    path.write_text(path.read_text().replace("993", "994"))


def edit_timing(folder: Path, other: Path) -> None:
    (folder / "timing.csv").write_text((folder / "timing.csv").read_text() + "1,1,1,1,1,1\n")


ALL = {
    "edited": (edit, "rounds.csv is damaged"),
    "cut": (cut, "rounds.csv is damaged"),
    "missing": (lose, "rounds.csv is missing"),
    "swapped": (swap, "rounds.csv is damaged"),
    "summary": (edit_summary, "status.json is damaged"),
    "reason": (edit_reason, "status.json is damaged"),
    "hash": (edit_a_hash, "status.json is damaged"),
    "lr": (edit_lr, "config.yaml is damaged"),
    "copied": (copy_over, "status.json is damaged: it is"),
    "messages": (edit_messages, "messages.parquet is damaged"),
    "parts": (edit_parts, "parts.csv is damaged"),
    "timing": (edit_timing, "timing.csv is damaged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ALL)
def test_each_damage_is_named_and_done_again(
    two: tuple[Path, RunConfig, RunConfig], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, one, other = two
    damage, words = ALL[how]
    damage(sweep / one.run_id, sweep / other.run_id)

    [line], checked, unchecked = check(sweep)
    assert words in line
    assert one.run_id in line
    assert (checked, unchecked) == (1, 0)
    assert status.main([str(sweep), "--check"]) == 1
    assert words in capsys.readouterr().out
    results, rounds = collect(sweep)
    read = load_records(sweep)
    if how != "lr":  # the config is read where there is no table
        if how not in ("messages", "parts", "timing"):
            assert results.set_index("run_id")["status"][one.run_id] == "missing"
            assert one.run_id not in set(rounds["run_id"])
        row = read.results.set_index("run_id").loc[one.run_id]
        assert row["status"] == "missing"
        assert words in row["reason"]
        assert pd.isna(row["loss"])
        tables = (read.rounds, read.messages, read.parts, read.timing)
        assert all(one.run_id not in set(table["run_id"]) for table in tables)
    else:
        assert results.set_index("run_id")["status"][one.run_id] == "missing"
        (sweep / "results.csv").unlink()
        row = load_records(sweep).results.set_index("run_id").loc[one.run_id]
        assert row["status"] == "missing"
        assert words in row["reason"]
    assert read.results.set_index("run_id")["status"][other.run_id] == "done"

    assert not is_done(one, sweep)
    assert device_of(other, sweep) == "cpu"
    announce([one], sweep)
    assert "set aside as" in capsys.readouterr().err
    assert (sweep / f"{one.run_id}.damaged").is_dir(), "nothing is deleted"
    finished(one).write(sweep)
    assert is_done(one, sweep)
    assert check(sweep) == ([], 2, 0)
    again = load_records(sweep)
    assert again.results["status"].tolist() == ["done", "done"]
    assert "left alone" in again.notes[0]
    assert f"{one.run_id}.damaged" in again.notes[0]


def test_hashes_are_what_sha256sum_says(two: tuple[Path, RunConfig, RunConfig]) -> None:
    sweep, one, _ = two
    folder = sweep / one.run_id
    hashes = json.loads((folder / "status.json").read_text())["sha256"]
    for path in folder.iterdir():
        if path.name != "status.json":
            assert hashes.pop(path.name) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(hashes) == ["status.json"]
    for line in (sweep / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((sweep / name).read_bytes()).hexdigest()


def test_a_config_that_was_changed_with_its_hash_makes_another_id(
    two: tuple[Path, RunConfig, RunConfig],
) -> None:
    sweep, one, _ = two
    edit_lr(sweep / one.run_id, sweep)
    seal(sweep / one.run_id)
    [line], checked, _ = check(sweep)
    assert "is not what" in line
    assert checked == 1


def test_settings_come_from_a_table_only_if_it_is_whole(
    two: tuple[Path, RunConfig, RunConfig],
) -> None:
    sweep, one, _ = two
    table = pd.read_csv(sweep / "results.csv", dtype=str, keep_default_na=False)
    table.loc[table["run_id"] == one.run_id, ["lr", "loss"]] = ["0.5", "0.1"]
    table.to_csv(sweep / "results.csv", index=False)
    row = load_records(sweep).results.set_index("run_id").loc[one.run_id]
    assert (row["lr"], row["loss"], row["status"]) == (0.001, 2.5, "done")


@pytest.mark.slow
def test_records_without_hashes_read_as_before(two: tuple[Path, RunConfig, RunConfig]) -> None:
    sweep, one, _ = two
    before = load_records(sweep)
    assert before.notes == []
    unseal(sweep / one.run_id)
    read = load_records(sweep)
    pd.testing.assert_frame_equal(read.results, before.results)
    assert [note.partition(":")[0] for note in read.notes] == ["1 of 2 runs are unchecked"]
    assert check(sweep) == ([], 1, 1)
    assert is_done(one, sweep)


@pytest.mark.slow
def test_copies_and_foreign_folders_are_left_alone(
    two: tuple[Path, RunConfig, RunConfig], run_config: Build
) -> None:
    sweep, one, other = two
    before = load_records(sweep).results
    shutil.copytree(sweep / one.run_id, sweep / f"{one.run_id}.bak")
    (sweep / "notes").mkdir()
    (sweep / "notes" / "config.yaml").write_text("not: ours\n")
    empty = run_config("seed=8")
    (sweep / empty.run_id).mkdir()
    (sweep / empty.run_id / "config.yaml").write_text("")
    outside = sweep.parent / "outside"
    shutil.copytree(sweep / other.run_id, outside / "0123456789ab")
    (sweep / "0123456789ab").symlink_to(outside / "0123456789ab")
    files = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    read = load_records(sweep)
    pd.testing.assert_frame_equal(read.results, before)
    [note] = read.notes
    for name in (f"{one.run_id}.bak", "notes", empty.run_id, "0123456789ab"):
        assert name in note
    notes: list[str] = []
    results, _ = collect(sweep, notes)
    assert len(results) == 2
    assert notes == [note]
    assert check(sweep) == ([], 2, 0)
    assert files == {path: path.read_bytes() for path in sweep.rglob("*") if path in files}
    announce([empty], sweep)
    science = yaml.safe_load((sweep / empty.run_id / "config.yaml").read_text())
    assert science == empty.science


def test_a_link_in_a_runs_place_is_set_aside(two: tuple[Path, RunConfig, RunConfig]) -> None:
    sweep, one, other = two
    link(sweep / one.run_id, sweep / other.run_id)
    assert not is_done(one, sweep)
    announce([one], sweep)
    assert (sweep / f"{one.run_id}.damaged").is_symlink()
    assert check_run(sweep / "elsewhere", one.run_id) is not None


def test_a_finished_run_is_never_replaced(two: tuple[Path, RunConfig, RunConfig]) -> None:
    sweep, one, _ = two
    late = finished(one, loss=9.0)
    late.status, late.end, late.error = "failed", "failed", "too late"
    assert late.write(sweep) is False
    assert json.loads((sweep / one.run_id / "status.json").read_text())["summary"]["loss"] == 2.5
    assert not list(sweep.glob(".*"))
