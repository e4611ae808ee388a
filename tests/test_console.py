"""Commands print times alike, and end alike where a user has to change something."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep import plan, status, verify
from fedbw_sweep.console import duration, errors_end_the_command, output_console
from fedbw_sweep.report import __main__ as report

from .conftest import refuses


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (119.9, "119.9 s"),
        (120, "2.0 min"),
        (7199, "120.0 min"),
        (7200, "2.0 h"),
        (48 * 3600, "2.0 d"),
        (1e9, "11,574.1 d"),
    ],
)
def test_a_time_is_in_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("main", "argument"),
    [
        (status.main, "nowhere"),
        (verify.main, "nowhere"),
        (report.main, "nowhere"),
        (plan.main, "num_clients=0"),
    ],
)
def test_every_command_ends_an_error_alike(
    main: Callable[[list[str]], int],
    argument: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(main, [argument])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert argument in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("rich", [False, True])
def test_a_reader_that_stops_early_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rich: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", closed)
        with errors_end_the_command():
            (output_console().print if rich else print)("a table")
        print("more, as when Python ends")
    assert capsys.readouterr().err == ""
