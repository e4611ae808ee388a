"""Records of format 2, written here as it was, brought to format 3."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedbw_sweep.config.identity import run_id_of
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load, load_records
from fedbw_sweep.records.status import read_status
from fedbw_sweep.records.write import is_done
from tests.records.test_write import finished
from tools.migrate import main


def old_run(config: RunConfig, sweep: Path, error: str | None = None) -> Path:
    """Write a run's folder as format 2 had it; its name is a hash of its config."""
    sweep.mkdir(exist_ok=True)
    finished(config).write(sweep)
    folder = sweep / config.run_id
    science: dict[str, Any] = config.science
    del science["sampling"], science["evaluate_every"]
    science["data"].pop("content")
    science["model"].pop("content")
    science["compression"]["rescale"] = science["compression"].pop("norm_correction")
    science["compression"]["_target_"] = "fedbw_sweep.compression.ecsq.ECSQ"
    science["server"] = {"name": "fedavg", "_target_": "flwr.serverapp.strategy.FedAvg"}
    old_id = hashlib.sha256(json.dumps([2, science], sort_keys=True).encode()).hexdigest()[:12]
    folder = folder.rename(sweep / old_id)
    (folder / "config.yaml").write_text(yaml.safe_dump(science))
    status = json.loads((folder / "status.json").read_text())
    for key in ("numerics", "end", "reason", "device", "processor", "sha256"):
        del status[key]
    status |= {"schema_version": 2, "run_id": old_id, "error": error}
    status["environment"] = {"device": "NVIDIA H100", "processor": "Xeon, 16 cores"}
    if error:
        status |= {"status": "failed", "summary": {}}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


@pytest.mark.slow
def test_a_sweep_is_read_as_format_3_after_it(
    run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config("compression=ecsq", "compression.norm_correction=true")
    old = old_run(config, tmp_path)
    [read] = load(old).to_dict("records")
    assert read["run_id"] == old.name
    assert (read["numerics"], read["end"], read["schema_version"]) == (2, "rounds", 2)
    assert (read["device"], read["processor"]) == ("cuda", "NVIDIA H100; Xeon, 16 cores")
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


@pytest.mark.slow
def test_one_damaged_run_keeps_none_from_being_migrated(
    run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [run_config("compression=ecsq", f"seed={seed}") for seed in (1, 2, 3)]
    edited, cut, whole = (old_run(config, tmp_path) for config in configs)
    science = yaml.safe_load((edited / "config.yaml").read_text())
    (edited / "config.yaml").write_text(yaml.safe_dump({**science, "lr": 0.5}))
    (cut / "config.yaml").write_text("lr: [")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{edited} stays: its config.yaml is not what it is named after" in printed
    assert f"{cut} stays: it is damaged" in printed
    assert edited.exists()
    assert cut.exists()
    assert not whole.exists()
    assert (tmp_path / run_id_of(with_contents(configs[2]).science, 2)).exists()


def test_an_interrupted_migration_is_gone_on_with(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """It stopped between giving a run its new folder and removing the old one."""
    config = run_config("compression=ecsq")
    old = old_run(config, tmp_path)
    before = shutil.copytree(old, tmp_path / "away" / old.name)
    assert main([str(tmp_path)]) == 0
    shutil.copytree(before, old)
    assert main([str(tmp_path)]) == 0
    assert not old.exists()
    shutil.copytree(before, old)
    (old / "rounds.csv").write_text("other numbers")
    assert main([str(tmp_path)]) == 1
    assert old.exists()


@pytest.mark.slow
def test_a_page_is_migrated_even_if_it_was_interrupted(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Only the two tables are there, as one of them was left when the other was written."""
    config = run_config("compression=ecsq")
    old_run(config, tmp_path / "s")
    collect(tmp_path / "s")
    page = tmp_path / "page"
    page.mkdir()
    for name in ("results.csv", "rounds.csv"):
        shutil.copy(tmp_path / "s" / name, page / name)
    table = pd.read_csv(page / "results.csv", dtype=str, keep_default_na=False)
    table["error"] = table.pop("reason")
    table = table.drop(columns=["end", "device", "processor", "numerics", "data.content"])
    table = table.drop(columns=["model.content", "sampling", "evaluate_every"])
    table = table.rename(columns={"compression.norm_correction": "compression.rescale"})
    table.to_csv(page / "results.csv", index=False)
    half = shutil.copytree(page, tmp_path / "half")
    assert main([str(page)]) == 0
    [row] = load(page).to_dict("records")
    assert row["run_id"] == run_id_of(with_contents(config).science, 2)
    whole = {path.name: path.read_bytes() for path in page.iterdir()}
    assert load_records(page).rounds["round"].tolist() == [0, 1, 2]
    shutil.copy(page / "rounds.csv", half / "rounds.csv")
    assert main([str(half)]) == 0
    assert {path.name: path.read_bytes() for path in half.iterdir()} == whole
    assert main([str(page)]) == 0
    assert {path.name: path.read_bytes() for path in page.iterdir()} == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "end"),
    [("client 3: loss is nan after 2 steps; lower lr", "diverged"), ("no space left", "failed")],
)
def test_how_a_failed_run_of_format_2_ended(
    run_config: Callable[..., RunConfig], tmp_path: Path, error: str, end: str
) -> None:
    old_run(run_config("compression=ecsq"), tmp_path, error)
    assert load(tmp_path)["end"].tolist() == [end]
    assert load(tmp_path)["reason"].tolist() == [error]
