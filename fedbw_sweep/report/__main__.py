"""``python -m fedbw_sweep.report PATH...``: tables, figures and a page from recorded runs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.progress import Progress

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.console import MB, errors_end_the_command, message_console, printable
from fedbw_sweep.errors import ConfigError, ResultsError
from fedbw_sweep.extras import why_not
from fedbw_sweep.records.labels import varying_settings
from fedbw_sweep.records.read import Records, load_records
from fedbw_sweep.report.build import TableBuilder
from fedbw_sweep.report.measure import (
    TIME_MEASURES,
    Options,
    mean_curves,
    measure,
    measure_time,
)
from fedbw_sweep.report.render import Rendered, document, file_stem
from fedbw_sweep.report.spec import BUILT_IN, load_spec
from fedbw_sweep.report.table import TASKS
from fedbw_sweep.report.workers import charts, draw, pool, write_csv, write_table

FORMATS = "png", "svg", "pdf"
FIGURES = "loss_against_bytes", "pareto_front", "bytes_by_round", "bytes_by_part", "local_epochs"
TERMINAL_ROWS = 40
_ABOUT = "Write a paper's tables and figures, and a page to explore, from recorded runs."

_console = message_console()


def write_report(
    records: Records,
    options: Options,
    out: Path,
    specs: Sequence[Path] = (),
    step: Callable[[str], None] = lambda what: None,
) -> tuple[list[Rendered], list[str]]:
    """Write every table and figure that the runs allow, and the page if its extra is installed.

    Parameters
    ----------
    records : Records
    options : Options
    out : pathlib.Path
        The folder to write into; files of an earlier report are replaced.
    specs : sequence of pathlib.Path
        Descriptions of further tables.
    step : callable
        Called with the name of each thing before it is made.

    Returns
    -------
    tables : list of Rendered
    notes : list of str
        What was left out, and why.
    """
    step("measures")
    by_run = records.rounds.astype({"run_id": "category"})  # a million rows are joined by it
    records = replace(records, rounds=by_run)
    runs = measure(records, options)
    builder, notes, chosen = TableBuilder(runs, options), [], []
    built_in = {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}
    own: dict[str, Path] = {}
    for path in specs:
        name = file_stem(path.stem)
        if name in {*built_in, "failures"}:
            raise ConfigError("--spec", path, "has the name of a built-in table; rename it")
        if other := own.get(name):
            also = f"makes the table {name}, as {other} does; rename one of them"
            raise ConfigError("--spec", path, also)
        own[name] = path
    for name, path in (built_in | own).items():
        spec = load_spec(path)
        if name in own:
            builder.check(spec)
        if why := builder.why_not(spec):
            notes.append(f"table {name} is left out: it {why}")
        else:
            chosen.append((name, spec))
    if not builder.has_baseline:
        baseline = ", ".join(f"{key}={value}" for key, value in options.baseline.items())
        notes.append(
            f"no finished run has {baseline}: no differences and speed-ups; see --baseline"
        )

    for folder in ("tables", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    data = _figures(records, notes)
    written: dict[str, Future[None]] = {}
    for name in FIGURES:
        paths = [out / "figures" / f"{name}.{suffix}" for suffix in FORMATS]
        if name in data:
            written[name] = pool().submit(draw, name, *data[name], *paths)
        else:
            for path in paths:
                path.unlink(missing_ok=True)

    timed = builder
    if options.networks:
        if alone := set(runs.loc[runs["status"] == "done", "run_id"]) - set(records.environments):
            notes.append(f"{len(alone)} runs have no folder, so that their time is unknown")
        timed = TableBuilder(measure_time(runs, records, options), options)
    tables = []
    for name, spec in chosen:
        step(name)
        needs_time = {value.value for value in spec.measures} & set(TIME_MEASURES)
        tables.append((timed if needs_time else builder).build(name, spec))
        written[name] = pool().submit(write_table, tables[-1], out / "tables")
    if failures := builder.failures():
        tables.append(failures)
        written["failures"] = pool().submit(write_table, failures, out / "tables")
    written["runs.csv"] = pool().submit(write_csv, runs, out / "runs.csv")
    for name in {*built_in, "failures"} - {table.name for table in tables}:
        for suffix in ("csv", "md", "tex", "html"):
            (out / "tables" / f"{name}.{suffix}").unlink(missing_ok=True)
    (out / "report.tex").write_text(document(tables, list(data)), encoding="utf-8")
    step("report.html")
    page = out / "report.html"
    if why := why_not("report"):
        page.unlink(missing_ok=True)
        notes.append(f"report.html is left out: it {why}")
    else:
        from fedbw_sweep.report.page import write_page

        write_page(records, tables, page, *_charts().result(), notes)
    for name, writing in written.items():
        step(name)
        writing.result()
    return tables, notes


@cache
def _charts() -> Future[tuple[dict[str, Any], str]]:
    """Start making what the page's charts need, which is the same for all runs."""
    return pool().submit(charts)


