"""The report's command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.report.spec import BUILT_IN
from tests.conftest import refuses
from tests.report.sweeps import small_sweep

pytestmark = pytest.mark.slow


def test_a_table_of_ones_own(
    tmp_path: Path, run_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    small_sweep(tmp_path, run_config)
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "title: Mine\nrows: [num_clients, rounds, compression]\ncolumns: []\nmeasures:\n"
        "  - {value: loss, header: loss, aggregate: max, format: '.1f'}\n"
    )
    arguments = [str(tmp_path), "--out", str(tmp_path / "out"), "--spec", str(spec)]
    assert main(arguments) == 0
    assert "| none | 2 | 2.1 |" in capsys.readouterr().out
    spec.write_text("title: Mine\nrows: [compression]\nmeasures:\n  - {value: lost, header: x}\n")
    refuses(main, arguments)
    assert "no such measure" in capsys.readouterr().err
    spec.write_text("title: Mine\nrows: [compresion]\nmeasures:\n  - {value: loss, header: x}\n")
    refuses(main, arguments)
    assert "compresion: no such setting" in " ".join(capsys.readouterr().err.split())


def test_a_reader_that_stops_early_is_no_error(
    tmp_path: Path,
    run_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    RunRecord(run_config(), "failed", error="boom").write(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
        print("more, as when Python ends")
    assert "runs: 1 failed; written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([".", "--target-loss", "-1"], "--target-loss=-1.0: a number above 0"),
        ([".", "--budget-mb", "nan"], "--budget-mb=nan: a number above 0"),
        ([".", "--baseline", "=x"], "--baseline==x: a compression choice"),
        (["."], "holds no run"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(main, arguments)
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report").exists()


def test_a_table_of_ones_own_needs_a_name_of_its_own(
    tmp_path: Path, run_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    small_sweep(tmp_path, run_config)
    own = tmp_path / "compression.yaml"
    own.write_text((BUILT_IN / "compression.yaml").read_text())
    refuses(main, [str(tmp_path), "--out", str(tmp_path / "out"), "--spec", str(own)])
    assert "has the name of a built-in table" in " ".join(capsys.readouterr().err.split())


def test_it_starts_without_what_trains() -> None:
    code = (
        "import sys, fedbw_sweep.report.__main__\n"
        "print({'torch', 'ray', 'flwr', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
