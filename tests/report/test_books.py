"""The report against numbers worked out here, from the message books and the loss files alone."""

from __future__ import annotations

import csv
import shutil
import signal
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from fedbw_sweep.federation import runs, shared
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import announce
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.report.render import Rendered
from fedbw_sweep.report.spec import NUMBERS, TABLE_COLUMNS
from fedbw_sweep.sweeps import run
from tests.conftest import ROOT, SMALL, config_of
from tests.local import LocalBackend
from tests.report.books import BUDGET, TARGET, books, near

pytestmark = pytest.mark.slow

METHODS, CLIENTS, SEEDS = ("none", "int8", "topk"), (2, 4), (1, 2, 3)

VARIED = "compression", "num_clients", "seed"

KILLED, DIVERGED = ("int8", 4, 3), ("topk", 2, 2)

MINUTE = (
    "model.architecture.num_hidden_layers=1",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "local_steps=5",
    "lr=3e-3",
)


def kill(sweep: Path, *overrides: str) -> None:
    """Do a run in a process of its own, which the kernel kills after the first round's training."""
    code = """
import os, signal, sys
from pathlib import Path
from fedbw_sweep.federation import runs
from fedbw_sweep.sweeps import run
from tests.conftest import config_of
from tests.local import LocalBackend

evaluate, evaluated = runs.heldout_loss, []

def evaluate_once(*arguments):
    if evaluated:
        os.kill(os.getpid(), signal.SIGKILL)
    evaluated.append(True)
    return evaluate(*arguments)

run.backend_of, runs.heldout_loss = LocalBackend(), evaluate_once
run.execute(config_of(*sys.argv[2:]), Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(sweep), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 runs really trained, but for one that was killed and one that diverged."""
    folder = tmp_path_factory.mktemp("outputs") / "sweep"
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(200)))
    quick = (
        *SMALL,
        *MINUTE,
        "fraction_fit=1.0",
        "data=text",
        f"data.path={text}",
        "data.partition=iid",
    )
    configs = {
        key: config_of(*quick, *(f"{k}={v}" for k, v in zip(VARIED, key, strict=True)))
        for key in product(METHODS, CLIENTS, SEEDS)
    }
    announce(configs.values(), folder)
    kill(folder, *quick, *(f"{k}={v}" for k, v in zip(VARIED, KILLED, strict=True)))
    assert [path.name for path in (folder / configs[KILLED].run_id).iterdir()] == ["config.yaml"]
    evaluate = runs.heldout_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "backend_of", LocalBackend())
        for key, config in configs.items():
            if key != KILLED:
                diverges = key == DIVERGED
                shared._initial_losses.clear()  # so that it does at once, and no other
                patch.setattr(
                    runs, "heldout_loss", (lambda *_: float("nan")) if diverges else evaluate
                )
                run.execute(config, folder)
    collect(folder)
    return folder


