"""``report.html``: one file to explore a sweep with, offline."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
    plain,
    read_setting,
)
from fedbw_sweep.report.figure import COLOURS
from fedbw_sweep.report.table import varying_settings

LIMIT = 1_500_000
"""Bytes a page may have."""

CONFIGURATIONS, POINTS, TABLE_BYTES, REASONS = 10_000, 12_000, 60_000, 100
"""At most so many rows, points of all curves together, bytes of one paper table, error texts."""

ERROR_LENGTH = 2_000
"""Characters of one error's text."""

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


class Records(Protocol):
    """What a report is made from; see `fedbw_sweep.results`."""

    @property
    def results(self) -> pd.DataFrame:
        """A row per run: its configuration, then `RESULTS_COLUMNS` and ``source``."""

    @property
    def rounds(self) -> pd.DataFrame:
        """A row per run and round, `ROUNDS_COLUMNS`."""

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Science configs by ``run_id``, of the runs whose ``config.yaml`` is known."""

    @property
    def environments(self) -> Mapping[str, Mapping[str, Any]]:
        """Versions and execution settings by ``run_id``, where known."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report must know about the files it was made from."""


class PaperTable(Protocol):
    """A finished table."""

    @property
    def name(self) -> str:
        """File name without its suffix."""

    @property
    def title(self) -> str:
        """Caption, as plain text."""

    @property
    def html(self) -> str:
        """The ``<table>`` element, its text escaped."""


def write_page(records: Records, tables: Sequence[PaperTable], path: Path) -> None:
    """Write a page that holds its data, its charts and all it needs to show them.

    What would make the file larger than `LIMIT` is left out, and the page says so.

    Parameters
    ----------
    records : Records
        The runs.
    tables : sequence of PaperTable
        Shown as they are.
    path : pathlib.Path
        Where to write, ``report.html``.
    """
    environment = Environment(
        loader=PackageLoader("fedbw_sweep.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    fixed = {
        "vega": vl_convert.javascript_bundle(  # type: ignore[call-arg]  # its stub lacks the default
            vl_version=".".join(_VEGA_LITE)
        ),
        "charts": {"curves": _curves_chart(), "front": _front_chart()},
        "overview": _overview(records),
        "problems": _problems(records.results),
        "notes": list(records.notes),
    }
    share = 1.0
    while True:
        content = _Content.of(records, tables, share)
        html = template.render(**fixed, content=content)
        if len(html.encode()) <= LIMIT or share < 1e-3:
            break
        share /= 2
    path.write_text(html, encoding="utf-8")


_VEGA_LITE = alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2]


@dataclass(frozen=True)
class _Content:
    """What of the records is on the page, and what was left out of it."""

    data: str
    tables: list[PaperTable]
    left_out: list[str]

    @classmethod
    def of(cls, records: Records, tables: Sequence[PaperTable], share: float) -> _Content:
        results = records.results.reset_index(drop=True)
        settings = [name for name in varying_settings(results) if name not in ("seed", "source")]
        configurations, of_run = _configurations(results, settings)
        left_out = []

        kept = max(1, int(CONFIGURATIONS * share))
        if len(configurations) > kept:
            left_out.append(
                f"The table has {kept:,} of {len(configurations):,} configurations: those of the "
                "lowest loss. All are in results.csv."
            )
        configurations = configurations.head(kept)
        curves, note = _curves(records.rounds, results, of_run, kept, int(POINTS * share))
        left_out += note
        fitting = [table for table in tables if len(table.html.encode()) <= TABLE_BYTES * share]
        left_out += [
            f"Table “{table.title}” is too large for this page: see {table.name}.csv."
            for table in tables
            if table not in fitting
        ]
        of_each = np.unique(of_run, return_index=True)[1][:kept]
        first = results.iloc[of_each].astype(object)
        details = [
            _details(records, row) for row in first.where(first.notna(), None).to_dict("records")
        ]
        runs = results[of_run < kept].assign(configuration=of_run)
        data = {
            "settings": settings,
            "configurations": {**_columns(configurations), **_columns(pd.DataFrame(details))},
            "runs": _columns(_runs(runs, records)),
            "environments": _environments(records),
            "curves": _columns(curves),
        }
        packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)
        return cls(base64.b64encode(packed).decode(), fitting, left_out)


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
    text = results[settings].astype(object).where(results[settings].notna(), None)
    key = text.map(repr).agg("|".join, axis=1) if len(results) else pd.Series(dtype=str)
    done = results["status"] == "done"
    numbers = results[list(METRICS)].astype(float).where(done)
    groups = numbers.groupby(key, sort=False)
    mean, sd = groups.mean(), groups.std(ddof=1)
    table = mean.join(sd.add_suffix("_sd"))
    table["done"] = done.groupby(key).sum()
    table["failed"] = (results["status"] == "failed").groupby(key).sum()
    table["runs"] = key.groupby(key).size()
    own = text.groupby(key).head(1).set_axis(key.drop_duplicates())
    table = own.join(table)
    table["label"] = [_label(row) for row in own.to_dict("records")]
    tasks = [name for name in settings if name.partition(".")[0] in ("model", "data")]
    table["task"] = [", ".join(str(row[name]) for name in tasks) for row in own.to_dict("records")]
    table = table.sort_values("loss", kind="stable", na_position="last")
    order = pd.Series(np.arange(len(table)), index=table.index)
    return table.reset_index(drop=True), key.map(order).astype(int)


