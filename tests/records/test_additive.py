"""What a record of another time lacks, or has more than today's."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.records.read import load, load_records
from tests.records.conftest import Build, other_machine
from tests.records.seals import seal


@pytest.mark.slow
def test_a_setting_that_a_table_lacks_is_at_its_default(sweep: Path) -> None:
    table = other_machine(sweep)
    whole = load(table)
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows = rows.drop(columns=["compression.values", "evaluate_every", "optimizer.betas"])
    rows.to_csv(table, index=False)
    lacking = load(table)
    assert lacking["compression.values"].tolist()[3] == "fp32"
    assert lacking["compression.values"].isna().tolist() == [True, True, True, False]
    assert lacking["evaluate_every"].tolist() == [1] * 4
    assert lacking["optimizer.betas"].tolist() == ["[0.9, 0.999]"] * 4
    pd.testing.assert_frame_equal(lacking[list(whole)], whole)


@pytest.mark.slow
def test_what_a_later_version_added_is_ignored(sweep: Path, run_config: Build) -> None:
    before = load_records(sweep)
    run = sweep / run_config("compression=topk").run_id
    for name in ("rounds.csv", "parts.csv", "timing.csv"):
        table = pd.read_csv(run / name)
        table.assign(later=7).to_csv(run / name, index=False)
    messages = pd.read_parquet(run / "messages.parquet")
    messages.assign(later="x").to_parquet(run / "messages.parquet", index=False)
    status = json.loads((run / "status.json").read_text())
    status["summary"]["later"] = 7
    (run / "status.json").write_text(json.dumps({**status, "later": {"rounds.csv": "00"}}))
    (run / "wire.csv").write_text("round,bytes\n1,2\n")
    (run / "checkpoint").mkdir()
    seal(run)
    after = load_records(sweep)
    for name in ("results", "rounds", "messages", "parts", "timing"):
        pd.testing.assert_frame_equal(
            getattr(after, name).sort_values("run_id", kind="stable", ignore_index=True),
            getattr(before, name).sort_values("run_id", kind="stable", ignore_index=True),
        )
