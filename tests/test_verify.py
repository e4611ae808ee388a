"""Doing a recorded run again, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedbw_sweep import verify
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.records.collect import collect
from fedbw_sweep.sweeps import run as run_module

from .conftest import SMALL, config_of, refuses
from .local import LocalBackend
from .records.seals import seal

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
    # rounds.csv has 3 rows of 16 columns besides its prediction, messages.parquet 8 rows of 7,
    # parts.csv rows of 3, the summary the rest.
    summary = json.loads((run / "status.json").read_text())["summary"]
    parts = len((run / "parts.csv").read_text().splitlines()) - 1
    equal = 3 * 16 + 8 * 7 + len(summary.keys() - verify.OF_PREDICTION)
    assert f"reproduced exactly; {equal + 3 * parts} values are equal" in captured.out
    assert "environment" not in captured.err
    (run / "parts.csv").unlink()
    seal(run)  # as runs were recorded earlier
    assert verify.main([str(run)]) == 0
    assert f"reproduced exactly; {equal} values are equal" in capsys.readouterr().out


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
    refuses(verify.main, [str(run)])
    assert "status.json is damaged" in capsys.readouterr().err
    seal(run)
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


def edit(run: Path, loss: float, up: float) -> None:
    """Multiply a recorded loss and a number of bytes."""
    rounds = pd.read_csv(run / "rounds.csv")
    rounds["loss"] = rounds["loss"].where(rounds["round"] != 2, rounds["loss"] * loss)
    rounds["uplink_bytes"] = (rounds["uplink_bytes"] * up).astype(int)
    rounds.to_csv(run / "rounds.csv", index=False)
    seal(run)


def test_another_processor_may_differ_in_last_digits(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(run / "status.json", lambda status: status.update(processor="x"))
    edit(run, loss=1.015, up=1.05)
    assert verify.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "reproduced within tolerance (largest relative difference of a loss: 1.5e-02)" in printed
    assert "recorded on another processor: x, done again on" in printed
    edit(run, loss=1.015, up=1.0)
    assert verify.main([str(run)]) == 1
    assert "rounds.csv, round 2: loss" in capsys.readouterr().err


def test_a_run_known_from_a_table_alone_is_done_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(run.parent)
    page = run.parent / "page"
    page.mkdir()
    for name in ("results.csv", "rounds.csv"):
        (run.parent / name).rename(page / name)
    assert verify.main([str(page / run.name)]) == 0
    printed = capsys.readouterr().out
    assert "reproduced exactly" in printed
    assert "messages.parquet and parts.csv are not recorded and not compared" in printed
    table = pd.read_csv(page / "results.csv").drop(columns="processor")  # as of format 2
    table.to_csv(page / "results.csv", index=False)
    rounds = pd.read_csv(page / "rounds.csv")
    rounds.loc[2, "loss"] *= 1.001
    rounds.to_csv(page / "rounds.csv", index=False)
    assert verify.main([str(page / run.name)]) == 0
    assert "it is not known what processor it was recorded on" in capsys.readouterr().out
    refuses(verify.main, [str(page / "0123456789ab")])


def test_a_changed_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    science = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**science, "lr": 0.002}))
    refuses(verify.main, [str(run)])
    assert "config.yaml is damaged: it is not what was written" in capsys.readouterr().err
    seal(run)
    refuses(verify.main, [str(run)])
    assert "is not what" in capsys.readouterr().err


def test_a_text_may_have_moved_but_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "backend_of", LocalBackend())
    path = tmp_path / "a.txt"
    whole = "\n\n".join(f"Paragraph {n} has some words of its own." for n in range(200))
    path.write_text(whole)
    small = [line for line in SMALL if not line.startswith("data.")]
    config = with_contents(
        config_of(*small, "data=text", f"data.path={path}", "data.heldout_tokens=64")
    )
    assert run_module.execute(config, tmp_path).error is None
    run = tmp_path / config.run_id
    moved = path.rename(tmp_path / "moved.txt")
    refuses(verify.main, [str(run)])
    assert f"{path} is not there now" in capsys.readouterr().err
    assert verify.main([str(run), f"data.path={moved}"]) == 0
    moved.write_text(whole.replace("some", "many"))
    refuses(verify.main, [str(run), f"data.path={moved}"])
    printed = capsys.readouterr().err
    assert f"{moved} is sha256:" in printed
    assert "it was edited, or is another one" in printed


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
    refuses(verify.main, [str(run) if a == "RUN" else a for a in arguments])
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed
