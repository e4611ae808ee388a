"""``report.html``: one file to explore a sweep with, offline."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedbw_sweep.errors import ResultsError
from fedbw_sweep.report.command import (
    as_text,
    changes,
    command,
    config_from_columns,
    overrides,
    plain,
    read_setting,
)
from fedbw_sweep.report.figure import COLOURS
from fedbw_sweep.report.render import Rendered
from fedbw_sweep.report.table import run_labels, varying_settings
from fedbw_sweep.results import RESULTS_COLUMNS, Records

LIMIT = 1_500_000
"""Bytes a page may have."""

CONFIGURATIONS, POINTS, TABLE_BYTES = 10_000, 12_000, 60_000
"""At most so many rows of the main table, points of all curves together, bytes of one table."""

REASONS, ERROR_LENGTH, NOTES = 50, 1_000, 30
"""At most so many different reasons why runs failed, characters of one, remarks on the files."""

METRICS = (
    "loss",
    "bits_per_byte",
    "uplink_bytes",
    "downlink_bytes",
    "total_bytes",
    "uplink_ratio",
    "bits_per_coordinate",
)
"""Columns of results.csv that the main table shows."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")


def vega() -> str:
    """Return the JavaScript that draws the charts; putting it together takes seconds."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub lacks the default
    return script


def write_page(
    records: Records,
    tables: Sequence[Rendered],
    path: Path,
    notes: Sequence[str] = (),
    script: str | None = None,
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
    notes : sequence of str
        Shown after what `records` notes.
    script : str
        What `vega` returns, if it is at hand.
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
        "vega": script or vega(),
        "charts": {"curves": _curves_chart(), "front": _front_chart()},
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

    sections = [(table, table.to_html()) for table in tables]
    share = 1.0  # of what is on the page when there is room for all
    while True:
        kept = int(CONFIGURATIONS * share)
        curves, left_out = _curves(records.rounds, results, of_run, kept, int(POINTS * share))
        if len(configurations) > kept:
            left_out.append(
                f"The table has {kept:,} of {len(configurations):,} configurations, those of the "
                "lowest loss. All runs are in runs.csv."
            )
        fitting = [
            (table.title, text)
            for table, text in sections
            if len(text.encode()) <= TABLE_BYTES * share
        ]
        left_out += [
            f"The table “{table.title}” is too large for this page. It is in "
            f"tables/{table.name}.html."
            for table, text in sections
            if (table.title, text) not in fitting
        ]
        data = {
            "settings": settings,
            "configurations": _columns(configurations.head(kept)),
            "runs": _columns(runs[runs["configuration"] < kept]),
            "styles": STYLES,
            "changes": changed,
            "command": command(["OVERRIDES"], "SEED"),
            "environments": environments,
            "curves": _columns(curves),
        }
        html = template.render(
            **fixed, data=_packed(data), tables=fitting, notes=[*remarks, *notes, *left_out]
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

    Returns
    -------
    configurations : pandas.DataFrame
        A row per configuration, numbered from 0: `settings`, ``label``, ``task`` (runs of
        different models or texts have no common scale of loss), counts of runs by status, and mean
        and standard deviation (ddof 1) over done runs of each of `METRICS`.
    of_run : pandas.Series
        The configuration's number for each row of `results`.
    """
    label = run_labels(results, settings)
    done = results["status"] == "done"
    groups = results[list(METRICS)].astype(float).where(done).groupby(label, sort=False)
    table = groups.mean().join(groups.std(ddof=1).add_suffix("_sd"))
    table["done"] = done.groupby(label).sum()
    table["failed"] = (results["status"] == "failed").groupby(label).sum()
    table["runs"] = label.groupby(label).size()
    tasks = [name for name in settings if name.partition(".")[0] in ("model", "data")]
    own = results[settings].astype(object).where(results[settings].notna(), None)
    own["task"] = run_labels(results, tasks)
    first = own.groupby(label, sort=False).head(1)
    table = first.set_axis(label[first.index]).join(table).rename_axis("label").reset_index()
    table = table.sort_values("loss", kind="stable", na_position="last", ignore_index=True)
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
    first = results.iloc[np.unique(of_run, return_index=True)[1]].astype(object)
    for row in first.where(first.notna(), None).to_dict("records"):
        config: Mapping[str, Any] | None = config_from_columns(row)
        if config is None:
            try:
                config = records.configs[row["run_id"]]
            except (KeyError, OSError, ResultsError):
                of_each.append(None)
                continue
        found = changes(config)
        texts = [
            (key, as_text(old), as_text(new), override)
            for (key, (old, new)), override in zip(found.items(), overrides(found), strict=True)
        ]
        of_each.append([places.setdefault(text, len(places)) for text in texts])
    return [list(text) for text in places], of_each


