"""What the documents say is run, or compared with what is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config import RunConfig
from fedbw_sweep.report.measure import MEASURES, TIME_MEASURES
from fedbw_sweep.report.spec import TABLE_COLUMNS
from fedbw_sweep.results import (
    MESSAGES_COLUMNS,
    PARTS_COLUMNS,
    RESULTS_COLUMNS,
    ROUNDS_COLUMNS,
    TIMING_COLUMNS,
    Column,
)

from .conftest import CONF, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COLUMNS = {
    "results.csv": RESULTS_COLUMNS,
    "rounds.csv": ROUNDS_COLUMNS,
    "messages.parquet": MESSAGES_COLUMNS,
    "parts.csv": PARTS_COLUMNS,
    "timing.csv": TIMING_COLUMNS,
    "report/runs.csv: those of results.csv, then": {
        "source": Column("string", "the run folder or CSV that the run was read from"),
        **MEASURES,
    },
    "report/tables/\\*.csv: the settings, then": TABLE_COLUMNS,
    "report/tables/\\*time\\*.csv: also the network, and of": TIME_MEASURES,
}


def commands(text: str) -> list[str]:
    """Every documented command of ours, one line each, without its comment."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    found = [m[1] for line in lines if (m := re.search(r"python -m fedbw_sweep(.*)", line))]
    return [arguments.split("#")[0].strip() for arguments in found]


@pytest.mark.parametrize("arguments", commands(README))
def test_documented_commands_compose(run_config: Callable[..., RunConfig], arguments: str) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [word for word in arguments.split() if not word.startswith(("-", ".plan"))]
    parsed = OverridesParser.create().parse_overrides(overrides)
    [grid] = BasicSweeper.split_arguments(parsed, None)
    assert grid
    for cell in grid:
        run_config(*cell)


def test_the_default_of_every_documented_key(run_config: Callable[..., RunConfig]) -> None:
    defaults = run_config()
    rows = re.findall(r"^\| (`.+?) \| (\S.*?) \| .* \|$", README, re.MULTILINE)
    keys = [
        (key, value)
        for names, values in rows
        for key, value in zip(re.findall("`(.+?)`", names), values.split(", "), strict=True)
    ]
    assert len(keys) >= 15
    for key, value in keys:
        actual: object = defaults
        for part in key.split("."):
            actual = getattr(actual, part)
        actual = getattr(actual, "name", actual)
        expected = None if value == "null" else type(actual)(value)  # type: ignore[call-arg]
        assert actual == expected, key
    for key in ("num_clients", "fraction_fit", "rounds", "local_epochs", "compression"):
        assert key in dict(keys)


def test_every_column_is_documented() -> None:
    assert columns_page() == (ROOT / "docs" / "columns.md").read_text(encoding="utf-8"), (
        "docs/columns.md is out of date: python -m tests.test_docs writes it"
    )


def columns_page() -> str:
    """The page that says what every column is, from the schema itself."""

    def table(columns: dict[str, Column]) -> list[str]:
        rows = [f"| `{n}` | {c.dtype} | {c.meaning} |" for n, c in columns.items()]
        return ["| column | type | meaning, unit |", "|---|---|---|", *rows, ""]

    lines = [
        "# Columns",
        "",
        "Types are pandas' names. An empty cell is a value that does not exist, such as the loss "
        "of a failed run. Before its own columns, `results.csv` has one column for each setting of "
        "the run's configuration: `num_clients`, `compression`, `compression.density` and so on, "
        "as in `conf/`.",
        "",
    ]
    for file, columns in COLUMNS.items():
        lines += [f"## {file}", "", *table(dict(columns))]
    return "\n".join(lines)


def test_the_plan_shown_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from fedbw_sweep.plan import main

    [(arguments, shown)] = re.findall(
        r"```sh\npython -m fedbw_sweep\.plan (.*)\n```\n\n```\n(.*?)```", README, re.DOTALL
    )
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_every_compression_choice_is_listed() -> None:
    listed = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8")
    for path in (CONF / "compression").glob("*.yaml"):
        assert f"`{path.stem}`" in listed, path.stem


def test_the_contributing_guides_toy_passes_the_contract(tmp_path: Path) -> None:
    for part in ("conf", "fedbw_sweep", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert len(files) == 2
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    [command] = re.findall(r"^\.venv/bin/pytest (tests/.*)$", CONTRIBUTING, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10  # type: ignore[index]


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """With every program replaced by `echo`, so that only the words are run."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(ROOT / "README.md", tmp_path)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program = """#!/bin/sh
mkdir -p .venv/bin
for name in pip ruff mypy pytest; do
  printf '#!/bin/sh\\necho "ran %s"\\n' "$name" > .venv/bin/$name
  chmod +x .venv/bin/$name
done
"""
    (bin_ / "python3.11").write_text(program)
    (bin_ / "chromium").write_text("")  # so that nothing is installed
    for program_path in bin_.iterdir():
        program_path.chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env={"PATH": f"{bin_}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert [line.split()[1] for line in ran] == ["pip", "ruff", "ruff", "mypy", "pytest"]


if __name__ == "__main__":
    (ROOT / "docs" / "columns.md").write_text(columns_page(), encoding="utf-8")
