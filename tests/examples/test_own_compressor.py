"""A compressor in a package of the user's own: installed, swept, planned, measured, tabulated."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedbw_sweep.report.__main__ import main as report
from fedbw_sweep.testing import check_compressor
from fedbw_sweep.verify import main as verify
from tests.conftest import ROOT, SMALL, refuses

EXAMPLE = ROOT / "examples" / "own_compressor"

UPDATE = 4 + 1 + 4 * 132_096
"""Bytes by hand: frame, place, and a float for each tenth of tiny's 1,320,960 parameters."""


def test_it_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from own_compressor import EveryNth

    for n in (1, 10, 255):
        check_compressor(partial(EveryNth, n))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package by itself, as its README says, into a folder."""
    folder = tmp_path_factory.mktemp("site")
    install = "install", "-q", "--no-deps", "--target", str(folder), str(EXAMPLE)
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    assert (folder / "own_compressor.py").is_file()
    return folder


def run(command: str, *arguments: str, site: Path, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", command, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr * bool(code)


@pytest.mark.slow
def test_it_is_planned_and_measured(site: Path, tmp_path: Path) -> None:
    own = f"--config-dir={EXAMPLE / 'conf'}"
    arguments = "-m", *SMALL, "compression=none,every_nth", "-cd", str(EXAMPLE / "conf")
    planned = run("fedbw_sweep.plan", *arguments, site=site, cwd=tmp_path)
    assert f"compression=every_nth: (5,283,840 B + {UPDATE:,} B)" in planned
    [row] = [line for line in planned.splitlines() if line.startswith("│ every_nth")]
    assert "exact" in row

    np.savez(tmp_path / "update.npz", w=np.arange(1000, dtype=np.float32))
    methods = 'methods=[none,"every_nth n=4,10"]', "update=update.npz", "repeats=1"
    run("fedbw_sweep.codecs", *methods, own, site=site, cwd=tmp_path)
    measured = pd.read_csv(tmp_path / "outputs" / "codecs" / "codecs.csv").set_index("method")
    assert measured["bytes"].to_dict() == {
        "none": 4000,
        "every_nth n=4": 1005,
        "every_nth n=10": 405,
    }


@pytest.mark.ray
@pytest.mark.slow
def test_it_is_swept_and_tabulated(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"--config-dir={EXAMPLE / 'conf'}"
    arguments = "-m", *SMALL, "rounds=1", "compression=none,every_nth", own
    run("fedbw_sweep", *arguments, site=site, cwd=tmp_path)
    results = pd.read_csv(tmp_path / "outputs" / "main" / "results.csv").set_index("compression")
    assert results["status"].to_dict() == {"none": "done", "every_nth": "done"}
    assert results.loc["every_nth", "uplink_bytes"] == 2 * UPDATE
    assert results.loc["every_nth", "predicted_bytes"] == 2 * (UPDATE + 5_283_840)
    assert results.loc["every_nth", "compression._target_"] == "own_compressor.EveryNth"

    [own_run] = results.loc[["every_nth"], "run_id"]
    record = f"outputs/main/{own_run}"
    monkeypatch.chdir(tmp_path)  # what follows needs no process of its own
    refuses(verify, [record])
    assert "own_compressor.EveryNth" in capsys.readouterr().err
    assert "reproduced" in run("fedbw_sweep.verify", record, "--trust", site=site, cwd=tmp_path)

    assert report(["outputs/main"]) == 0
    table = pd.read_csv(tmp_path / "report" / "tables" / "compression.csv")
    assert sorted(table["compression"]) == ["every_nth", "none"]
