"""What the documents say is run, or compared with what is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.records import schema
from fedbw_sweep.records.schema import (
    MESSAGES_COLUMNS,
    PARTS_COLUMNS,
    RESULTS_COLUMNS,
    ROUNDS_COLUMNS,
    TIMING_COLUMNS,
    Column,
)
from fedbw_sweep.report.measure import MEASURES, TIME_MEASURES
from fedbw_sweep.report.spec import TABLE_COLUMNS
from fedbw_sweep.sweeps.grid import runs_of

from .conftest import CONF, ROOT, config_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
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
def test_documented_commands_compose(arguments: str) -> None:
    overrides = [word for word in arguments.split() if not word.startswith(("-", ".plan"))]
    assert list(runs_of(overrides))


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
        "of a failed run, or a setting that the run's choices do not have.",
        "",
        "## results.csv: the settings of the run, then",
        "",
        *table(settings()),
        "`downlink.*` are as `compression.*`. Choices of your own add columns of theirs.",
        "",
    ]
    [paragraph] = cleandoc(schema.__doc__ or "").split("\n\n")[1:]
    said = " ".join(paragraph.split()).replace("``", "`")
    lines += ["## What is added later", "", said, ""]
    for file, columns in COLUMNS.items():
        lines += [f"## {file}", "", *table(dict(columns))]
    return "\n".join(lines)


NULL_BY_DEFAULT = {
    "local_steps": "Int64",
    "compression.target_bits": "Float64",
    "compression.target_nmse": "Float64",
}
"""Numbers whose default says nothing of their type; all else that is null is text."""
TYPES = {bool: "boolean", int: "Int64", float: "Float64"}
LINE = re.compile(r"^(\s*)(\w+):(?:\s+(.*?))??\s+# (.*)$")


def settings() -> dict[str, Column]:
    """Every setting of a run's science, its type and the comment that conf/ has on it."""
    groups = [g for g in RunConfig.model_fields if (CONF / g).is_dir() and g not in EXECUTION_KEYS]
    said: dict[str, list[Column]] = {}
    for path in [CONF / "config.yaml", *(p for g in groups for p in sorted((CONF / g).iterdir()))]:
        group = "" if path.parent == CONF else f"{path.parent.name}."
        values = OmegaConf.load(path)
        above = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if not (match := LINE.match(line)):
                continue
            indent, key, _, comment = match.groups()
            value = OmegaConf.select(values, f"{above}.{key}" if indent else key)
            if not indent:
                above = key
            name = f"{group}{above}.{key}" if indent else f"{group}{key}"
            top = name.partition(".")[0]
            if top not in RunConfig.model_fields or top in EXECUTION_KEYS:
                continue
            if OmegaConf.is_dict(value) and not group:
                continue
            kind = NULL_BY_DEFAULT.get(name, TYPES.get(type(value), "string"))
            nested = group and indent  # a column holds all of an architecture, as JSON
            if not nested:
                said.setdefault(name, []).append(Column(kind, comment))
    for group in [*groups, "downlink"]:
        said[group] = [Column("string", "the choice of that name in conf/")]
    # Of choices that share a key, what most say of it.
    return {name: Counter(each).most_common(1)[0][0] for name, each in sorted(said.items())}


def test_every_setting_of_a_run_is_documented() -> None:
    documented = settings()
    choices = [("compression", p.stem) for p in (CONF / "compression").glob("*.yaml")]
    choices += [(g, p.stem) for g in ("optimizer", "server", "trainable", "data", "model")
                for p in (CONF / g).glob("*.yaml")]  # fmt: skip
    for group, name in choices:
        needed = {"data": ["data.path=x"], "model": ["model.name_or_path=x"]}.get(group, [])
        needed = needed if name in ("text", "hub") else []
        if (group, name) == ("data", "hub"):
            needed = ["data.path=x"]
        columns = config_columns(config_of(f"{group}={name}", *needed).science)
        for column, value in columns.items():
            shown = column if column in documented else column.replace("downlink", "compression")
            assert shown in documented, column
            if value is not None and not isinstance(value, str):
                kind = documented[shown].dtype
                assert kind == TYPES[type(value)] or (kind, type(value)) == ("Float64", int), column


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


def test_pre_commit_runs_what_ci_runs() -> None:
    [command] = re.findall(r"<!-- test -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    programs = [part.strip().removeprefix(".venv/bin/") for part in command.split("&&")[2:]]
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"] for hook in repository["hooks"]]
    assert hooks[:3] == programs[:3] == ["ruff check .", "ruff format --check .", "mypy"]
    assert hooks[3].split()[0] == programs[3] == "pytest"


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    (ROOT / "docs" / "columns.md").write_text(columns_page(), encoding="utf-8")
