"""A short storm: damaged records are found, and no command breaks on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import storm


@pytest.mark.slow
def test_a_short_storm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storm, "REPORTED", 1000)
    log = tmp_path / "log"
    first = storm.storm(log, 6)
    outcomes = storm.storm(log, 12)
    assert outcomes[:6] == first, "it went on where it stopped"
    assert [outcome["wrong"] for outcome in outcomes] == [[]] * 12
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["case"] for line in lines] == [number for n in range(12) for number in (n, n)]


def test_it_would_find_what_is_wrong(tmp_path: Path) -> None:
    wrong: list[str] = []
    storm.ends_well("one", lambda: 1 / 0, wrong)
    storm.ends_well("two", lambda: print("\x1b[2J"), wrong)
    assert wrong[0].startswith("one: ZeroDivisionError")
    assert wrong[1] == "two: a control sequence reached the terminal"
