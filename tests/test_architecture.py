"""What docs/architecture.md says of changes: at most three files each, and no more is needed."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.testing import CHECKS

from .changes import CHANGES, apply
from .conftest import ROOT
from .copies import commands, copy_of_the_repository, passes, recipe, run

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def documented() -> dict[str, list[str]]:
    """The page's table of changes: the files of each, with ``<name>`` for the new one's name."""
    [table] = re.findall(r"^\| change \|.*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: re.findall(r"`([^`]+\.\w+)`", row[1]) for row in rows}


def fits(file: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace("<name>", r"\w+"), file) is not None


def test_each_of_ten_changes_touches_at_most_three_files() -> None:
    said = documented()
    assert said.keys() == CHANGES.keys() | {"a compressor"}
    assert len(said) == 10
    for change, files in said.items():
        assert 1 <= len(files) <= 3, change
        for file in files:
            assert (ROOT / file.partition("<name>")[0]).exists(), file
    for change, edits in CHANGES.items():
        for file in edits:
            assert [p for p in said[change] if fits(file, p)], f"{change} touches {file}"


def test_every_file_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`([\w/]+/[\w.]*|\w+\.(?:py|toml|md))`", PAGE):
        assert (ROOT / name).exists() or (ROOT / "fedbw_sweep" / name).exists(), name
    for _, link in re.findall(r"\[([^]]+)\]\(([^)#]+)", PAGE):
        assert link.startswith("http") or (ROOT / "docs" / link).exists(), link


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All ten changes in one copy, and what CONTRIBUTING says to run after them."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("changed"))
    *notes, _ = recipe(folder)
    assert all(python == ".venv/bin/python" for python, *_ in notes)
    for change in CHANGES:
        apply(change, folder)
    for _, *arguments in notes:
        run(folder, *arguments)
    run(folder, "-m", "tests.model.test_layout_cache")
    return folder


@pytest.mark.slow
def test_the_suite_passes_with_all_of_them(copy: Path) -> None:
    files = (
        *("test_docs.py", "test_imports.py", "config/test_defaults.py", "test_sampling.py"),
        *("data/test_readers.py", "model/test_layout_cache.py", "cost/test_network.py"),
        *("report/test_spec.py", "sweeps/loggers"),
    )
    assert passes(copy, *(f"tests/{name}" for name in files)) > 250
    assert "`toy`" in (copy / "docs" / "compression.md").read_text(encoding="utf-8")
    assert "compression.shrink" in (copy / "docs" / "columns.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_contributing_guides_recipe_is_all_there_is_to_do(copy: Path) -> None:
    *_, [pytest_, *contract] = commands(copy)
    assert pytest_ == ".venv/bin/pytest"
    assert passes(copy, *contract) >= len(CHECKS)
    threads = "test_portable.py::test_a_payload_does_not_depend_on_the_number_of_threads"
    passes(copy, *(f"tests/compression/{name}" for name in (threads, "test_sizes.py")), which="")


@pytest.mark.ray
@pytest.mark.slow
def test_all_of_them_work_in_a_sweep(copy: Path) -> None:
    small = "rounds=1", "local_steps=2", "batch_size=2", "sequence_length=16", "fraction_fit=0.5"
    chosen = (
        *("data=letters", "sampling=last_first", "model=little_gpt2", "network=satellite"),
        *("logger=lines", "compression=toy", "num_clients=4,8"),
    )
    planned = run(copy, "-m", "fedbw_sweep.plan", *small, *chosen)
    assert "Network satellite: 3 Mbit/s up, 25 down" in planned
    run(copy, "-m", "fedbw_sweep", "-m", *small, *chosen)
    sweep = copy / "outputs" / "main"
    results = pd.read_csv(sweep / "results.csv")
    assert results["status"].tolist() == ["done"] * 2
    assert (results["loss_drop"] == results["initial_loss"] - results["loss"]).all()
    assert len((sweep / "losses.txt").read_text().splitlines()) == 2 * 2
    messages = pd.read_parquet(next(sweep.glob("*/messages.parquet")))
    assert set(messages["client"]) in ({2, 3}, {4, 5, 6, 7})

    run(copy, "-m", "fedbw_sweep.report", "outputs/main")
    tables = copy / "report" / "tables"
    assert "drop (nats/token)" in (tables / "compression.md").read_text(encoding="utf-8")
    assert sorted(pd.read_csv(tables / "clients.csv")["num_clients"]) == [4, 8]
    page = (copy / "report" / "report.html").read_text(encoding="utf-8")
    [packed] = re.findall(r'<script[^>]* id="data"[^>]*>\s*([^<]+?)\s*</script>', page)
    shown = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert shown["metrics"]["loss_drop"][0] == "drop of the loss"
    assert sorted(shown["configurations"]["loss_drop"]) == sorted(results["loss_drop"].round(5))

    lines = ["text", *(f"line {n} of a table that is told apart by tabs" for n in range(60))]
    (copy / "rows.tsv").write_text("\n".join(lines), encoding="utf-8")
    again = "data=text", "data.path=rows.tsv", "num_clients=2", "sweep=tsv", "backend=one_by_one"
    run(copy, "-m", "fedbw_sweep", "model=little_gpt2", "data.heldout_tokens=64", *small, *again)
    assert pd.read_csv(copy / "outputs" / "tsv" / "results.csv")["status"].tolist() == ["done"]
