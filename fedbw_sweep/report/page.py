"""``report.html``: one file to explore a sweep with, offline."""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedbw_sweep.config.identity import run_id_of
from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.labels import (
    holds_settings,
    run_labels,
    setting_texts,
    task_settings,
    varying_settings,
)
from fedbw_sweep.records.read import Records
from fedbw_sweep.records.schema import ON_PAGE, RESULTS_COLUMNS, STOPPED
from fedbw_sweep.report.command import (
    as_text,
    changes,
    command,
    overrides,
    plain,
    read_setting,
    sections_from_columns,
)
from fedbw_sweep.report.render import Rendered

LIMIT = 1_500_000
"""Bytes a page may have."""

CONFIGURATIONS, POINTS, TABLE_BYTES = 10_000, 12_000, 60_000
"""At most so many rows of the main table, points of all curves together, bytes of one table."""

REASONS, ERROR_LENGTH, NOTES = 50, 1_000, 30
"""At most so many different reasons why runs failed, characters of one, remarks on the files."""


def write_page(
    records: Records,
    tables: Sequence[Rendered],
    path: Path,
    charts: Mapping[str, Any],
    script: str,
    notes: Sequence[str] = (),
) -> None:
    """Write a page that holds its data, its charts and all it needs to show them.

    What would make the file larger than `LIMIT` is left out, and the page says so.

    Parameters
    ----------
    records : Records
        The runs.
    tables : sequence of Rendered
        Shown as they are.
    path : pathlib.Path
        Where to write, ``report.html``.
    charts : mapping
        What `charts.specifications` returns.
    script : str
        What `charts.script` returns.
    notes : sequence of str
        Shown after what `records` notes.
    """
    environment = Environment(
        loader=PackageLoader("fedbw_sweep.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    results = records.results.reset_index(drop=True)
    settings = [name for name in varying_settings(results) if name != "seed"]
    configurations, of_run = _configurations(results, settings)
    fixed = {
        "vega": script,
        "charts": charts["specs"],
        "overview": _overview(results),
        "problems": _problems(results),
        "reasons": REASONS,
    }
    changed, of_each = _changes(records, results, of_run)
    configurations["changes"] = pd.Series(of_each, dtype=object)
    environments, numbers = _environments(records)
    runs = _runs(results, of_run, numbers)

    remarks = list(records.notes[:NOTES])
    if len(records.notes) > NOTES:
        remarks.append(f"and {len(records.notes) - NOTES:,} more remarks on the files")

    texts = {
        table.name: table.to_html()
        for table in tables
        if table.frame.size * len("<td></td>") <= TABLE_BYTES
    }
    share = 1.0  # of what is on the page when there is room for all
    while True:
        kept = int(CONFIGURATIONS * share)
        curves, left_out = _curves(records.rounds, results, of_run, kept, int(POINTS * share))
        if len(configurations) > kept:
            left_out.append(
                f"The table has {kept:,} of {len(configurations):,} configurations, those of the "
                "lowest loss. All runs are in runs.csv."
            )
        fitting = {
            name: text for name, text in texts.items() if len(text.encode()) <= TABLE_BYTES * share
        }
        left_out += [
            f"The table “{table.title}” is too large for this page. It is in "
            f"tables/{table.name}.html."
            for table in tables
            if table.name not in fitting
        ]
        data = {
            "settings": settings,
            "metrics": ON_PAGE,
            "configurations": _columns(configurations.head(kept)),
            "runs": _columns(runs[runs["configuration"] < kept]),
            "styles": charts["styles"],
            "changes": changed,
            "command": command(["OVERRIDES"], "SEED"),
            "environments": environments,
            "curves": _columns(curves),
        }
        html = template.render(
            **fixed,
            data=_packed(data),
            tables=[
                (table.title, fitting[table.name]) for table in tables if table.name in fitting
            ],
            notes=[*remarks, *notes, *left_out],
        )
        if len(html.encode()) <= LIMIT or kept <= 1:
            break
        share *= 0.7
    path.write_text(html, encoding="utf-8")


def _packed(data: Any) -> str:
    """Write JSON a third as long, in letters that need no escaping; browsers unpack it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _configurations(
    results: pd.DataFrame, settings: list[str]
) -> tuple[pd.DataFrame, pd.Series[int]]:
    """Take together the runs that differ in their seed alone, lowest loss first.

    Those that stopped at a loss or a budget come after all that did every round.

    Returns
    -------
    configurations : pandas.DataFrame
        A row per configuration, numbered from 0: `settings`, ``label``, ``task`` (see
        `table.TASK`), counts of runs by status, and mean
        and standard deviation (ddof 1) over done runs of each of `ON_PAGE`.
    of_run : pandas.Series
        The configuration's number for each row of `results`.
    """
    label = run_labels(results, settings)
    done = results["status"] == "done"
    groups = results[list(ON_PAGE)].astype(float).where(done).groupby(label, sort=False)
    table = groups.mean().join(groups.std(ddof=1).add_suffix("_sd"))
    table["done"] = done.groupby(label).sum()
    table["failed"] = (results["status"] == "failed").groupby(label).sum()
    table["runs"] = label.groupby(label).size()
    table["stopped"] = results["end"].isin(STOPPED).groupby(label).any()
    own = results[settings].astype(object).where(results[settings].notna(), None)
    if nested := [name for name in settings if holds_settings(results[name])]:
        own[nested] = setting_texts(results, settings)[nested]
    own["task"] = run_labels(results, task_settings(settings))
    first = own.groupby(label, sort=False).head(1)
    table = first.set_axis(label[first.index]).join(table).rename_axis("label").reset_index()
    by = ["stopped", "loss"]
    table = table.sort_values(by, kind="stable", na_position="last", ignore_index=True)
    return table, label.map(pd.Series(table.index, index=table["label"])).astype(int)


def _changes(
    records: Records, results: pd.DataFrame, of_run: pd.Series[int]
) -> tuple[list[list[str]], list[list[int] | None]]:
    """Say how each configuration differs from the defaults, in runs' own words and as overrides.

    Returns
    -------
    changed : list of [key, default, value, override]
        Each difference there is.
    of_each : list
        The differences of each configuration, as places in `changed`; None if unknown.
    """
    places: dict[tuple[str, ...], int] = {}
    of_each: list[list[int] | None] = []
    first = results.iloc[np.unique(of_run, return_index=True)[1]]
    sections = sections_from_columns(first)

    def places_of(config: Mapping[str, Any]) -> list[int]:
        found = changes(config)
        texts = [
            (key, as_text(old), as_text(new), override)
            for (key, (old, new)), override in zip(found.items(), overrides(found), strict=True)
        ]
        return [places.setdefault(text, len(places)) for text in texts]

    @cache
    def places_of_section(key: str, number: int) -> list[int]:
        return places_of({key: sections[key][1][number]})

    made_at = first["numerics"].fillna(0).astype(int)
    for at, (run, numerics) in enumerate(zip(first["run_id"], made_at, strict=True)):
        numbers = {key: of_row[at] for key, (of_row, _) in sections.items()}
        try:
            if run_id_of({k: sections[k][1][n] for k, n in numbers.items()}, numerics) == run:
                own = [p for each in numbers.items() for p in places_of_section(*each)]
            else:
                own = places_of(records.configs[run])
        except (LookupError, TypeError, ValueError, AttributeError, OSError, ResultsError):
            of_each.append(None)  # settings that are none
        else:
            of_each.append(own)
    return [list(text) for text in places], of_each


def _runs(
    results: pd.DataFrame, of_run: pd.Series[int], environments: Mapping[str, int]
) -> pd.DataFrame:
    runs = results[["run_id", "seed", "status", "uplink_bytes", "downlink_bytes"]].copy()
    runs["loss"] = results["loss"]
    runs["configuration"] = of_run
    runs["environment"] = results["run_id"].map(environments).astype("Int64")
    sources = results["source"]
    runs["source"] = [
        (above or ".") if name == run else source
        for source, run, (above, name) in zip(
            sources, results["run_id"], map(os.path.split, sources), strict=True
        )
    ]
    return runs.sort_values(["configuration", "seed"])


def _environments(records: Records) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Return each environment there is, once, and the place of each run's in that list."""
    places: dict[str, int] = {}
    numbers = {
        run: places.setdefault(json.dumps(environment, sort_keys=True), len(places))
        for run, environment in records.environments.items()
    }
    return [plain(json.loads(text)) for text in places], numbers


def _curves(
    rounds: pd.DataFrame, results: pd.DataFrame, of_run: pd.Series[int], kept: int, points: int
) -> tuple[pd.DataFrame, list[str]]:
    """Average each configuration's done runs round by round, thinned to about so many `points`."""
    done = pd.Series(of_run.to_numpy(), index=results["run_id"])[
        ((results["status"] == "done") & (of_run < kept)).to_numpy()
    ]
    numbers = rounds["run_id"].map(done)
    own = rounds[numbers.notna() & (rounds["cumulative_uplink_bytes"] > 0)]
    own = own.assign(configuration=numbers.astype("Int64")[own.index])
    curves, last = own["configuration"].nunique(), own["round"].max()
    left_out = []
    if len(own):
        most = max(1, points // 10)
        if curves > most:
            chosen = np.sort(own["configuration"].unique())
            chosen = chosen[np.linspace(0, curves - 1, most).astype(int)]
            own = own[own["configuration"].isin(chosen)]
            left_out.append(
                f"The loss curves of {most:,} of {curves:,} configurations are here, evenly from "
                "the lowest to the highest loss. The runs' rounds.csv have all."
            )
        per_curve = int(np.clip(points // min(curves, most), 10, 60))
        shown = np.unique(np.geomspace(1, last, per_curve).round().astype(int))
        if len(shown) < last:
            own = own[own["round"].isin(shown) | (own["round"] == last)]
            left_out.append(
                f"A loss curve has at most {len(shown)} of its {last} rounds, evenly on the "
                "logarithmic axis. The runs' rounds.csv have all."
            )
    groups = own.groupby(["configuration", "round"], as_index=False)
    averaged = groups.agg(
        loss=("loss", "mean"),
        sd=("loss", "std"),
        uplink_bytes=("cumulative_uplink_bytes", "mean"),
        total_bytes=("cumulative_bytes", "mean"),
    )
    return averaged, left_out


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Turn a table to lists for JSON: no NaN, no digits beyond what the page shows."""
    columns = {}
    for name, values in table.items():
        if pd.api.types.is_float_dtype(values):
            digits = 0 if str(name).endswith("_bytes") else 5
            values = values.where(np.isfinite(values.to_numpy(float, na_value=np.nan)))
            values = values.astype("Float64").round(digits)
            values = values if digits else values.astype("Int64")
        listed = values.astype(object).where(values.notna(), None).tolist()
        columns[str(name)] = [_for_json(value) for value in listed]
    return columns


def _for_json(value: Any) -> Any:
    """Write a setting without end as text: JSON has no such number."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _overview(results: pd.DataFrame) -> dict[str, Any]:
    shared = {
        setting: value
        for name in results.columns.difference([*RESULTS_COLUMNS, "source"], sort=False)
        if results[name].notna().all() and (results[name] == results[name].iloc[0]).all()
        for setting, value in plain(read_setting(results[name].iloc[0]), name).items()
    }
    return {
        "runs": len(results),
        "statuses": results["status"].value_counts().sort_index().to_dict(),
        "shared": shared,
    }


def _problems(results: pd.DataFrame) -> list[dict[str, Any]]:
    """List the runs that are not done, those of one reason together, most frequent first."""
    bad = results[results["status"] != "done"]
    labels = run_labels(results, varying_settings(results))
    reasons = bad["reason"].fillna("no reason was recorded").str.strip()
    problems = []
    for (status, why), runs in bad.groupby([bad["status"], reasons], sort=False):
        reason = str(why)
        problems.append(
            {
                "status": status,
                "summary": reason.splitlines()[-1][:300],
                "text": reason[-ERROR_LENGTH:],
                "runs": list(zip(labels[runs.index], runs["run_id"], strict=True)),
            }
        )
    return sorted(problems, key=lambda problem: -len(problem["runs"]))
