"""The examples run, and what is by hand there agrees with the product."""

from __future__ import annotations

import csv
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from fedbw_sweep.config.run import RunConfig
from tests.conftest import ROOT, SMALL, Execute

EXAMPLES = ROOT / "examples"


def test_one_update_is_compressed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "compress_one_update.py"))
    first, error, *parts, feedback = capsys.readouterr().out.splitlines()
    dense, sent = (int(word.replace(",", "")) for word in first.split() if word[0].isdigit())
    assert dense == 4 * (256 * 128 + 256)
    assert sum(int(line.split()[2].replace(",", "")) for line in parts) == sent < dense / 50
    assert 0.9 < float(error.split()[-1]) < 1  # one in a hundred of Gaussian coordinates is little
    assert float(feedback.split()[-1]) < 1e-9


@pytest.mark.slow
def test_averaging_by_hand_is_what_the_product_does(
    execute: Execute, run_config: Callable[..., RunConfig]
) -> None:
    overrides = "compression=int8", "rounds=2", "local_steps=3"
    fedavg = runpy.run_path(str(EXAMPLES / "fedavg_by_hand.py"))["fedavg"]
    losses, sent = fedavg(run_config(*SMALL, *overrides))
    record = execute(*overrides)
    assert record.error is None
    assert sent == record.summary["uplink_bytes"]
    assert losses == pytest.approx([row["loss"] for row in record.rounds], rel=1e-6)
    body = (EXAMPLES / "fedavg_by_hand.py").read_text().split("def fedavg")[1].split("\n\n\n")[0]
    assert len(body.splitlines()) <= 40


@pytest.mark.slow
def test_the_notebooks_cells_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "read_results.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), "read_results.ipynb", "exec"), names)
    path = ROOT / "docs" / "results" / "headline" / "results.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    best = names["best"]["loss"].to_dict()  # type: ignore[index]
    assert best.keys() == {row["compression"] for row in rows}
    for name, loss in best.items():
        assert loss == pytest.approx(
            fmean(float(row["loss"]) for row in rows if row["compression"] == name)
        )
    names["figure"].savefig(tmp_path / "figure.png")  # type: ignore[attr-defined]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    lines = names["axes"].get_lines()  # type: ignore[attr-defined]
    assert {line.get_label() for line in lines} == best.keys()