@pytest.fixture(scope="module")
def report(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    arguments = [str(sweep), "--out", str(out), "--target-loss", str(TARGET)]
    assert main([*arguments, "--budget-mb", str(BUDGET / 1e6), "--network", "campus"]) == 0
    return out


SHOWN = {  # what is printed, by table and title: the measure, what it is divided by, its format
    "compression": {
        "up (MB)": ("uplink_bytes", 1e6, ".2f"),
        "down (MB)": ("downlink_bytes", 1e6, ".2f"),
        "total (MB)": ("total_bytes", 1e6, ".2f"),
        "up ratio": ("uplink_ratio", 1, ".1f"),
        "up (bits/coord.)": ("bits_per_coordinate", 1, ".3f"),
        "loss (nats/token)": ("loss", 1, ".3f"),
        "loss - baseline's (nats/token)": ("loss_difference", 1, "+.3f"),
    },
    "bytes_to_target": {
        "rounds to target": ("rounds_to_target", 1, ".1f"),
        "up (MB)": ("uplink_bytes_to_target", 1e6, ".2f"),
        "down (MB)": ("downlink_bytes_to_target", 1e6, ".2f"),
        "total (MB)": ("bytes_to_target", 1e6, ".2f"),
    },
    "loss_at_budget": {
        "loss when spent up (nats/token)": ("loss_at_uplink_budget", 1, ".3f"),
        "loss when spent both ways (nats/token)": ("loss_at_budget", 1, ".3f"),
    },
    "communication_time": {
        "a round (s)": ("round_seconds", 1, ",.2f"),
        "all rounds (s)": ("communication_seconds", 1, ",.1f"),
        "coding a round (s)": ("codec_seconds", 1, ".3f"),
        "break-even (Mbit/s)": ("break_even_mbit_s", 1, ",.0f"),
    },
    "time_to_target": {
        "rounds to target": ("rounds_to_target", 1, ".1f"),
        "communication (s)": ("seconds_to_target", 1, ",.1f"),
    },
}

SPREAD = {
    "loss", "loss_difference", "rounds_to_target", "bytes_to_target", "loss_at_uplink_budget",
    "loss_at_budget", "seconds_to_target",
}  # fmt: skip

SPED_UP = {"uplink_bytes_to_target", "bytes_to_target", "round_seconds", "seconds_to_target"}

NOT_OF_RUNS = {  # which stand in the tables of times alone
    "break_even_mbit_s", "codec_seconds", "communication_seconds", "link_bytes", "round_seconds",
    "seconds_to_target",
}  # fmt: skip


def in_its_unit(title: str, sizes: list[float | None]) -> tuple[str, float, str]:
    """The title, unit and format of a column of bytes: the smallest size has three digits."""
    smallest = min(size for size in sizes if size)
    if smallest < 1e3:
        return title.replace("MB", "B"), 1, "B"
    return (title, 1e6, ".2f") if smallest >= 1e6 else (title.replace("MB", "kB"), 1e3, ",.2f")


def text_of(number: float, unit: float, form: str) -> str:
    """What is printed; a whole number of bytes has no decimals."""
    form = {"B": ",.0f" if float(number).is_integer() else ",.2f"}.get(form, form)
    return format(number / unit, form)


@pytest.mark.parametrize("name", SHOWN)
def test_every_number_is_right(sweep: Path, report: Path, name: str) -> None:
    runs = books(sweep)
    assert len(runs) == 16

    def mean(name: str, method: str, clients: int) -> tuple[float | None, list[float], int]:
        own = [runs[key][name] for key in runs if key[:2] == (method, clients)]
        values = [value for value in own if value is not None]
        middle = statistics.median if name == "break_even_mbit_s" else statistics.mean
        return middle(values) if values else None, values, len(own)

    with (report / "tables" / f"{name}.csv").open() as file:
        rows = {(r["compression"], int(r["num_clients"])): r for r in csv.DictReader(file)}
    markdown = (report / "tables" / f"{name}.md").read_text().splitlines()
    cells = [line.strip("|").split("|") for line in markdown if "|" in line]
    header, _, *printed = [[cell.strip(" *") for cell in line] for line in cells]
    texts = [dict(zip(header, line, strict=True)) for line in printed]
    printed_of = {(r["compression"], int(r["num_clients"])): r for r in texts}
    assert set(rows) == set(printed_of) == set(product(METHODS, CLIENTS))
    for (method, clients), row in rows.items():
        text = printed_of[method, clients]
        lost = {key for key in (KILLED, DIVERGED) if key[:2] == (method, clients)}
        expected: dict[str, float | None] = {
            "runs": 3, "done": 3 - len(lost),
            "failed": int(DIVERGED in lost), "missing": int(KILLED in lost),
        }  # fmt: skip
        why = "failed" if DIVERGED in lost else "missing"
        shown = {"n": f"2 of 3: 1 {why}" if lost else "3"}
        for place, (title, (column, unit, form)) in enumerate(SHOWN[name].items()):
            if unit == 1e6:
                sizes = [mean(column, *row)[0] for row in rows]
                title, unit, form = in_its_unit(title, sizes)
            average, values, done = mean(column, method, clients)
            expected[column], expected[f"{column}_n"] = average, len(values)
            shown[title] = "—" if average is None else text_of(average, unit, form)
            if average is None and place == 0:
                shown[title] += " (not reached in 2 rounds)"
            if column in SPREAD:
                sd = statistics.stdev(values) if len(values) > 1 else None
                expected[f"{column}_sd"] = sd
                sd_text = "" if sd is None else f" ± {text_of(sd, unit, form.strip('+'))}"
                shown[title] += sd_text
            if values and len(values) < done:
                shown[title] += f" [{len(values)} of {done}]"
            if column in SPED_UP:
                seeds = [
                    s for s in SEEDS if {(method, clients, s), ("none", clients, s)} <= set(runs)
                ]
                own, base = (
                    [runs[of, clients, seed][column] for seed in seeds] for of in (method, "none")
                )
                whole = None not in own + base
                times = statistics.mean(base) / statistics.mean(own) if whole else None
                expected[f"{column}_speedup"] = times
                n = "" if len(seeds) == len(SEEDS) else f", n={len(seeds)}"
                shown[title] += "" if times is None else f" ({times:.1f}x{n})"
        for column, found in row.items():
            if column not in {"compression", "num_clients", "network"}:
                assert near(found, expected.pop(column)), f"{method} {clients} {column}: {found}"
        assert not expected
        for title, found in text.items():
            if title not in {"compression", "num_clients", "network"}:
                assert found == shown.pop(title), f"{method} {clients} {title}"
        assert not shown


def test_every_number_of_the_runs_is_right(sweep: Path, report: Path) -> None:
    runs = books(sweep)
    with (report / "runs.csv").open() as file:
        rows = {tuple(row[name] for name in VARIED): row for row in csv.DictReader(file)}
    assert len(rows) == 18
    for (method, clients, seed), own in runs.items():
        row = rows[method, str(clients), str(seed)]
        assert set(own) - set(row) == NOT_OF_RUNS
        for name in set(own) - NOT_OF_RUNS:
            assert near(row[name], own[name]), f"{method} {clients} {seed} {name}"
    reached = {
        key[:2]: [own["rounds_to_target"] for k, own in runs.items() if k[:2] == key[:2]]
        for key in runs
    }
    counts = {(len(found), found.count(None)) for found in reached.values()}
    assert len(counts) > 2, "the target is too easy or too hard to tell anything"


def test_the_killed_and_the_diverged_are_named(sweep: Path, report: Path) -> None:
    with (report / "tables" / "failures.csv").open() as file:
        rows = {
            (r["compression"], int(r["num_clients"]), int(r["seed"])): r
            for r in csv.DictReader(file)
        }
    assert set(rows) == {KILLED, DIVERGED}
    assert rows[KILLED]["status"] == "missing"
    assert "never recorded" in rows[KILLED]["reason"]
    assert rows[DIVERGED]["status"] == "failed"
    assert "held-out loss is nan" in rows[DIVERGED]["reason"]
    text = (report / "tables" / "compression.md").read_text()
    assert "2 of 3: 1 failed" in text
    assert "2 of 3: 1 missing" in text
    assert "failed: topk, num_clients=2, seed=2: round 0: held-out loss is nan" in text


def test_what_is_written(report: Path) -> None:
    tables = (
        "bytes_to_target",
        "communication_time",
        "compression",
        "failures",
        "loss_at_budget",
        "time_to_target",
    )
    assert sorted(p.stem for p in (report / "tables").glob("*.tex")) == sorted(tables)
    for name in tables:
        for suffix in ("csv", "md", "tex", "html"):
            assert (report / "tables" / f"{name}.{suffix}").stat().st_size > 100
        ElementTree.fromstring(f"<x>{(report / 'tables' / f'{name}.html').read_text()}</x>")
    for name in ("loss_against_bytes", "pareto_front", "bytes_by_round", "bytes_by_part"):
        assert (report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"/Type0" in (report / "figures" / f"{name}.pdf").read_bytes()
        svg = (report / "figures" / f"{name}.svg").read_text()
        assert "payload" in svg  # text, not outlines
    latex = (report / "tables" / "compression.tex").read_text()
    assert "\\toprule" in latex
    assert "|" not in latex.split("tabular}{")[1].split("}")[0]
    assert "\\textbf{" in latex


def test_the_report_is_reproducible(sweep: Path, report: Path, tmp_path: Path) -> None:
    again = [str(sweep), "--out", str(tmp_path), "--target-loss", str(TARGET)]
    assert main([*again, "--budget-mb", str(BUDGET / 1e6), "--network", "campus"]) == 0
    for path in report.rglob("*.*"):
        if path.is_file() and path.suffix != ".html":
            assert path.read_bytes() == (tmp_path / path.relative_to(report)).read_bytes(), path


def test_every_column_of_its_csvs_is_documented(report: Path, sweep: Path) -> None:
    page = (ROOT / "docs" / "columns.md").read_text()
    settings = set(load_records(sweep, messages=False).results.columns)
    for path in [*report.glob("*.csv"), *(report / "tables").glob("*.csv")]:
        for name in pd.read_csv(path, nrows=0).columns:
            stem = next((m for m in NUMBERS if name in {f"{m}_sd", f"{m}_n", f"{m}_speedup"}), name)
            shown = name if stem == name else f"<measure>{name.removeprefix(stem)}"
            assert name in settings or f"`{shown}`" in page, f"{path.name}: {name}"
    for name in TABLE_COLUMNS:
        assert f"`{name}`" in page


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_the_latex_compiles(report: Path, tmp_path: Path) -> None:
    if subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode:
        pytest.skip("needs booktabs")
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    nasty = "50% of $x_1 & {#2} ~ ^ \\ <|> \"q\" 'r' é ü ß 中 ± — …\x07"
    frame = pd.DataFrame({"a_b & c": [nasty], "x (%)": ["1.0 ± 0.1"]})
    best = pd.DataFrame(True, frame.index, frame.columns)
    Rendered("nasty", nasty, frame, best, frame, (nasty,)).write(tmp_path / "tables")
    names = ["num_clients", "fraction_fit", "local_epochs", "batch_size", "compression", "n"]
    names += [f"loss when spent {n} (nats/token)" for n in range(5)]
    wide = pd.DataFrame(
        [["0.25"] * 4 + ["lowrank", "2 of 3: 1 missing"] + ["1,234.56 (21.4x)"] * 5]
    )
    wide = pd.concat([wide.set_axis(names, axis=1)] * 60, ignore_index=True)
    Rendered("wide", "Wide and long", wide, wide == "0.25", wide).write(tmp_path / "tables")
    document = (tmp_path / "report.tex").read_text()
    end = r"\input{tables/wide}\end{document}"
    document = document.replace(r"\end{document}", end)
    (tmp_path / "report.tex").write_text(document.replace(end, r"\input{tables/nasty}" + end))
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
