"""Tables of small sweeps, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.build import TableBuilder
from fedbw_sweep.report.measure import Options, measure
from fedbw_sweep.report.spec import BUILT_IN, load_spec
from tests.report.sweeps import build, epochs_sweep, small_sweep

pytestmark = pytest.mark.slow


def test_targets_speedups_and_dashes(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "bytes_to_target", Options(target_loss=3.6))
    rows = table.frame.set_index("compression")
    # none: round 1 with both seeds, 100 B up; topk: round 1 (3.5) and 1 (3.6)
    assert rows.loc["none", "rounds to target"] == "1.0 ± 0.0"
    assert rows["up (B)"].tolist() == ["100 (1.0x)", "10 (10.0x)"]
    assert table.best["up (B)"].tolist() == [False, True]
    table = build(tmp_path, "bytes_to_target", Options(target_loss=2.95))
    rows = table.frame.set_index("compression")
    assert rows.loc["topk", "rounds to target"] == "2.0 [1 of 2]"
    assert table.best["rounds to target"].tolist() == [False, False]
    table = build(tmp_path, "bytes_to_target", Options(target_loss=2.5))
    rows = table.frame.set_index("compression")
    assert rows.loc["topk", "rounds to target"] == "— (not reached in 2 rounds)"
    assert rows.loc["topk", "total (B)"] == "—"


def test_best_and_paired_differences(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "compression", Options())
    assert table.frame["loss (nats/token)"].tolist() == ["2.050 ± 0.071", "2.950 ± 0.071"]
    assert table.best["loss (nats/token)"].tolist() == [True, False]
    differences = table.frame["loss - baseline's (nats/token)"].tolist()
    assert differences == ["+0.000 ± 0.000", "+0.900 ± 0.000"]
    table = build(tmp_path, "compression", Options(baseline={"compression": "int8"}))
    assert "loss - baseline's (nats/token)" not in table.frame


def test_budgets(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "loss_at_budget", Options(budget_bytes=199))
    assert table.frame.iloc[:, 2].tolist() == ["3.050 ± 0.071", "2.950 ± 0.071"]  # up: 1, 2 rounds
    assert table.frame.iloc[:, 3].tolist() == ["4.050 ± 0.071", "3.550 ± 0.071"]  # both: 0, 1


def test_rounds_to_target_against_what_clients_do(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    epochs_sweep(tmp_path, run_config)
    options = Options(target_loss=3.0, baseline={"local_epochs": 1})
    rows = build(tmp_path, "rounds_to_target", options).frame.set_index("local_epochs")
    iid, natural = (f"rounds to target, data.partition={name}" for name in ("iid", "natural"))
    assert rows[iid].to_dict() == {"1": "1.0 (1.0x)", "4": "— (not reached in 2 rounds)"}
    assert rows[natural].to_dict() == {"1": "2.0 (1.0x)", "4": "1.0 (2.0x)"}
    assert rows["total (MB), data.partition=natural"].to_dict() == {"1": "4.00", "4": "4.00"}


def test_settings_side_by_side(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    spec = load_spec(BUILT_IN / "compression.yaml")
    two = spec.model_copy(update={"rows": ["compression"], "columns": ["num_clients"]})
    config = run_config("num_clients=5", "rounds=2")
    RunRecord(config, "failed", error="boom").write(tmp_path)
    records, options = load_records(tmp_path), Options()
    table = TableBuilder(measure(records, options), options).build("t", two)
    assert table.frame["compression"].tolist() == ["none", "topk"]
    assert table.frame["loss (nats/token), num_clients=5"].tolist() == ["failed", ""]
    assert table.frame["loss (nats/token), num_clients=32"][0] == "2.050 ± 0.071"
