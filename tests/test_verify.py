"""Doing a recorded run again, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedbw_sweep import verify
from fedbw_sweep.sweep import run as run_module

from .conftest import SMALL, config_of
from .local import LocalBackend

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder; it is not to be changed."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "backend_of", LocalBackend())
        config = config_of(*SMALL, "compression=topk")
        assert run_module.execute(config, folder).error is None
    return folder / config.run_id


@pytest.fixture
def run(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; whatever does it again answers in another order."""
    import shutil

    monkeypatch.setattr(run_module, "backend_of", LocalBackend(order=7))
    return Path(shutil.copytree(recorded, tmp_path / recorded.name))


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_an_honest_run_is_reproduced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(run)]) == 0
    captured = capsys.readouterr()
    # rounds.csv has 3 rows of 17 columns, messages.parquet 8 rows of 7, parts.csv rows of 3, the
    # summary the rest.
    summary = json.loads((run / "status.json").read_text())["summary"]
    parts = len((run / "parts.csv").read_text().splitlines()) - 1
    equal = 3 * 17 + 8 * 7 + len(summary)
    assert f"reproduced; {equal + 3 * parts} values are equal" in captured.out
    assert "environment" not in captured.err
    (run / "parts.csv").unlink()  # as runs were recorded earlier
    assert verify.main([str(run)]) == 0
    assert f"reproduced; {equal} values are equal" in capsys.readouterr().out


def test_one_byte_and_one_digit_are_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = pd.read_parquet(run / "messages.parquet")
    messages.loc[5, "payload_bytes"] += 1
    messages.to_parquet(run / "messages.parquet", index=False)
    parts = pd.read_csv(run / "parts.csv")
    parts.loc[0, "bytes"] += 1
    parts.to_csv(run / "parts.csv", index=False)
    rounds = pd.read_csv(run / "rounds.csv")
    rounds.loc[2, "loss"] += 1e-15 * 8
    rounds.to_csv(run / "rounds.csv", index=False)
    change_json(run / "status.json", lambda status: status["summary"].update(model_hash="00"))
    change_json(run / "status.json", lambda status: status["environment"].update(torch="1.0"))
    assert verify.main([str(run)]) == 1
    captured = capsys.readouterr()
    assert "4 of" in captured.out
    assert "versions or hardware differ" in captured.out
    for words in (
        "payload_bytes",
        "tensor (all), part frame: bytes",
        "rounds.csv, round 2: loss",
        "model_hash 00",
        "torch 1.0, now",
    ):
        assert words in captured.err


def test_a_changed_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    science = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**science, "lr": 0.002}))
    assert verify.main([str(run)]) == 2
    assert "is not what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "not a run folder"]),
        (["RUN", "lr=1"], ["lr=1", "only execution"]),
        (["RUN", "backend.nothing=1"], ["backend.nothing=1"]),
    ],
)
def test_what_cannot_be_done_again(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert verify.main([str(run) if a == "RUN" else a for a in arguments]) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed
