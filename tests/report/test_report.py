"""The report against numbers worked out here, from the message books and the loss files alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.axes import Axes

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.federation import job
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord, announce
from fedbw_sweep.report import figure
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.report.measure import Options, cell_curves, measure, measure_time
from fedbw_sweep.report.render import Rendered, escape_latex
from fedbw_sweep.report.spec import NUMBERS, SHIPPED, TABLE_COLUMNS, TableBuilder, load_spec
from fedbw_sweep.sweep import run
from tests.conftest import ROOT, SMALL, config_of
from tests.local import LocalBackend

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
TARGET, BUDGET = 5.14, 1e6
Cell = tuple[str, int, int]


def kill(sweep: Path, *overrides: str) -> None:
    """Do a run in a process of its own, which the kernel kills after the first round's training."""
    code = """
import os, signal, sys
from pathlib import Path
from fedbw_sweep.federation import job
from fedbw_sweep.sweep import run
from tests.conftest import config_of
from tests.local import LocalBackend

evaluate, evaluated = job.heldout_loss, []

def evaluate_once(*arguments):
    if evaluated:
        os.kill(os.getpid(), signal.SIGKILL)
    evaluated.append(True)
    return evaluate(*arguments)

run.backend_of, job.heldout_loss = LocalBackend(), evaluate_once
run.execute(config_of(*sys.argv[2:]), Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(sweep), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 cells really trained, but for one that was killed and one that diverged."""
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
        cell: config_of(*quick, *(f"{k}={v}" for k, v in zip(VARIED, cell, strict=True)))
        for cell in product(METHODS, CLIENTS, SEEDS)
    }
    announce(configs.values(), folder)
    kill(folder, *quick, *(f"{k}={v}" for k, v in zip(VARIED, KILLED, strict=True)))
    assert [path.name for path in (folder / configs[KILLED].run_id).iterdir()] == ["config.yaml"]
    evaluate = job.heldout_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "backend_of", LocalBackend())
        for cell, config in configs.items():
            if cell != KILLED:
                diverges = cell == DIVERGED
                patch.setattr(
                    job, "heldout_loss", (lambda *_: float("nan")) if diverges else evaluate
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


def books(sweep: Path) -> dict[Cell, dict[str, float | None]]:
    """Each finished run's numbers, from its messages, losses and seconds, in plain Python."""
    network = yaml.safe_load((ROOT / "conf" / "network" / "campus.yaml").read_text())
    assert network["spread"] == 0  # no draws: a message's time is latency and bytes over the rate
    rate = {way: network[f"{way}_mbit_s"] * 1e6 / 8 for way in ("uplink", "downlink")}
    found: dict[Cell, dict[str, float | None]] = {}
    for folder in sweep.iterdir():
        if not (folder / "status.json").exists():
            continue
        if json.loads((folder / "status.json").read_text())["status"] != "done":
            continue
        config = yaml.safe_load((folder / "config.yaml").read_text())
        with (folder / "rounds.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        with (folder / "timing.csv").open() as file:
            timing = {int(row["round"]): row for row in csv.DictReader(file)}
        messages = pq.read_table(folder / "messages.parquet").to_pylist()
        numbers = range(len(losses))
        way = {
            name: [
                [m for m in messages if m["direction"] == name and m["round"] == n] for n in numbers
            ]
            for name in ("uplink", "downlink")
        }
        up, down = (
            [sum(sum(m["payload_bytes"] for m in of) for of in way[name][: n + 1]) for n in numbers]
            for name in ("uplink", "downlink")
        )
        both = [u + d for u, d in zip(up, down, strict=True)]
        uplinks = [m for of in way["uplink"] for m in of]
        dense = sum(m["dense_bytes"] for m in uplinks)
        slowest = [
            max(
                sum(
                    network["latency_s"] + m["payload_bytes"] / rate[m["direction"]]
                    for m in messages
                    if (m["round"], m["client"]) == (n, client)
                )
                for client in {m["client"] for m in messages}
            )
            for n in numbers[1:]
        ]
        coding = [
            float(timing[n]["encode_seconds"]) / len(way["uplink"][n])
            + float(timing[n]["decode_seconds"])
            for n in numbers[1:]
        ]
        first = next((n for n in numbers if losses[n] <= TARGET), None)
        found[config["compression"]["name"], config["num_clients"], config["seed"]] = {
            "uplink_bytes": up[-1],
            "downlink_bytes": down[-1],
            "total_bytes": both[-1],
            "uplink_ratio": dense / up[-1],
            "bits_per_coordinate": 8 * up[-1] / (dense / 4),  # fp32 takes 4 bytes
            "loss": losses[-1],
            "rounds_to_target": first,
            "uplink_bytes_to_target": None if first is None else up[first],
            "downlink_bytes_to_target": None if first is None else down[first],
            "bytes_to_target": None if first is None else both[first],
            "seconds_to_target": None if first is None else sum(slowest[:first]),
            "loss_at_uplink_budget": [losses[n] for n in numbers if up[n] <= BUDGET][-1],
            "loss_at_budget": [losses[n] for n in numbers if both[n] <= BUDGET][-1],
            "round_seconds": statistics.mean(slowest),
            "communication_seconds": sum(slowest),
            "codec_seconds": statistics.mean(coding),
            "link_bytes": sum(
                statistics.mean(m["payload_bytes"] for of in way[name] for m in of) for name in way
            ),
        }
    for (method, clients, seed), own in found.items():
        base = found["none", clients, seed]
        own["loss_difference"] = own["loss"] - base["loss"]
        saved = base["link_bytes"] - own["link_bytes"]
        longer = own["codec_seconds"] - base["codec_seconds"]
        speed = float("inf") if longer <= 0 else 8 * saved / 1e6 / longer
        own["break_even_mbit_s"] = None if method == "none" else speed if saved > 0 else 0.0
    return found


def near(text: str, value: float | None) -> bool:
    return (
        text == "" if value is None else float(text) == pytest.approx(value, rel=1e-12, abs=1e-15)
    )


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


@pytest.mark.parametrize("name", SHOWN)
def test_every_number_is_right(sweep: Path, report: Path, name: str) -> None:
    runs = books(sweep)
    assert len(runs) == 16

    def mean(name: str, method: str, clients: int) -> tuple[float | None, list[float], int]:
        own = [runs[cell][name] for cell in runs if cell[:2] == (method, clients)]
        values = [value for value in own if value is not None]
        middle = statistics.median if name == "break_even_mbit_s" else statistics.mean
        return middle(values) if values else None, values, len(own)

    with (report / "tables" / f"{name}.csv").open() as file:
        rows = {(r["compression"], int(r["num_clients"])): r for r in csv.DictReader(file)}
    markdown = (report / "tables" / f"{name}.md").read_text().splitlines()
    cells = [line.strip("|").split("|") for line in markdown if "|" in line]
    header, _, *printed = [[cell.strip(" *") for cell in line] for line in cells]
    texts = [dict(zip(header, line, strict=True)) for line in printed]
    text_of = {(r["compression"], int(r["num_clients"])): r for r in texts}
    assert set(rows) == set(text_of) == set(product(METHODS, CLIENTS))
    for (method, clients), row in rows.items():
        text = text_of[method, clients]
        lost = {cell for cell in (KILLED, DIVERGED) if cell[:2] == (method, clients)}
        expected: dict[str, float | None] = {
            "runs": 3, "done": 3 - len(lost),
            "failed": int(DIVERGED in lost), "missing": int(KILLED in lost),
        }  # fmt: skip
        why = "failed" if DIVERGED in lost else "missing"
        shown = {"n": f"2 of 3: 1 {why}" if lost else "3"}
        for place, (title, (column, unit, form)) in enumerate(SHOWN[name].items()):
            average, values, done = mean(column, method, clients)
            expected[column], expected[f"{column}_n"] = average, len(values)
            shown[title] = "—" if average is None else format(average / unit, form)
            if average is None and place == 0:
                shown[title] += " (not reached in 2 rounds)"
            if column in SPREAD:
                sd = statistics.stdev(values) if len(values) > 1 else None
                expected[f"{column}_sd"] = sd
                shown[title] += "" if sd is None else f" ± {format(sd / unit, form.strip('+'))}"
            if values and len(values) < done:
                shown[title] += f" [{len(values)} of {done}]"
            if column in SPED_UP:
                base, of_base, all_base = mean(column, "none", clients)
                whole = len(values) == done and len(of_base) == all_base
                times = base / average if whole and base and average else None
                expected[f"{column}_speedup"] = times
                shown[title] += "" if times is None else f" ({times:.1f}x)"
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
        cell[:2]: [own["rounds_to_target"] for c, own in runs.items() if c[:2] == cell[:2]]
        for cell in runs
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
    assert "failed: topk, num_clients=2, seed=2: round 0: held-out loss is nan; lower lr" in text


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


def test_special_characters_are_escaped() -> None:
    assert escape_latex("a_b & 5% $#{}") == r"a\_b \& 5\% \$\#\{\}"
    assert escape_latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    frame = pd.DataFrame({"a|b": ["<x> | *y*"]})
    table = Rendered("n", "t", frame, pd.DataFrame(True, frame.index, frame.columns), frame)
    assert r"| **\<x> \| \*y\*** |" in table.to_markdown()
    assert "<strong>&lt;x&gt; | *y*</strong>" in table.to_html()


@pytest.mark.parametrize(
    ("texts", "side"),
    [
        (["1.0 ± 0.0", "failed", ""], "---:"),
        (["2 of 3: 1 failed", "3"], "---:"),
        (["— (not reached in 2 rounds)", "-1.5e-05 (10.0x)"], "---:"),
        (["failed", "missing"], "---"),
        (["59277e12ab01"], "---"),  # a run_id
        (["topk density=0.1"], "---"),
    ],
)
def test_columns_of_numbers_are_flush_right(texts: list[str], side: str) -> None:
    frame = pd.DataFrame({"a": texts})
    table = Rendered("n", "t", frame, frame == "?", frame)
    assert f"| {side} |" in table.to_markdown()
    assert ('<td class="number">' in table.to_html()) == (side == "---:")
    column = table.to_latex().split("tabular}{")[1][0]
    assert column == ("r" if side == "---:" else "l")


def small_sweep(folder: Path, run_config: Callable[..., RunConfig]) -> None:
    """Two methods whose losses and bytes are easy to add up by hand."""
    curves = {"none": ([4.0, 3.0, 2.0], 100), "topk": ([4.0, 3.5, 2.9], 10)}
    for method, (losses, up) in curves.items():
        for seed in (1, 2):
            config = run_config(f"compression={method}", f"seed={seed}", "rounds=2")
            shift = 0.1 * (seed - 1)
            record = RunRecord(config, "done")
            record.summary = {"loss": losses[-1] + shift, "uplink_bytes": 2 * up}
            record.rounds = [
                {
                    "round": n,
                    "loss": loss + shift,
                    "uplink_bytes": up if n else 0,
                    "downlink_bytes": 100 if n else 0,
                    "cumulative_uplink_bytes": n * up,
                    "cumulative_bytes": n * (up + 100),
                }
                for n, loss in enumerate(losses)
            ]
            record.write(folder)


def build(folder: Path, name: str, options: Options) -> Rendered:
    records = load_records(folder, messages=False)
    builder = TableBuilder(measure(records, options), options)
    spec = load_spec(SHIPPED / f"{name}.yaml")
    assert builder.why_not(spec) is None
    return builder.build(name, spec)


def test_targets_speedups_and_dashes(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "bytes_to_target", Options(target_loss=3.6))
    rows = table.frame.set_index("compression")
    # none: round 1 with both seeds, 100 B up; topk: round 1 (3.5) and 1 (3.6)
    assert rows.loc["none", "rounds to target"] == "1.0 ± 0.0"
    assert rows.loc["topk", "up (MB)"] == "0.00 (10.0x)"
    assert table.best["up (MB)"].tolist() == [False, False]  # both print 0.00
    table = build(tmp_path, "bytes_to_target", Options(target_loss=2.95))
    rows = table.frame.set_index("compression")
    assert rows.loc["topk", "rounds to target"] == "2.0 [1 of 2]"
    assert table.best["rounds to target"].tolist() == [False, False]
    table = build(tmp_path, "bytes_to_target", Options(target_loss=2.5))
    rows = table.frame.set_index("compression")
    assert rows.loc["topk", "rounds to target"] == "— (not reached in 2 rounds)"
    assert rows.loc["topk", "total (MB)"] == "—"


def test_best_and_paired_differences(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "compression", Options())
    assert table.frame["loss (nats/token)"].tolist() == ["2.050 ± 0.071", "2.950 ± 0.071"]
    assert table.best["loss (nats/token)"].tolist() == [True, False]
    differences = table.frame["loss - baseline's (nats/token)"].tolist()
    assert differences == ["+0.000 ± 0.000", "+0.900 ± 0.000"]
    table = build(tmp_path, "compression", Options(baseline={"compression": "int8"}))
    assert "loss - baseline's (nats/token)" not in table.frame


def test_budgets(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    table = build(tmp_path, "loss_at_budget", Options(budget_bytes=199))
    assert table.frame.iloc[:, 2].tolist() == ["3.050 ± 0.071", "2.950 ± 0.071"]  # up: 1, 2 rounds
    assert table.frame.iloc[:, 3].tolist() == ["4.050 ± 0.071", "3.550 ± 0.071"]  # both: 0, 1


def epochs_sweep(folder: Path, run_config: Callable[..., RunConfig]) -> None:
    """One and four local epochs on two ways to deal the text; four send twice the bytes."""
    curves = {
        (1, "iid"): [4.0, 3.0, 2.8],
        (4, "iid"): [4.0, 3.9, 3.8],
        (1, "natural"): [4.0, 3.5, 3.0],
        (4, "natural"): [4.0, 2.9, 2.5],
    }
    for (epochs, partition), losses in curves.items():
        config = run_config(f"local_epochs={epochs}", f"data.partition={partition}", "rounds=2")
        up = 2_000_000 if epochs == 4 else 1_000_000
        record = RunRecord(config, "done", summary={"loss": losses[-1]})
        record.rounds = [
            {
                "round": n,
                "loss": loss,
                "uplink_bytes": up * min(n, 1),
                "downlink_bytes": up * min(n, 1),
                "cumulative_uplink_bytes": up * n,
                "cumulative_bytes": 2 * up * n,
            }
            for n, loss in enumerate(losses)
        ]
        record.write(folder)


def test_rounds_to_target_against_what_clients_do(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    epochs_sweep(tmp_path, run_config)
    options = Options(target_loss=3.0, baseline={"local_epochs": 1})
    rows = build(tmp_path, "rounds_to_target", options).frame.set_index("local_epochs")
    iid, natural = (f"rounds to target, data.partition={name}" for name in ("iid", "natural"))
    assert rows[iid].to_dict() == {"1": "1.0 (1.0x)", "4": "— (not reached in 2 rounds)"}
    assert rows[natural].to_dict() == {"1": "2.0 (1.0x)", "4": "1.0 (2.0x)"}
    assert rows["total (MB), data.partition=natural"].to_dict() == {"1": "4.00", "4": "4.00"}


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
    assert main(arguments) == 2
    assert "no such measure" in capsys.readouterr().err
    spec.write_text("title: Mine\nrows: [compresion]\nmeasures:\n  - {value: loss, header: x}\n")
    assert main(arguments) == 2
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


def test_settings_side_by_side(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    spec = load_spec(SHIPPED / "compression.yaml")
    two = spec.model_copy(update={"rows": ["compression"], "columns": ["num_clients"]})
    config = run_config("num_clients=5", "rounds=2")
    RunRecord(config, "failed", error="boom").write(tmp_path)
    records, options = load_records(tmp_path), Options()
    table = TableBuilder(measure(records, options), options).build("t", two)
    assert table.frame["compression"].tolist() == ["none", "topk"]
    assert table.frame["loss (nats/token), num_clients=5"].tolist() == ["failed", ""]
    assert table.frame["loss (nats/token), num_clients=32"][0] == "2.050 ± 0.071"


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
    assert main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report").exists()


def test_an_ambiguous_baseline_is_refused(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    for density in (0.1, 0.2):
        config = run_config("compression=topk", f"compression.density={density}")
        RunRecord(config, "done", summary={"loss": 1.0}).write(tmp_path)
    with pytest.raises(ConfigError, match=r"names 2 runs of one seed; add .*compression.density"):
        measure(load_records(tmp_path), Options(baseline={"compression": "topk"}))
    assert Options.parse_baseline("topk") == {"compression": "topk"}
    parsed = Options.parse_baseline("compression=topk,compression.density=0.1")
    assert parsed == {"compression": "topk", "compression.density": 0.1}
    runs = measure(load_records(tmp_path), Options(baseline=parsed))
    assert runs["loss_difference"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("lost", ["none", "none, seed 2"])
def test_time_without_a_baseline(
    tmp_path: Path, run_config: Callable[..., RunConfig], lost: str
) -> None:
    small_sweep(tmp_path, run_config)
    records = load_records(tmp_path)
    none = records.results["compression"] == "none"
    gone = none & (records.results["seed"].eq(2) | (lost == "none"))
    assert gone.any()
    results = records.results[~gone].reset_index(drop=True)
    options = Options(networks=tuple(NetworkConfig.choices("home")))
    records = replace(records, results=results)
    timed = measure_time(measure(records, options), records, options)
    without = timed["seed"].eq(2) | (lost == "none")
    assert timed.loc[without, "break_even_mbit_s"].isna().all()


def test_a_table_of_ones_own_needs_a_name_of_its_own(
    tmp_path: Path, run_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    small_sweep(tmp_path, run_config)
    own = tmp_path / "compression.yaml"
    own.write_text((SHIPPED / "compression.yaml").read_text())
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--spec", str(own)]) == 2
    assert "has the name of a shipped table" in " ".join(capsys.readouterr().err.split())


def test_the_pareto_front() -> None:
    final = pd.DataFrame({"sent": [1.0, 2.0, 2.0, 3.0, 4.0], "loss": [5.0, 5.0, 3.0, 4.0, 1.0]})
    assert figure.pareto(final, "sent").tolist() == [True, False, True, False, True]


def test_what_failed_to_learn_does_not_flatten_the_front(tmp_path: Path) -> None:
    losses = {"best": 2.5, "cheap": 2.6, "near": 2.62, "lost": 5.0}
    rows = [(cell, 1, loss, 0.0, 9 - loss, 9 - loss) for cell, loss in losses.items()]
    rows[2] = ("near", 1, 2.62, 0.0, 50.0, 50.0)
    rows[3] = ("lost", 1, 5.0, 0.0, 60.0, 60.0)
    columns = ["cell", "round", "loss", "sd", "sent_up", "sent"]
    curves = pd.DataFrame(rows, columns=columns).assign(task="")
    figure.pareto_front(curves, tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    assert ">1 dominated beyond the axis</text>" in drawn
    assert ">5.0</text>" not in drawn
    both = curves.assign(cell=["a, lr=1, x=2", "b, lr=2, x=2", "c, lr=1, x=2", "d, lr=1, x=2"])
    figure.pareto_front(both, tmp_path / "common.svg")
    drawn = (tmp_path / "common.svg").read_text()
    assert all(f">{words}</text>" in drawn for words in ("a, lr=1", "b, lr=2", "x=2"))
    figure.pareto_front(curves[:3], tmp_path / "all.svg")
    assert ">1 dominated" not in (tmp_path / "all.svg").read_text()


def test_a_front_for_each_model_and_text(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {("tiny", "none"): 2.0, ("tiny", "topk"): 3.0, ("pythia-14m", "none"): 2.5}
    for (model, method), loss in losses.items():
        config = run_config(f"model={model}", f"compression={method}", "rounds=1")
        up = {"none": 4_000_000, "topk": 1_000_000}[method] * (10 if model != "tiny" else 1)
        sent = {"uplink_bytes": up, "downlink_bytes": up}
        sums = {"cumulative_uplink_bytes": up, "cumulative_bytes": 2 * up}
        record = RunRecord(config, "done", summary={"loss": loss})
        record.rounds = [{"round": 1, "loss": loss, **sent, **sums}]
        record.write(tmp_path)
    records = load_records(tmp_path, messages=False)
    curves = cell_curves(records.results, records.rounds)
    front, drawn = figure._front, {}

    def draw(panels: Any, final: pd.DataFrame, styles: Any) -> None:
        beaten = ~figure.pareto(final, "sent_up")
        drawn[final["task"].iloc[0]] = dict(zip(final["loss"], beaten, strict=True))
        front(panels, final, styles)

    monkeypatch.setattr(figure, "_front", draw)
    figure.pareto_front(curves, tmp_path / "front.svg")
    [tiny, pythia] = sorted(drawn, key=lambda task: "tiny" not in task)
    assert (drawn[tiny], drawn[pythia]) == ({2.0: False, 3.0: False}, {2.5: False})
    words = (tmp_path / "front.svg").read_text()
    assert words.count(">held-out loss (nats per token)</text>") == 2
    assert "pythia-14m" in words
    figure.loss_against_bytes(curves, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text().count(">held-out loss (nats per token)</text>") == 2


def test_curves_are_means_over_seeds(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    records = load_records(tmp_path, messages=False)
    curves = cell_curves(records.results, records.rounds)
    assert curves["cell"].tolist() == ["none"] * 3 + ["topk"] * 3
    assert curves["round"].tolist() == [0, 1, 2] * 2
    assert curves["loss"].tolist() == pytest.approx([4.05, 3.05, 2.05, 4.05, 3.55, 2.95])
    assert curves["sd"].tolist() == pytest.approx([0.1 / 2**0.5] * 6)
    assert curves["sent_up"].tolist() == pytest.approx([0, 1e-4, 2e-4, 0, 1e-5, 2e-5])
    assert curves["sent"].tolist() == pytest.approx([0, 2e-4, 4e-4, 0, 1.1e-4, 2.2e-4])
    assert curves["up"].tolist() == pytest.approx([0, 1e-4, 1e-4, 0, 1e-5, 1e-5])
    assert curves["down"].tolist() == pytest.approx([0, 1e-4, 1e-4] * 2)


def test_local_epochs_are_compared_at_equal_bytes(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs_sweep(tmp_path, run_config)
    records = load_records(tmp_path, messages=False)
    lines, drawn = figure.draw_lines, []

    def draw(axes: Axes, points: pd.DataFrame, *rest: Any) -> None:
        drawn.append(points)
        lines(axes, points, *rest)

    monkeypatch.setattr(figure, "draw_lines", draw)
    curves = cell_curves(records.results, records.rounds)
    figure.local_epochs(records.results, curves, tmp_path / "epochs.svg")
    assert len(drawn) == 2  # a panel for each way to deal the text
    points = pd.concat(drawn)
    found = {
        (cell, epochs): loss for cell, epochs, loss in points[["cell", "epochs", "loss"]].to_numpy()
    }
    # 2 MB up are two rounds of one epoch, and one round of four
    assert found == {
        ("none, data.partition=iid", 1): 2.8,
        ("none, data.partition=iid", 4): 3.9,
        ("none, data.partition=natural", 1): 3.0,
        ("none, data.partition=natural", 4): 2.9,
    }
    text = (tmp_path / "epochs.svg").read_text()
    for words in ("local epochs, at 2.00 MB of uplink", "data.partition=natural"):
        assert words in text


def test_bytes_by_part(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    results = load_records(tmp_path, messages=False).results
    parts = pd.DataFrame(
        [
            (run_id, f"layer.{n}.weight", part, 1000 * (n + 1))
            for run_id in results["run_id"]
            for n in range(30)
            for part in ("values", "indices")
        ],
        columns=["run_id", "tensor", "part", "bytes"],
    )
    figure.bytes_by_part(results, parts, tmp_path / "parts.svg")
    drawn = (tmp_path / "parts.svg").read_text()
    assert ">10 other tensors</text>" in drawn
    assert ">layer.29.weight</text>" in drawn


def test_it_starts_without_what_trains() -> None:
    code = (
        "import sys, fedbw_sweep.report.__main__\n"
        "print({'torch', 'ray', 'flwr', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
