"""The experiments: their cells are done, cut to seconds; the results shown are the report's."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hydra import initialize_config_dir

from fedbw_sweep import run
from fedbw_sweep.cells import Composer
from fedbw_sweep.config import CONF, RunConfig
from fedbw_sweep.results import collect, load_records

from .conftest import ROOT, config_of
from .local import simulator

PAGES = ROOT / "docs" / "results"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CUT = {"rounds": 2, "batch_size": 1, "sequence_length": 8, "seed": 1}
TIMED = {"diloco"}
"""Tables of times, which need the runs' folders."""


@cache
def cells(experiment: str) -> list[list[RunConfig]]:
    """The cells of each command on top of an experiment's file."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"^# python -m fedbw_sweep (.*)$", text, re.MULTILINE)
    assert commands, "its command belongs on top"
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composer = Composer("config")
        for command in commands:
            words = [word for word in command.split() if word != "-m"]
            assert f"experiment={experiment}" in words
            configs = [RunConfig.from_hydra(cell) for _, cell in composer.cells(words)]
            found.append(configs)
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_command_names_its_own_runs(experiment: str) -> None:
    found = [config.run_id for configs in cells(experiment) for config in configs]
    assert len(set(found)) == len(found)
    seeds = {config.seed for configs in cells(experiment) for config in configs}
    assert seeds == ({1} if experiment == "seed" else {1, 2, 3})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_smoke(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cell of every command: a tiny model, two clients, two rounds, a step in each."""
    monkeypatch.setattr(run, "simulate", simulator())
    short: dict[str, RunConfig] = {}
    model = config_of("model=tiny").model
    for config in (configs[-1] for configs in cells(experiment)):
        data = config.data.model_copy(update={"heldout_tokens": 64})
        steps = {"local_steps": 1, "local_epochs": 1} if config.local_epochs else {}
        own = {"num_clients": 2, "fraction_fit": 1.0, "data": data, "model": model, **CUT, **steps}
        cut = config.model_copy(update=own)
        short[cut.run_id] = cut
    for config in short.values():
        assert run.execute(config, tmp_path).error is None
    collect(tmp_path)
    results = load_records(tmp_path).results
    assert len(results) == len(short)
    assert (results["status"] == "done").all()
    assert (results["uplink_bytes"] > 0).all()


def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", PAGES / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> list[str]:
    return sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")


def test_every_experiment_has_its_page() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(EXPERIMENTS) - {"small", "seed"} == set(shown())
    for name in shown():
        assert f"({name}.md)" in index


@pytest.mark.parametrize("name", shown())
def test_the_results_shown_are_those_recorded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    render = renderer()
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    moved = {str(folder): PAGES / folder.name for folder in render.sweeps(page)}
    assert moved
    experiment = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    for module, *arguments in render.commands(page):
        if module == "fedbw_sweep":
            assert f"# python -m fedbw_sweep {' '.join(arguments)}\n" in experiment
    render.make_report(page, moved, tmp_path)
    tables = {k: v for k, v in render.tables(tmp_path).items() if k.split()[1] not in TIMED}
    assert any(f"<!-- {table} -->" in page for table in tables) or name in TIMED
    assert render.fill(page, tables) == page
    for folder, figure in render.FIGURE.findall(page):
        assert (PAGES / folder / f"{figure}.png").exists()
