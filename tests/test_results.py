from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep import results
from fedbw_sweep.config import RunConfig, config_columns
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.results import (
    MESSAGES_COLUMNS,
    PARTS_COLUMNS,
    RESULTS_COLUMNS,
    ROUNDS_COLUMNS,
    TIMING_COLUMNS,
    RunRecord,
    collect,
    is_done,
)

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


def test_the_tables_are_rebuilt_from_the_folders(run_config: Build, tmp_path: Path) -> None:
    for override in ("compression=topk", "compression=none", "num_clients=3"):
        finished(run_config(override)).write(tmp_path)
    table, rounds = collect(tmp_path)
    assert table["compression"].tolist() == ["none", "none", "topk"]
    assert table["num_clients"].tolist() == [3, 32, 32]
    assert list(table.columns[:6]) == [*results.AXES, "seed"]
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
    assert table["error"].tolist()[0] == "client 2: loss is nan"
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

    monkeypatch.setattr(results.json, "dumps", interrupt)
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


@pytest.mark.parametrize(
    ("text", "word"),
    [('{"status": "do', "damaged"), (json.dumps({"schema_version": 99}), "schema version 99")],
)
def test_a_damaged_or_foreign_status_is_named(
    run_config: Build, tmp_path: Path, text: str, word: str
) -> None:
    config = run_config()
    finished(config).write(tmp_path)
    (tmp_path / config.run_id / "status.json").write_text(text)
    with pytest.raises(ResultsError, match=word):
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
        "compression": {"name": "topk", "_target_": "x.Y", "levels": [1, 2]},
    }
    assert config_columns(science) == {
        "seed": 1,
        "data": "text",
        "data.alpha": 0.5,
        "data.path": None,
        "compression": "topk",
        "compression.levels": "[1, 2]",
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
