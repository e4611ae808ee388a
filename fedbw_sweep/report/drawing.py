"""What all figures share: colours and markers, lines of configurations, the legend, saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers."""

MARKERS = "os^Dv*P"

LINES = "-", "--", "-."

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG, ".pdf": FigureCanvasPdf}

OTHERS = 100
"""Unnamed configurations that a figure draws, evenly from the lowest to the highest loss."""

GREY = "0.75"


def draw_lines(axes: Axes, curves: pd.DataFrame, x: str, y: str, named: list[str]) -> None:
    """Draw a line per configuration, a band of `sd` where `y` is the loss; grey if not named."""
    others = curves[~curves["configuration"].isin(named)]
    if len(others):
        final = others.drop_duplicates("configuration", keep="last")
        ranked = final.sort_values("loss")["configuration"]
        places = np.linspace(0, len(ranked) - 1, min(len(ranked), OTHERS)).astype(int)
        shown = others[others["configuration"].isin(ranked.iloc[places])]
        last = ~shown["configuration"].duplicated(keep="last").to_numpy()
        points = np.insert(
            shown[[x, y]].to_numpy(float), np.flatnonzero(last) + 1, np.nan, axis=0
        )  # a gap ends a line
        axes.plot(*points.T, color=GREY, linewidth=0.4, zorder=1)
        some = f"{len(places):,} of " if len(places) < len(ranked) else ""
        axes.plot([], [], color=GREY, linewidth=1, label=f"{some}{len(ranked):,} others")
    for label, (colour, marker, dashes) in styles_of(curves, named).items():
        line = curves[curves["configuration"] == label]
        axes.plot(
            line[x], line[y], color=colour, marker=marker, linestyle=dashes, markersize=4,
            linewidth=1.3, markevery=0.15 if len(line) > 10 else None, label=label,
        )  # fmt: skip
        if y == "loss" and line["sd"].any():
            low, high = line[y] - line["sd"], line[y] + line["sd"]
            axes.fill_between(line[x], low, high, color=colour, alpha=0.2, linewidth=0)


def styles_of(curves: pd.DataFrame, named: list[str]) -> dict[str, tuple[str, str, str]]:
    """Give each named configuration its colour, marker and dashes, in the order that they come."""
    labels = curves["configuration"].drop_duplicates()
    return {label: style_of(place) for place, label in enumerate(labels[labels.isin(named)])}


def style_of(place: int) -> tuple[str, str, str]:
    """Return another marker and dash each time the colours start again: no two look alike."""
    again = place // len(COLOURS)
    marker = MARKERS[(place + again) % len(MARKERS)]
    return COLOURS[place % len(COLOURS)], marker, LINES[again % len(LINES)]


def add_legend(panels: Sequence[Axes]) -> None:
    """Put one legend of all panels below them, as wide as fits, and make room for it.

    Settings that all its configurations have in common are said once, above it.
    """
    drawn = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    split = [label.split(", ") for label in drawn if "=" in label]
    alike = [part for part in split[0] if all(part in parts for parts in split)] if split else []
    common = [part for part in alike if "=" in part and " " not in part] if len(split) > 1 else []
    if not drawn:
        return
    handles = {
        fill(", ".join(part for part in label.split(", ") if part not in common), 88): handle
        for label, handle in drawn.items()
    }
    figure = panels[0].get_figure(root=True)
    assert figure is not None
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", frameon=False,
            ncols=columns, columnspacing=1.2, title=fill(", ".join(common), 90),
            title_fontsize="small",
        )  # fmt: skip
        size = legend.get_window_extent()
        if columns == 1 or size.width < figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        legend.remove()


def say_nothing_is_there(panels: Sequence[Axes]) -> None:
    """Say in place of a figure that there is nothing to draw."""
    for axes in panels:
        axes.set_axis_off()
    panels[0].text(0.5, 0.5, "no finished run has sent anything", ha="center", va="center")


def _log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis in plain numbers, as many as there is room for."""
    low, high = axis.get_view_interval()
    if high > 100 * low:
        axis.set_major_locator(LogLocator(numticks=6))
    else:
        wide = high > 5 * low
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}" if value < 1e6 else f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


@contextmanager
def saved_figure(
    paths: Sequence[Path],
    columns: int,
    rows: int = 1,
    height: float = 3.2,
    share_y: bool = False,
) -> Iterator[Sequence[Axes]]:
    """Yield panels side by side and save them; the same data gives the same files."""
    style: Any = {
        "font.size": 9, "agg.path.chunksize": 10000, "svg.fonttype": "none",
        "svg.hashsalt": "fedbw", "pdf.fonttype": 42,
        "text.parse_math": False,  # a dollar sign in a name is one
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.0, height), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[call-arg,union-attr]
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharey="row" if share_y else False, squeeze=False)
        panels = grid.ravel().tolist()
        yield panels
        for axes in panels:
            axes.grid(visible=True, which="major", color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    _log_ticks(axis)
        figure.draw_without_rendering()  # lay out once, not for every format
        figure.set_layout_engine("none")
        dpi = figure.dpi
        for path in paths:  # savefig would draw each twice, to lay out again
            figure.dpi = dpi  # vector formats leave theirs
            canvas: Any = CANVASES[path.suffix](figure)
            date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
            getattr(canvas, f"print_{path.suffix[1:]}")(path, metadata=date)
