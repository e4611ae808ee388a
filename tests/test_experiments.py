"""The experiments: their runs are done, cut to seconds; the results shown are the report's."""

from __future__ import annotations

import importlib.util
import re
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from fedbw_sweep.config.identity import numerics_of, run_id_of
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load, load_records
from fedbw_sweep.sweeps import run
from fedbw_sweep.sweeps.grid import runs_of

from .conftest import ROOT, config_of
from .local import LocalBackend

pytestmark = pytest.mark.slow

PAGES = ROOT / "docs" / "results"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
RECORDED_AT = 2
"""The numerics that the older of the pages' runs were recorded at."""
CUT = {"rounds": 2, "batch_size": 1, "sequence_length": 8, "seed": 1}


@cache
def runs(experiment: str) -> list[list[RunConfig]]:
    """The runs of each command on top of an experiment's file."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"^# python -m fedbw_sweep (.*)$", text, re.MULTILINE)
    assert commands, "its command belongs on top"
    found = []
    for command in commands:
        words = [word for word in command.split() if word != "-m"]
        assert f"experiment={experiment}" in words
        found.append([config for _, config in runs_of(words)])
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_command_names_its_own_runs(experiment: str) -> None:
    found = [(config.sweep, config.run_id) for configs in runs(experiment) for config in configs]
    assert len(set(found)) == len(found)
    seeds = {config.seed for configs in runs(experiment) for config in configs}
    assert seeds == ({1} if experiment == "lesson" else {1, 2, 3})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_smoke(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run of every command: a tiny model, two clients, two rounds, a step in each."""
    monkeypatch.setattr(run, "backend_of", LocalBackend())
    short: dict[str, RunConfig] = {}
    model = config_of("model=tiny").model
    for config in (configs[-1] for configs in runs(experiment)):
        data = config.data.model_copy(update={"heldout_tokens": 64, "pooled": 1})
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


def load_render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", PAGES / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()
SHOWN = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")


def text_of(page: str) -> str:
    return (PAGES / f"{page}.md").read_text(encoding="utf-8")


def test_every_experiment_has_its_page() -> None:
    assert set(EXPERIMENTS) - {"small", "lesson"} == set(SHOWN)
    for name in SHOWN:
        assert f"({name}.md)" in text_of("README")


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_has_its_experiments_commands_and_all_that_is_known_of_its_runs(name: str) -> None:
    experiment = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    commands = [
        f"# python -m {module} {' '.join(arguments)}"
        for module, *arguments in render.commands(text_of(name))
        if module == "fedbw_sweep"
    ]
    assert commands == re.findall("^# python -m .*", experiment, re.MULTILINE)
    for sweep in render.trained(text_of(name)):
        recorded = set(load(PAGES / sweep)["run_id"])
        own = [config for configs in runs(name) for config in configs if config.sweep == sweep]
        sciences = [with_contents(config).science for config in own]
        named = [{run_id_of(s, at) for at in (RECORDED_AT, numerics_of(s))} for s in sciences]
        assert len(recorded) == len(named)
        assert all(len(ids & recorded) == 1 for ids in named)
        for mark in (f"<!-- runs {sweep} -->", f"<!-- hashes {sweep} -->"):
            assert mark in text_of(name)
    assert "<!-- table" in text_of(name)


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_is_what_its_records_make_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PAGES, tmp_path, dirs_exist_ok=True)
    figures = [tmp_path / at / f"{kind}.png" for at, kind in render.FIGURE.findall(text_of(name))]
    for figure in figures:
        figure.unlink()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(render, "HERE", tmp_path)
    render.render_recorded(name)
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == text_of(name)
    assert figures
    assert all(figure.exists() for figure in figures)


@pytest.mark.parametrize("block", sorted(render.TIMED))
def test_what_is_recorded_of_tables_of_times(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes and losses are: only what the runs' folders tell is missing."""
    monkeypatch.chdir(ROOT)
    [page] = [text for text in map(text_of, SHOWN) if f"<!-- {block} -->" in text]
    [arguments] = [words for words in render.reports(page) if "--network" in words]
    render.make_report(arguments, render.kept(page), tmp_path)
    made = render.tables(tmp_path)[block].splitlines()
    [shown] = [m[0].splitlines()[1:-1] for m in render.BLOCK.finditer(page) if m[2] == block]
    assert len(made) == len(shown)
    for now, was in zip(made, shown, strict=True):
        for cell, recorded in zip(now.split("|"), was.split("|"), strict=True):
            assert cell in (recorded, " — ")


def test_what_verified_runs_say_goes_into_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PAGES, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setattr(render, "verify", lambda words: print(*words))
    render.verify_samples(["layers/0123456789ab", "five_ways/ba9876543210"])
    before, after = ((at / "README.md").read_text("utf-8") for at in (PAGES, tmp_path))
    said = {m[1]: m[0] for m in render.VERIFIED.finditer(before)}  # of other sweeps it stays
    assert len(said) > 2
    said["five_ways"] = "- docs/results/five_ways/ba9876543210\n"
    said["layers"] = "- docs/results/layers/0123456789ab\n"
    assert f"<!-- verified -->\n{''.join(said.values())}<!-- end -->" in after