def _label(settings: Mapping[Any, Any]) -> str:
    return ", ".join(
        str(value) if name == "compression" else f"{name}={value}"
        for name, value in settings.items()
        if value is not None
    )


def _runs(results: pd.DataFrame, records: Records) -> pd.DataFrame:
    known = {text: number for number, text in enumerate(_distinct_environments(records))}
    numbers = {run: known[_identity(own)] for run, own in records.environments.items()}
    runs = results[["configuration", "run_id", "seed", "status", "loss"]].copy()
    runs["loss"] = runs["loss"].astype(float).round(6)
    for name in ("uplink_bytes", "downlink_bytes"):
        runs[name] = results[name]
    runs["environment"] = results["run_id"].map(numbers)
    runs["source"] = results["source"].astype(str)
    return runs.sort_values(["configuration", "seed"])


def _identity(environment: Mapping[str, Any]) -> str:
    return json.dumps(plain(environment), sort_keys=True)


def _distinct_environments(records: Records) -> list[str]:
    return list(dict.fromkeys(map(_identity, records.environments.values())))


def _environments(records: Records) -> list[dict[str, Any]]:
    return [json.loads(text) for text in _distinct_environments(records)]


def _details(records: Records, row: Mapping[Any, Any]) -> dict[str, Any]:
    """Say how a run's configuration differs from the defaults, and the command without its seed."""
    config: Mapping[str, Any] | None = config_from_columns(row)
    if config is None:
        try:
            config = records.configs[row["run_id"]]
        except (KeyError, OSError, ResultsError):
            return {"changes": None, "command": None}
    found = {key: pair for key, pair in changes(config).items() if key != "seed"}
    shown = [[key, *map(as_text, pair)] for key, pair in found.items()]
    return {"changes": shown, "command": command({**config, "seed": SEED})}


