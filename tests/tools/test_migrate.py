"""Records of format 2, written here as it was, brought to format 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbw_sweep.config.identity import run_id_of
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.read import load
from fedbw_sweep.records.write import is_done, read_status
from tests.records.test_write import finished
from tools.migrate import main

OLD_ID = "0123456789ab"


def old_run(config: RunConfig, sweep: Path) -> Path:
    """Write a run's folder as format 2 had it."""
    finished(config).write(sweep)
    folder = (sweep / config.run_id).rename(sweep / OLD_ID)
    science: dict[str, Any] = config.science
    del science["sampling"], science["evaluate_every"]
    science["data"].pop("content")
    science["model"].pop("content")
    science["compression"]["rescale"] = science["compression"].pop("norm_correction")
    science["compression"]["_target_"] = "fedbw_sweep.compression.ecsq.ECSQ"
    science["server"] = {"name": "fedavg", "_target_": "flwr.serverapp.strategy.FedAvg"}
    (folder / "config.yaml").write_text(yaml.safe_dump(science))
    status = json.loads((folder / "status.json").read_text())
    for key in ("numerics", "end", "reason", "device"):
        del status[key]
    status |= {"schema_version": 2, "run_id": OLD_ID, "error": None}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_a_sweep_is_read_as_format_3_after_it(
    run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config("compression=ecsq", "compression.norm_correction=true")
    old_run(config, tmp_path)
    [read] = load(tmp_path).to_dict("records")
    assert read["run_id"] == OLD_ID
    assert (read["numerics"], read["end"], read["schema_version"]) == (2, "rounds", 2)
    assert main([str(tmp_path)]) == 0
    today = with_contents(config)
    assert not is_done(today, tmp_path), "today's numbers are others: numerics 3"
    [migrated] = load(tmp_path).to_dict("records")
    assert migrated["run_id"] == run_id_of(today.science, 2)
    assert migrated["schema_version"] == 3
    assert migrated["loss"] == read["loss"]
    place = tmp_path / migrated["run_id"]
    assert (read_status(place) or {})["status"] == "done"
    recorded = yaml.safe_load((place / "config.yaml").read_text())
    assert recorded == today.science
    assert not list(tmp_path.glob(".*"))
    capsys.readouterr()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([str(tmp_path)]) == 0
    assert "nothing to migrate" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_damaged_is_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_text("run_id,a\n1,2\n")
    assert main([str(tmp_path)]) == 1
    assert "is left alone" in capsys.readouterr().out
    assert (tmp_path / "results.csv").read_text() == "run_id,a\n1,2\n"
