from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError, ResultsError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.schema import (
    AXES,
    MESSAGES_COLUMNS,
    PARTS_COLUMNS,
    RESULTS_COLUMNS,
    ROUNDS_COLUMNS,
    TIMING_COLUMNS,
)
from fedbw_sweep.records.write import RunRecord, is_done
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.report.measure import Options
from tests.records.seals import seal, unseal

Build = Callable[..., RunConfig]


def finished(config: RunConfig, loss: float = 2.5, rounds: int = 2) -> RunRecord:
    """A record as a run leaves it, with round numbers."""
    rows, messages = [], []
    for server_round in range(rounds + 1):
        sent = 1000 * min(server_round, 1)
        rows.append(
            {
                "run_id": config.run_id,
                "round": server_round,
                "loss": 1 / 3 + server_round,
                "perplexity": 1.0,
                "bits_per_byte": 1.0,
                "train_loss": None if not server_round else 0.1,
                "clients": min(server_round, 1),
                "uplink_bytes": sent,
                "downlink_bytes": sent,
                "uplink_message_bytes": sent,
                "downlink_message_bytes": sent,
                "dense_uplink_bytes": sent,
                "uplink_ratio": 1.0 if server_round else None,
                "predicted_bytes": 2 * sent,
                "cumulative_uplink_bytes": 1000 * server_round,
                "cumulative_bytes": 2**53 + 1 + server_round,
            }
        )
        messages.append(
            {
                "round": server_round,
                "client": 0,
                "direction": "uplink",
                "payload_bytes": 2**53 + 1,
                "message_bytes": 1,
                "dense_bytes": 1,
                "frozen_bytes": 0,
            }
        )
    record = RunRecord(config, "done", summary={"loss": loss, "total_bytes": 2**53 + 1})
    record.rounds, record.messages = rows, messages
    record.parts = [{"tensor": "w", "part": "values", "bytes": 2**53 + 1}]
    record.timing = [dict.fromkeys(TIMING_COLUMNS, 0)]
    return record


def test_a_run_folder_holds_all_of_it(run_config: Build, tmp_path: Path) -> None:
    config = run_config("seed=3")
    finished(config).write(tmp_path)
    folder = tmp_path / config.run_id
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "messages.parquet",
        "parts.csv",
        "rounds.csv",
        "status.json",
        "timing.csv",
    ]
    assert list(tmp_path.iterdir()) == [folder]
    assert is_done(config, tmp_path)
    messages = pd.read_parquet(folder / "messages.parquet")
    assert messages["payload_bytes"].tolist() == [2**53 + 1] * 3  # an int64, never a float


@pytest.mark.parametrize("table", ["summary", "rounds", "parts", "timing"])
def test_what_is_no_column_is_not_lost_but_refused(
    run_config: Build, tmp_path: Path, table: str
) -> None:
    config = run_config()
    done = finished(config)
    rows = getattr(done, table)
    (rows if table == "summary" else rows[0])["grad_norm"] = 1.0
    with pytest.raises(ValueError, match="grad_norm"):
        done.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tables_are_rebuilt_from_the_folders(run_config: Build, tmp_path: Path) -> None:
    for override in ("compression=topk", "compression=none", "num_clients=3"):
        finished(run_config(override)).write(tmp_path)
    table, rounds = collect(tmp_path)
    assert table["compression"].tolist() == ["none", "none", "topk"]
    assert table["num_clients"].tolist() == [3, 32, 32]
    assert list(table.columns[:6]) == [*AXES, "seed"]
    assert table["total_bytes"].tolist() == [2**53 + 1] * 3
    assert len(rounds) == 9
    written = pd.read_csv(tmp_path / "results.csv")
    assert written["run_id"].tolist() == table["run_id"].tolist()
    text = (tmp_path / "rounds.csv").read_text()
    assert str(2**53 + 1) in text
    assert "0.3333333333333333," in text
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    collect(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}


def test_a_failed_run_is_a_row_and_is_run_again(run_config: Build, tmp_path: Path) -> None:
    config = run_config()
    RunRecord(config, "failed", error="client 2: loss is nan").write(tmp_path)
    finished(run_config("seed=2")).write(tmp_path)
    table, _ = collect(tmp_path)
    assert table["status"].tolist() == ["failed", "done"]
    assert table["reason"].tolist()[0] == "client 2: loss is nan"
    assert pd.isna(table["total_bytes"][0])
    assert table["total_bytes"].dtype == "Int64"
    assert not is_done(config, tmp_path)
    finished(config).write(tmp_path)
    assert is_done(config, tmp_path)


def test_an_interrupted_write_leaves_nothing(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finished(run_config()).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_ignored(run_config: Build, tmp_path: Path) -> None:
    config = run_config()
    finished(config).write(tmp_path)
    leftover = tmp_path / f".{config.run_id}-abc"
    leftover.mkdir()
    (leftover / "rounds.csv").write_text("half")
    (tmp_path / "not-a-run").mkdir()
    table, _ = collect(tmp_path)
    assert table["run_id"].tolist() == [config.run_id]


def test_a_damaged_status_is_missing_and_a_foreign_one_stops(
    run_config: Build, tmp_path: Path
) -> None:
    config = run_config()
    finished(config).write(tmp_path)
    path = tmp_path / config.run_id / "status.json"
    path.write_text('{"status": "do')
    notes: list[str] = []
    [row] = collect(tmp_path, notes)[0].to_dict("records")
    assert (row["status"], row["num_clients"], row["loss"]) == ("missing", 32, None)
    assert notes == [row["reason"]]
    assert f"{path} is damaged" in row["reason"]
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ResultsError, match="schema version 99"):
        collect(tmp_path)


