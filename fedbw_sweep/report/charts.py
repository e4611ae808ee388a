"""The page's charts: what they look like, and the JavaScript that draws them."""

from __future__ import annotations

from typing import Any

import altair as alt
import vl_convert

from fedbw_sweep.report.drawing import COLOURS

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")

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


def _room(title: str) -> Any:
    """Span the axes as the page asks, without drawing anything."""
    invisible = alt.MarkDef(type="rule", opacity=0, tooltip=None, aria=False)
    return alt.Chart(alt.NamedData("room"), mark=invisible).encode(**_axes(title))


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
    title = "MB sent so far (10⁶ bytes, log scale)"
    base = alt.Chart(alt.NamedData("points")).encode(**_axes(title), detail="number:N")
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
    return _finished(alt.layer(_room(title), band, line, points))


def _front_chart() -> dict[str, Any]:
    title = "MB sent in all (10⁶ bytes, log scale)"
    base = alt.Chart(alt.NamedData("points")).encode(**_axes(title))
    colour, shape = _series_encodings().values()
    front = (
        base.transform_filter("datum.front")
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
    return _finished(alt.layer(_room(title), front, points))


def specifications() -> dict[str, Any]:
    """Return each chart in Vega-Lite, and the series' styles, which the page's legend shows."""
    return {"specs": {"curves": _curves_chart(), "front": _front_chart()}, "styles": STYLES}


def script() -> str:
    """Return the JavaScript that draws the charts; putting it together takes seconds."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    text: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub lacks the default
    return text