def _runs(
    results: pd.DataFrame, of_run: pd.Series[int], environments: Mapping[str, int]
) -> pd.DataFrame:
    runs = results[["run_id", "seed", "status", "uplink_bytes", "downlink_bytes"]].copy()
    runs["loss"] = results["loss"]
    runs["configuration"] = of_run
    runs["environment"] = results["run_id"].map(environments).astype("Int64")
    folders = map(Path, results["source"].astype(str))
    runs["source"] = [
        str(folder.parent if folder.name == run else folder)
        for folder, run in zip(folders, results["run_id"], strict=True)
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
    own = own.assign(configuration=numbers.astype("Int64"))
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
            values = values.astype("Float64").round(digits)
            values = values if digits else values.astype("Int64")
        columns[str(name)] = values.astype(object).where(values.notna(), None).tolist()
    return columns


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
    reasons = bad["error"].fillna("no reason was recorded").str.strip()
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


STYLES = [
    (COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)])
    for i in range(len(COLOURS) * len(SHAPES))
]
"""Colour and shape of each series. The page draws the legend, one for all charts."""


def _series_encodings() -> dict[str, Any]:
    """Colour and shape by ``series``; their domain comes from the page."""
    names = alt.ExprRef("series_names")
    colours, shapes = map(list, zip(*STYLES, strict=True))
    return {
        "color": alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=None),
        "shape": alt.Shape("series:N", scale=alt.Scale(domain=names, range=shapes), legend=None),
    }


ROUND_NUMBERS = "test(/^[125]/, format(datum.value, 'e')) ? format(datum.value, ',~g') : ''"
"""Labels of a logarithmic axis: 1, 2, 5, 10, 20, ... Its other ticks stay without."""


def _axes(title: str) -> dict[str, Any]:
    return {
        "x": alt.X(
            "mb:Q",
            scale=alt.Scale(type="log", nice=False, padding=12),
            axis=alt.Axis(
                title=title,
                labelExpr=ROUND_NUMBERS,
                labelOverlap=True,
                labelSeparation=6,
            ),
        ),
        "y": alt.Y(
            "loss:Q",
            scale=alt.Scale(zero=False, padding=12),
            axis=alt.Axis(title="held-out loss (nats per token)", tickCount=6),
        ),
    }


def _zoom() -> alt.Parameter:
    # A wheel without a key scrolls the page, as it does everywhere else on it.
    return alt.selection_interval(
        name="zoom", bind="scales", zoom="wheel![event.shiftKey || event.ctrlKey]"
    )


def _visible(otherwise: float, fully: float = 1) -> Any:
    """Opacity of a series: `otherwise` unless it, or nothing, was picked from the legend."""
    picked = "!length(picked) || indexof(picked, datum.series) >= 0"
    return alt.condition(picked, alt.value(fully), alt.value(otherwise))


def _finished(chart: Any) -> dict[str, Any]:
    names = [alt.param(name=name, value=[]) for name in ("series_names", "picked")]
    chart = (
        chart.add_params(*names)
        .properties(width="container", height=340)
        .configure(
            font="system-ui, sans-serif",
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
            view=alt.ViewConfig(stroke=None),
            axis=alt.AxisConfig(
                gridColor="#e8e8e8", labelColor="#444", titleColor="#222", labelFontSize=12
            ),
        )
    )
    spec: dict[str, Any] = chart.to_dict()
    return spec


TOOLTIP = [
    alt.Tooltip("label:N", title="configuration"),
    alt.Tooltip("spread:N", title="loss (nats per token)"),
    alt.Tooltip("uplink:N", title="uplink"),
    alt.Tooltip("total:N", title="both directions"),
]


def _curves_chart() -> dict[str, Any]:
    base = alt.Chart(alt.NamedData("points")).encode(
        **_axes("MB sent so far (10⁶ bytes, log scale)"), detail="number:N"
    )
    colour, shape = _series_encodings().values()
    band = base.mark_area(interpolate="linear").encode(
        y="low:Q",
        y2="high:Q",
        color=colour,
        opacity=_visible(0, 0.15),
    )
    line = base.mark_line(strokeWidth=1.6).encode(color=colour, opacity=_visible(0.06))
    points = (
        base.mark_point(filled=True, size=38)
        .encode(
            color=colour,
            shape=shape,
            opacity=_visible(0.06),
            tooltip=[TOOLTIP[0], alt.Tooltip("round:Q"), *TOOLTIP[1:]],
        )
        .add_params(_zoom())
    )
    return _finished(alt.layer(band, line, points))


def _front_chart() -> dict[str, Any]:
    base = alt.Chart(alt.NamedData("points")).encode(
        **_axes("MB sent in all (10⁶ bytes, log scale)")
    )
    colour, shape = _series_encodings().values()
    front = (
        base.transform_filter("!datum.dominated")
        .mark_line(interpolate="step-after", color="#999", strokeWidth=1.2, strokeDash=[4, 3])
        .encode(detail="task:N")
    )
    points = (
        base.mark_point(filled=True, size=90, strokeWidth=1)
        .encode(
            color=alt.condition("datum.dominated", alt.value("#c4c4c4"), colour),
            shape=shape,
            opacity=_visible(0.08),
            order=alt.Order("dominated:N", sort="descending"),
            tooltip=[*TOOLTIP, alt.Tooltip("verdict:N", title="Pareto front")],
        )
        .add_params(_zoom())
    )
    return _finished(alt.layer(front, points))
