"""Runs read from anywhere: folders, sweeps, other machines' CSVs; whole, twice, cut, foreign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load, load_records
from fedbw_sweep.records.schema import (
    MESSAGES_COLUMNS,
    PARTS_COLUMNS,
    RESULTS_COLUMNS,
    ROUNDS_COLUMNS,
)
from fedbw_sweep.records.write import RunRecord, announce
from fedbw_sweep.report.__main__ import main
from tests.conftest import refuses
from tests.records.conftest import other_machine
from tests.records.seals import seal, unseal
from tests.records.test_write import finished

Build = Callable[..., RunConfig]


@pytest.mark.slow
def test_where_the_bytes_are(sweep: Path) -> None:
    parts = load_records(sweep).parts
    assert parts.dtypes.astype(str).to_dict() == {
        "run_id": "string",
        **{name: column.dtype for name, column in PARTS_COLUMNS.items()},
    }
    done = load(sweep).query("status == 'done'")["run_id"]
    assert sorted(parts["run_id"]) == sorted(done)
    assert parts["bytes"].tolist() == [2**53 + 1] * 3  # never through a float
    # Runs recorded before there was such a file have none, and those of a CSV neither.
    older = sweep / str(done.iloc[0])
    (older / "parts.csv").unlink()
    unseal(older)
    records = load_records(sweep)
    assert sorted(records.parts["run_id"]) == sorted(done.iloc[1:])
    assert [note.partition(":")[0] for note in records.notes] == ["1 of 4 runs are unchecked"]
    assert load_records(other_machine(sweep)).parts.empty
    (sweep / str(done.iloc[1]) / "parts.csv").write_text("tensor,part\nw,values\n")
    seal(sweep / str(done.iloc[1]))
    records = load_records(sweep)
    assert "parts.csv has no column bytes" in records.notes[0]
    assert sorted(records.parts["run_id"]) == sorted(done.iloc[2:])


@pytest.mark.slow
def test_typed_and_tidy(sweep: Path) -> None:
    records = load_records(sweep)
    results = records.results
    assert results["status"].value_counts().to_dict() == {"done": 3, "failed": 1}
    for name, column in RESULTS_COLUMNS.items():
        assert str(results[name].dtype) == column.dtype
    assert results["total_bytes"].dropna().tolist() == [2**53 + 1] * 3  # never through a float
    assert results["num_clients"].dtype == "Int64"
    assert results["lr"].dtype == "Float64"
    assert results["compression.density"].dtype == "Float64"
    assert results["compression.error_feedback"].dtype == "boolean"
    assert results["compression"].tolist() == ["none", "none", "none", "topk"]
    assert results["source"].tolist() == [str(sweep / run) for run in results["run_id"]]
    for table, columns in ((records.rounds, ROUNDS_COLUMNS), (records.messages, MESSAGES_COLUMNS)):
        assert {name: str(table[name].dtype) for name in columns} == {
            name: column.dtype for name, column in columns.items()
        }
        assert set(table["run_id"]) == set(results[results["status"] == "done"]["run_id"])
    assert records.notes == []
    run = results["run_id"][0]
    assert records.configs[run]["num_clients"] == 3
    assert set(records.configs) == set(results["run_id"])
    assert len(records.configs) == 4
    assert load(str(sweep)).equals(results)


@pytest.mark.slow
def test_folders_and_csvs_give_the_same_numbers(sweep: Path) -> None:
    table = other_machine(sweep, "results_2.csv")
    ours, theirs = load_records(sweep), load_records(table)
    columns = [name for name in ours.results if name != "source"]
    pd.testing.assert_frame_equal(ours.results[columns], theirs.results[columns])
    key = ["run_id", "round"]
    pd.testing.assert_frame_equal(
        ours.rounds.sort_values(key, ignore_index=True),
        theirs.rounds.sort_values(key, ignore_index=True),
    )
    assert theirs.messages.empty
    both = load_records([sweep.parent, table, sweep, sweep / ours.results["run_id"][0]])
    pd.testing.assert_frame_equal(both.results, ours.results)
    assert len(both.rounds) == len(ours.rounds)


@pytest.mark.slow
def test_settings_are_read_without_the_sweeps_csv(sweep: Path) -> None:
    before = load_records(sweep).results
    (sweep / "results.csv").unlink()
    pd.testing.assert_frame_equal(load_records(sweep).results, before)


def test_the_same_run_with_other_numbers_stops(sweep: Path) -> None:
    table = other_machine(sweep)
    rows = pd.read_csv(table, dtype=str)
    rows.loc[rows["compression"] == "topk", "total_bytes"] = str(2**53 + 2)
    rows.to_csv(table, index=False)
    with pytest.raises(ResultsError) as raised:
        load([sweep, table])
    message = str(raised.value)
    assert f"total_bytes {2**53 + 1} in {sweep}" in message
    assert f"{2**53 + 2} in {table}: leave one of them out" in message


@pytest.mark.slow
def test_a_finished_run_counts_before_a_failed_one(sweep: Path, run_config: Build) -> None:
    table = other_machine(sweep)
    config = run_config("seed=9")
    finished(config).write(sweep)
    for paths in ([sweep, table], [table, sweep]):
        records = load_records(paths)
        assert records.results["status"].tolist() == ["done"] * 4
        assert any(f"run {config.run_id} failed in" in note for note in records.notes)


@pytest.mark.slow
def test_what_was_announced_but_not_recorded_is_missing(sweep: Path, run_config: Build) -> None:
    killed = run_config("seed=7")
    announce([killed], sweep)
    announce([killed], sweep)  # the same command again
    collect(sweep)
    records = load_records(sweep)
    row = records.results.set_index("run_id").loc[killed.run_id]
    assert (row["status"], row["seed"]) == ("missing", 7)
    assert "run the sweep again" in row["reason"]
    finished(killed).write(sweep)
    assert "missing" not in set(load(sweep)["status"])


def test_damaged_folders_are_missing_with_the_reason(sweep: Path, run_config: Build) -> None:
    none, topk = run_config("compression=none").run_id, run_config("compression=topk").run_id
    (sweep / none / "status.json").write_text('{"status": "do')
    (sweep / "results.csv").unlink()
    (sweep / topk / "config.yaml").write_text("a: [")
    seal(sweep / topk)
    records = load_records(sweep)
    rows = records.results.set_index("run_id")
    assert rows.loc[[none, topk], "status"].tolist() == ["missing", "missing"]
    assert "damaged" in rows.loc[none, "reason"]
    assert "config.yaml is damaged" in rows.loc[topk, "reason"]
    assert len(records.notes) == 2


@pytest.mark.parametrize("status", [{"schema_version": 0}, {}])
def test_another_schema_version_is_an_error(sweep: Path, status: object) -> None:
    folder = next(path for path in sweep.iterdir() if path.is_dir())
    (folder / "status.json").write_text(json.dumps(status))
    with pytest.raises(
        ResultsError, match=r"has schema version (0|None), this version reads 2 and 3"
    ):
        load(sweep)


def test_mixed_schema_versions_are_an_error(sweep: Path) -> None:
    table = other_machine(sweep)
    rows = pd.read_csv(table, dtype=str)
    rows.loc[0, "schema_version"] = "0"
    rows.to_csv(table, index=False)
    both = "0, 3, this version reads 2 and 3"
    with pytest.raises(ResultsError, match=f"rows of schema version {both}"):
        load(table)


@pytest.mark.slow
def test_a_missing_column_is_named(sweep: Path) -> None:
    table = other_machine(sweep)
    pd.read_csv(table, dtype=str).drop(columns=["uplink_bytes", "loss"]).to_csv(table, index=False)
    with pytest.raises(ResultsError, match="has no column uplink_bytes, loss: written by another"):
        load(table)
    shutil.copy(table, sweep / "results.csv")  # beside run folders it is not needed
    records = load_records(sweep)
    assert len(records.results) == 4
    assert "read the run folders beside it instead" in records.notes[0]


@pytest.mark.slow
def test_a_last_line_cut_off_is_noted(sweep: Path) -> None:
    table = other_machine(sweep)
    whole = table.read_bytes()
    for cut in (1, 5, 200):
        table.write_bytes(whole[:-cut])
        records = load_records(table)
        assert len(records.results) == 3
        assert "its last line is cut off" in records.notes[0]
    # cut inside the quoted traceback, which has line ends of its own
    head, _, _ = whole.partition(b"ValueError")
    table.write_bytes(head)
    kept = load_records(table).results
    assert "failed" not in set(kept["status"])


@pytest.mark.slow
def test_rounds_cut_off_or_absent_are_noted(sweep: Path, run_config: Build) -> None:
    none, topk = run_config("compression=none").run_id, run_config("compression=topk").run_id
    path = sweep / none / "rounds.csv"
    path.write_bytes(path.read_bytes()[:-3])
    (sweep / topk / "rounds.csv").unlink()
    damaged = load_records(sweep)
    assert {none, topk}.isdisjoint(damaged.rounds["run_id"])
    assert damaged.results.set_index("run_id")["status"][[none, topk]].tolist() == ["missing"] * 2
    for run in (none, topk):
        unseal(sweep / run)
    collect(sweep)
    records = load_records(sweep)
    assert records.rounds["run_id"].value_counts()[none] == 2
    assert topk not in set(records.rounds["run_id"])
    assert len(records.notes) == 3
    assert "2 of 4 runs are unchecked" in records.notes[2]
    table = other_machine(sweep)
    (table.parent / "rounds.csv").unlink()
    records = load_records(table)
    assert records.rounds.empty
    assert "no rounds.csv beside it" in records.notes[0]


@pytest.mark.slow
def test_a_row_that_stands_twice_counts_once(sweep: Path) -> None:
    table = other_machine(sweep)
    rows = pd.read_csv(table, dtype=str)
    pd.concat([rows, rows.iloc[[0]]]).to_csv(table, index=False)
    records = load_records(table)
    assert len(records.results) == 4
    assert "1 row(s) stand there twice" in records.notes[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"a,b\n1,2\n", b"\x89PNG\r\n\x1a\n\x00\xff", b"run_id\n1,2,3\n", b'"never closed\n1,2'],
)
def test_a_csv_that_is_not_ours_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ResultsError, match=r"x\.csv (has no column|cannot be read)"):
        load(tmp_path / "x.csv")


@pytest.mark.slow
def test_wrong_types_are_an_error(sweep: Path) -> None:
    table = other_machine(sweep)
    rows = pd.read_csv(table, dtype=str)
    rows["total_bytes"] = "many"
    rows.to_csv(table, index=False)
    with pytest.raises(ResultsError, match="many"):
        load(table)


@pytest.mark.slow
def test_the_report_survives_every_oddity(sweep: Path, tmp_path: Path, run_config: Build) -> None:
    announce([run_config("seed=7")], sweep)
    (sweep / run_config("compression=topk").run_id / "config.yaml").unlink()
    (sweep / "results.csv").unlink()
    assert main([str(sweep), "--out", str(tmp_path / "out"), "--target-loss", "1"]) == 0
    assert "is missing" not in (tmp_path / "out" / "tables" / "compression.md").read_text()
    failures = pd.read_csv(tmp_path / "out" / "tables" / "failures.csv")
    assert sorted(failures["status"]) == ["failed", "missing", "missing"]


@pytest.mark.slow
def test_nothing_but_failures_is_a_report(tmp_path: Path, run_config: Build) -> None:
    RunRecord(run_config(), "failed", error="boom").write(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out" / "figures").iterdir())
    assert "boom" in (tmp_path / "out" / "tables" / "failures.md").read_text()


@pytest.mark.slow
def test_rounds_of_one_run_that_differ_stop(sweep: Path) -> None:
    rounds = other_machine(sweep).with_name("rounds.csv")
    assert len(load_records([sweep, rounds.with_name("results.csv")]).rounds) > 0
    table = pd.read_csv(rounds)
    table.loc[1, "loss"] = 9.9
    table.to_csv(rounds, index=False)
    alone = load_records(rounds.with_name("results.csv"))
    assert 9.9 in set(alone.rounds["loss"])
    with pytest.raises(ResultsError, match=r"has different numbers for round \d in two places"):
        load_records([sweep, rounds.with_name("results.csv")])


@pytest.mark.slow
def test_settings_of_one_run_that_differ_stop(sweep: Path) -> None:
    first, second = other_machine(sweep), other_machine(sweep, "results_2.csv")
    load([first, second])
    table = pd.read_csv(second, keep_default_na=False, dtype=str)
    table.loc[0, "num_clients"] = "999"
    table.to_csv(second, index=False)
    with pytest.raises(ResultsError, match="has num_clients 3, 999 in different tables"):
        load([first, second])


@pytest.mark.parametrize("lost", ["compression", "num_clients", "seed"])
def test_a_table_without_a_setting_is_refused(sweep: Path, lost: str) -> None:
    path = other_machine(sweep)
    pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns=lost).to_csv(path, index=False)
    with pytest.raises(ResultsError, match=f"has no column {lost}"):
        load(path)


@pytest.mark.slow
def test_a_table_without_a_whole_row_is_refused(sweep: Path, tmp_path: Path) -> None:
    path = other_machine(sweep)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ResultsError, match="holds no whole run"):
        load(path)
    refuses(main, [str(path), "--out", str(tmp_path / "report")])


@pytest.mark.slow
def test_a_killed_run_is_missing_in_a_table_too(sweep: Path, run_config: Build) -> None:
    announce([run_config("seed=77")], sweep)
    collect(sweep)
    results = load(other_machine(sweep))
    [row] = results[results["status"] == "missing"].to_dict("records")
    assert row["seed"] == 77
    assert "was announced but never recorded" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"PAR1", b""])
def test_damaged_messages_are_named(sweep: Path, damage: bytes) -> None:
    run = str(load(sweep).query("status == 'done'")["run_id"].iloc[0])
    (sweep / run / "messages.parquet").write_bytes(damage)
    for make_right_again in (lambda folder: None, seal):
        make_right_again(sweep / run)
        records = load_records(sweep)
        row = records.results.set_index("run_id").loc[run]
        assert row["status"] == "missing"
        assert "messages.parquet is damaged" in row["reason"]
        assert run not in set(records.messages["run_id"]) | set(records.rounds["run_id"])