def _figures(records: Records, notes: list[str]) -> dict[str, tuple[pd.DataFrame, ...]]:
    """Choose the figures that the runs allow, and what each is drawn from."""
    done = records.results[records.results["status"] == "done"]
    curves = mean_curves(done, records.rounds)
    if not (curves["round"] > 0).any():
        notes.append("figures are left out: no finished run has a round")
        return {}
    if (tasks := curves["task"].nunique()) > TASKS:
        notes.append(
            f"the figures of losses have a row for each of the first {TASKS} of {tasks} models and "
            "texts, whose losses have no common scale: make a report of the others"
        )
    names = "loss_against_bytes", "pareto_front", "bytes_by_round"
    figures: dict[str, tuple[pd.DataFrame, ...]] = dict.fromkeys(names, (curves,))
    compared = mean_curves(done, records.rounds, common_seeds=True)
    figures["pareto_front"] = (compared,)
    if records.parts["run_id"].isin(done["run_id"]).any():
        figures["bytes_by_part"] = done, records.parts
    if "local_epochs" in varying_settings(done):
        figures["local_epochs"] = done, compared
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit with 2 if nothing could be written."""
    parser = argparse.ArgumentParser("python -m fedbw_sweep.report", description=_ABOUT)
    for flag, meaning, own in (
        ("paths", "run folder, sweep folder, a folder above them, or a results.csv",
         {"nargs": "+", "type": Path, "metavar": "PATH"}),
        ("--out", "folder to write (default: report)", {"type": Path, "default": Path("report")}),
        ("--target-loss", "held-out loss to reach, nats per token", {"type": float}),
        ("--baseline", "compare with this compression choice, or with key=value,key=value "
         "(default: none)", {"default": "none"}),
        ("--budget-mb", "payload that may be sent, MB = 10^6 bytes", {"type": float}),
        ("--network", "estimate communication time for this choice of conf/network, or for all",
         {}),
        ("--spec", "a further table, described in YAML like those in fedbw_sweep/report/tables; "
         "may be given again", {"type": Path, "action": "append", "default": []}),
    ):  # fmt: skip
        parser.add_argument(flag, help=meaning, **own)
    given = parser.parse_args(arguments)
    with errors_end_the_command():
        _report(given)
    return 0


def _report(given: argparse.Namespace) -> None:
    for flag, value in (("--target-loss", given.target_loss), ("--budget-mb", given.budget_mb)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(flag, value, "a number above 0")
    options = Options(
        Options.parse_baseline(given.baseline),
        given.target_loss,
        None if given.budget_mb is None else given.budget_mb * MB,
        tuple(NetworkConfig.choices(given.network)) if given.network else (),
    )
    with Progress(console=_console, transient=True, disable=not _console.is_terminal) as progress:
        bar = progress.add_task("reading runs", total=None)
        if not why_not("report"):
            _charts()
        records = load_records(given.paths, messages=bool(options.networks))
        progress.update(bar, total=18)

        def step(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        try:
            tables, notes = write_report(records, options, given.out, given.spec, step=step)
        except OSError as error:
            raise ResultsError(f"{given.out} cannot be written: {error}; see --out") from None
    for note in [*records.notes, *notes]:
        _console.print(f"note: {escape(printable(note))}")
    states = records.results["status"].value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    _console.print(f"runs: {counts}; written to {escape(str(given.out))}/")
    for table in tables:
        print(printable(table.to_markdown(TERMINAL_ROWS)))


if __name__ == "__main__":
    sys.exit(main())