def test_an_empty_sweep_has_empty_tables(tmp_path: Path) -> None:
    table, rounds = collect(tmp_path)
    assert table.empty
    assert rounds.empty
    assert list(rounds.columns) == list(ROUNDS_COLUMNS)


def test_groups_become_dotted_columns() -> None:
    science = {
        "seed": 1,
        "data": {"name": "text", "alpha": 0.5, "path": None},
        "compression": {"name": "topk", "levels": [1, 2]},
        "server": {"name": "fedavg", "_target_": "torch.optim.SGD"},
        "optimizer": {"name": "adamw", "_target_": "x.Y"},
    }
    assert config_columns(science) == {
        "seed": 1,
        "data": "text",
        "data.alpha": 0.5,
        "data.path": None,
        "compression": "topk",
        "compression.levels": "[1, 2]",
        "server": "fedavg",
        "optimizer": "adamw",
        "optimizer._target_": "x.Y",
    }


def test_every_column_says_what_it_is() -> None:
    for columns in (
        RESULTS_COLUMNS, ROUNDS_COLUMNS, MESSAGES_COLUMNS, PARTS_COLUMNS, TIMING_COLUMNS
    ):  # fmt: skip
        for name, column in columns.items():
            assert len(column.meaning) > 5, name
            if name.endswith(("bytes", "_seconds")) or "loss" in name:
                assert column.dtype in {"Int64", "int64", "Float64", "float64"}
            if name.endswith("bytes"):
                assert column.dtype in {"Int64", "int64"}, f"{name} must be a whole number"


def two_tables(run_config: Build, folder: Path) -> tuple[Path, Path]:
    """``results.csv`` and ``rounds.csv`` of two runs, without their folders."""
    (folder / "here").mkdir()
    for method in ("none", "topk"):
        finished(run_config(f"compression={method}")).write(folder / "here")
    collect(folder / "here")
    found = [folder / "results.csv", folder / "rounds.csv"]
    for path in found:
        (folder / "here" / path.name).rename(path)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\ntopk,", b"\nt\xffpk,", "not UTF-8"),
        (b",loss,", b",loss,loss,", "cannot be read as a CSV"),
        (b",lr,", b",batch_size,", "has the column batch_size more than once"),
    ],
)
def test_a_table_that_was_damaged_is_named(
    run_config: Build, tmp_path: Path, old: bytes, new: bytes, words: str
) -> None:
    results_csv, _ = two_tables(run_config, tmp_path)
    text = results_csv.read_bytes()
    assert old in text
    results_csv.write_bytes(text.replace(old, new, 1))
    with pytest.raises(ResultsError, match=words):
        load_records(results_csv)


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [("results", "run_id", "a run without run_id"), ("rounds", "round", "a round without number")],
)
def test_a_row_without_its_key_is_refused(
    run_config: Build, tmp_path: Path, name: str, column: str, words: str
) -> None:
    results_csv, _ = two_tables(run_config, tmp_path)
    path = tmp_path / f"{name}.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows.loc[1, column] = ""
    rows.to_csv(path, index=False)
    with pytest.raises(ResultsError, match=words):
        load_records(results_csv)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"status": "weird"},
        {"summary": [1]},
        {"run_id": 5},
        {"summary": {"loss": "abc"}},
        {"summary": {"total_bytes": 1.5}},
    ],
)
def test_a_status_of_wrong_types_is_damaged(
    run_config: Build, tmp_path: Path, change: dict[str, object]
) -> None:
    config = run_config()
    finished(config).write(tmp_path)
    finished(run_config("seed=2")).write(tmp_path)
    path = tmp_path / config.run_id / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for make_right_again in (lambda folder: None, seal):
        make_right_again(path.parent)
        found = load_records(tmp_path).results.set_index("run_id").loc[config.run_id]
        assert found["status"] == "missing"
        assert f"{path} is damaged" in found["reason"]
        assert pd.isna(found["loss"])


@pytest.mark.slow
def test_rounds_that_stand_twice_or_apart_count_once(run_config: Build, tmp_path: Path) -> None:
    for seed in (1, 2):
        finished(run_config(f"seed={seed}")).write(tmp_path)
    before = load_records(tmp_path).rounds
    path = tmp_path / run_config("seed=1").run_id / "rounds.csv"
    text = path.read_text()
    path.write_text(text + text.splitlines()[-1] + "\n")
    seal(path.parent)
    pd.testing.assert_frame_equal(load_records(tmp_path).rounds, before)
    path.write_text(text.replace("\n", "\n\n"))
    seal(path.parent)
    pd.testing.assert_frame_equal(load_records(tmp_path).rounds, before)


@pytest.mark.slow
def test_a_damaged_file_among_many_is_the_one_named(run_config: Build, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        finished(run_config(f"seed={seed}")).write(tmp_path)
    for seed in (1, 2, 3):
        path = tmp_path / run_config(f"seed={seed}").run_id / "rounds.csv"
        text = path.read_text()
        for line, make_right_again in (("many,rows,too,few\n", seal), ("3" * 40 + "\n", unseal)):
            path.write_text(text + line)
            make_right_again(path.parent)
            records = load_records(tmp_path)
            [bad] = records.results[records.results["status"] == "missing"].to_dict("records")
            assert bad["run_id"] == path.parent.name
            assert str(path) in bad["reason"]
            assert bad["reason"] in records.notes
            assert len(records.rounds) == 6, "of the two others"
        path.write_text(text)
        seal(path.parent)


@pytest.mark.slow
def test_a_loss_without_end_is_shown_as_none(run_config: Build, tmp_path: Path) -> None:
    finished(run_config(), loss=float("inf")).write(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("text", ["compression=[", "compression=*x", "lr=[1]", "lr=", "=1"])
def test_a_baseline_that_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a compression choice, or key=value"):
        Options.parse_baseline(text)