SEED = "SEED"
"""Stands for the seed in the commands of a configuration."""


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
                "the lowest to the highest loss. All are in rounds.csv."
            )
        per_curve = int(np.clip(points // min(curves, most), 10, 60))
        shown = np.unique(np.geomspace(1, last, per_curve).round().astype(int))
        if len(shown) < last:
            own = own[own["round"].isin(shown) | (own["round"] == last)]
            left_out.append(
                f"A loss curve has at most {len(shown)} of its {last} rounds, evenly on the "
                "logarithmic axis. All are in rounds.csv."
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
        if str(values.dtype).lower().startswith("float"):
            numbers = values.astype(float)
            digits = 0 if str(name).endswith("_bytes") else 5
            values = numbers.round(digits).astype(object).where(numbers.notna(), None)
            if not digits:
                values = values.map(lambda number: None if number is None else int(number))
        columns[str(name)] = [None if value is pd.NA else value for value in values.tolist()]
    return columns


def _overview(records: Records) -> dict[str, Any]:
    results = records.results
    varied = varying_settings(results)
    shared = {
        setting: value
        for name in results.columns[: results.columns.get_loc("run_id")]
        if len(results) and name not in varied and not pd.isna(results[name].iloc[0])
        for setting, value in plain(read_setting(results[name].iloc[0]), name).items()
    }
    return {
        "runs": len(results),
        "statuses": results["status"].value_counts().to_dict(),
        "shared": shared,
    }


def _problems(results: pd.DataFrame) -> list[dict[str, Any]]:
    """List the runs that are not done, those of one reason together, most frequent first."""
    bad = results[results["status"] != "done"]
    reasons = bad["error"].fillna("no reason was recorded").str.strip()
    names = [name for name in varying_settings(results) if name != "source"] if len(bad) else []
    problems = []
    for (status, why), runs in bad.groupby([bad["status"], reasons], sort=False):
        reason = str(why)
        values = runs[names].astype(object).where(runs[names].notna(), None).to_dict("records")
        ids = runs["run_id"].astype(object).where(runs["run_id"].notna(), None)
        problems.append(
            {
                "status": status,
                "summary": reason.splitlines()[-1][:300],
                "text": reason[-ERROR_LENGTH:],
                "runs": [[_label(row), run] for row, run in zip(values, ids, strict=True)],
            }
        )
    return sorted(problems, key=lambda problem: -len(problem["runs"]))


def _series_encodings() -> dict[str, Any]:
    """Colour and shape by ``series``; their domain comes from the page, so that it stays fixed."""
    names = alt.ExprRef("series_names")
    shapes = [
        SHAPES[(i + i // len(COLOURS)) % len(SHAPES)] for i in range(len(COLOURS) * len(SHAPES))
    ]
    legend = alt.Legend(
        orient="bottom",
        title=None,
        columns=alt.ExprRef("max(1, floor(width / 190))"),
        labelLimit=330,
        symbolLimit=0,
        symbolOpacity=1,
    )
    return {
        "color": alt.Color(
            "series:N", scale=alt.Scale(domain=names, range=list(COLOURS)), legend=legend
        ),
        "shape": alt.Shape("series:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
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
            ),
        ),
        "y": alt.Y(
            "loss:Q",
            scale=alt.Scale(zero=False, padding=12),
            axis=alt.Axis(title="held-out loss (nats per token)", tickCount=6),
        ),
    }


def _selections() -> tuple[alt.Parameter, alt.Parameter, alt.Parameter]:
    # A wheel without a key scrolls the page, as it does everywhere else on it.
    zoom = alt.selection_interval(
        name="zoom", bind="scales", zoom="wheel![event.shiftKey || event.ctrlKey]"
    )
    picked = alt.selection_point(name="picked", fields=["series"], bind="legend")
    return zoom, picked, alt.param(name="series_names", value=[])


def _finished(chart: Any) -> dict[str, Any]:
    chart = chart.properties(width="container", height=340).configure(
        font="system-ui, sans-serif",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            gridColor="#e8e8e8", labelColor="#444", titleColor="#222", labelFontSize=12
        ),
        legend=alt.LegendConfig(labelFontSize=12, labelColor="#222", symbolSize=70),
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
    zoom, picked, names = _selections()
    base = alt.Chart(alt.NamedData("points")).encode(
        **_axes("MB sent so far (10⁶ bytes, log scale)"), detail="configuration:N"
    )
    colour, shape = _series_encodings().values()
    visible = alt.when(picked)
    band = base.mark_area(interpolate="linear").encode(
        y="low:Q",
        y2="high:Q",
        color=colour,
        opacity=visible.then(alt.value(0.15)).otherwise(alt.value(0)),
    )
    line = base.mark_line(strokeWidth=1.6).encode(
        color=colour, opacity=visible.then(alt.value(1)).otherwise(alt.value(0.06))
    )
    points = (
        base.mark_point(filled=True, size=38)
        .encode(
            color=colour,
            shape=shape,
            opacity=visible.then(alt.value(1)).otherwise(alt.value(0.06)),
            tooltip=[TOOLTIP[0], alt.Tooltip("round:Q"), *TOOLTIP[1:]],
        )
        .add_params(zoom, picked)
    )
    return _finished(alt.layer(band, line, points).add_params(names))


def _front_chart() -> dict[str, Any]:
    zoom, picked, names = _selections()
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
            opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.08)),
            order=alt.Order("dominated:N", sort="descending"),
            tooltip=[*TOOLTIP, alt.Tooltip("verdict:N", title="Pareto front")],
        )
        .add_params(zoom, picked)
    )
    return _finished(alt.layer(front, points).add_params(names))
