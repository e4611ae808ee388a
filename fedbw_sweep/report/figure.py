"""Figures for papers: loss against bytes, the Pareto front, where bytes go, codecs' error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedbw_sweep.console import MB, size
from fedbw_sweep.records.labels import run_labels
from fedbw_sweep.report.drawing import (
    COLOURS,
    GREY,
    add_legend,
    draw_lines,
    saved_figure,
    say_nothing_is_there,
    style_of,
    styles_of,
)
from fedbw_sweep.report.measure import settings_of
from fedbw_sweep.report.table import TASKS

NAMED = 12
"""Configurations that a figure names and colours: of more, some on the Pareto front."""

TENSORS = 20
"""Tensors a figure of bytes by layer names; the smallest beyond them are added up."""

FRONT_SHARE = 1.0
"""Room above a Pareto front, as a share of its height."""

PANELS = 4
"""Configurations in a figure of bytes by layer: the first of each compression, then the second."""

UPLINK, BOTH = "uplink payload (MB, log scale)", "payload both ways (MB, log scale)"

LOSS = "held-out loss (nats per token)"


def pareto(final: pd.DataFrame, cost: str) -> pd.Series:
    """Say which rows no other row beats in both `cost` and ``loss``."""
    ordered = final.sort_values([cost, "loss"], kind="stable")
    best = ordered["loss"].cummin().shift(fill_value=np.inf)
    return (ordered["loss"] < best).reindex(final.index)


def loss_against_bytes(curves: pd.DataFrame, *paths: Path) -> None:
    """Draw held-out loss against cumulative payload, uplink and both ways, and save it.

    A line is the mean over seeds, its band one standard deviation on either side. Round 0, which
    has sent nothing, is left out of the logarithmic axis. Each task has a row of panels: losses of
    different ones are not comparable.

    Parameters
    ----------
    curves : pandas.DataFrame
        What `measure.mean_curves` returns.
    *paths : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    named = named_configurations(curves)
    with _task_rows(paths, curves, columns=2) as (panels, tasks):
        for row, (_, own) in zip(panels, tasks, strict=True):
            for axes, sent, label in zip(row, ("sent_up", "sent"), (UPLINK, BOTH), strict=True):
                draw_lines(axes, own[own[sent] > 0], sent, "loss", named)
                axes.set(xscale="log", xlabel=f"cumulative {label}")
                _mark_text(axes, own)


def pareto_front(curves: pd.DataFrame, *paths: Path) -> None:
    """Draw each configuration's final loss against its total payload, grey where it is dominated.

    Rows are those of `loss_against_bytes`. Bars are one standard deviation over seeds. The axis
    ends above the front, or its shape could not be seen beside what failed to learn; what lies
    beyond is counted. A dotted line is what the training text itself weighs, where all
    configurations of a task train on one. Nothing is dominated among configurations without a
    common seed.

    Parameters
    ----------
    curves : pandas.DataFrame
        What `measure.mean_curves` returns with ``common_seeds``.
    *paths : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    final = _final(curves)
    styles = styles_of(final, named_configurations(final))
    with _task_rows(paths, final, columns=2) as (panels, tasks):
        for row, (_, own) in zip(panels, tasks, strict=True):
            _front(row, own, styles)


def _front(
    panels: Sequence[Axes], final: pd.DataFrame, styles: Mapping[str, tuple[str, str, str]]
) -> None:
    """Draw the Pareto front of one task."""
    seeds = final["seeds"].iloc[0] if "seeds" in final else pd.NA
    ranked = pd.isna(seeds) or seeds > 0
    on_a_front = final[(not ranked) | pareto(final, "sent_up") | pareto(final, "sent")]
    low = (on_a_front["loss"] - on_a_front["sd"]).min()
    high = (on_a_front["loss"] + on_a_front["sd"]).max()
    room = max(FRONT_SHARE * (high - low), 0.01 * high)
    top = high + room
    beyond = int((final["loss"] > top).sum())
    for axes, sent, label in zip(panels, ("sent_up", "sent"), (UPLINK, BOTH), strict=True):
        shown = final[final[sent] > 0]
        front = pareto(shown, sent) | (not ranked)
        rest = shown[~front]
        bars = rest["sd"] if len(rest) <= 100 else None
        axes.errorbar(
            rest[sent], rest["loss"], bars, fmt="o", color=GREY, markersize=4, linewidth=0.8,
            label="dominated" if len(rest) else "_", rasterized=bars is None,
        )  # fmt: skip
        best = shown[front].sort_values(sent)
        if ranked:
            axes.plot(best[sent], best["loss"], color="0.5", linewidth=0.8, zorder=1)
        for name, point in best.set_index("configuration").iterrows():
            colour, marker, _ = styles.get(str(name), ("0.4", "o", "-"))
            axes.errorbar(
                point[sent], point["loss"], point["sd"], fmt=marker, color=colour,
                markersize=6, linewidth=0.8, label=str(name) if str(name) in styles else "_",
            )  # fmt: skip
        axes.set(xscale="log", xlabel=f"total {label}")
        _mark_text(axes, final)
    said = []
    if not ranked:
        said.append("no seed in common: nothing is dominated")
    elif not pd.isna(seeds):
        said.append(f"over the seeds that all have, n = {seeds}")
    if beyond:
        panels[0].set_ylim(low - 0.1 * room, top)
        said.append(f"{beyond:,} dominated beyond the axis")
    panels[-1].set_title("; ".join(said), fontsize=7, loc="right")


def _mark_text(axes: Axes, of_task: pd.DataFrame) -> None:
    """Mark the bytes of the training text, if it is one."""
    weights = of_task["text"].dropna().unique()
    if len(weights) == 1:
        axes.axvline(
            weights[0], color="0.3", linestyle=":", linewidth=1, label="the training text under xz"
        )


def bytes_by_round(curves: pd.DataFrame, *paths: Path) -> None:
    """Draw the payload of each round, uplink and downlink; see `loss_against_bytes`."""
    shown, named = curves[curves["round"] > 0], named_configurations(curves)
    with saved_figure(paths, columns=2, share_y=True) as panels:
        if shown.empty:
            say_nothing_is_there(panels)
            return
        for axes, direction in zip(panels, ("up", "down"), strict=True):
            draw_lines(axes, shown[shown[direction] > 0], "round", direction, named)
            axes.set(yscale="log", title=f"{direction}link")
            axes.set_xlabel("communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panels[0].set_ylabel("payload (MB per round, log scale)")
        add_legend(panels)


def bytes_by_part(results: pd.DataFrame, parts: pd.DataFrame, *paths: Path) -> None:
    """Draw where the last round's uplink bytes are: a bar per tensor, split into parts.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    parts : pandas.DataFrame
        Columns ``run_id``, ``tensor``, ``part`` and ``bytes``, as in `Records.parts`.
    *paths : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    labels = run_labels(results, settings_of(results)).set_axis(results["run_id"])
    each = labels[labels.index.isin(parts["run_id"].unique())].drop_duplicates()
    method = results.set_index("run_id")["compression"].reindex(each.index)
    turn = method.groupby(method).cumcount().sort_values(kind="stable").index
    first = set(each[turn[:PANELS]])
    shown = [label for label in each if label in first]
    labels = labels[labels.isin(shown)]
    known = parts[parts["run_id"].isin(labels.index)]
    known = known.assign(configuration=known["run_id"].map(labels))
    seeds = known.groupby("configuration")["run_id"].nunique()
    sums = known.groupby(["configuration", "tensor", "part"], sort=False)["bytes"].sum() / MB
    sums = sums.div(seeds, level="configuration")
    largest = sums.groupby("tensor").sum().sort_values(ascending=False).index
    kinds = sums.groupby("part").sum().sort_values(ascending=False).index
    names = [*largest[:TENSORS]]
    if len(largest) > TENSORS:
        names.append(f"{len(largest) - TENSORS} other tensors")
    if not shown:
        with saved_figure(paths, columns=1) as panels:
            say_nothing_is_there(panels)
        return
    rows = -(-len(shown) // 2)  # two side by side: a figure no wider than a page stays readable
    height = rows * (0.9 + 0.16 * len(names))
    with saved_figure(paths, columns=min(2, len(shown)), rows=rows, height=height) as panels:
        for spare in panels[len(shown) :]:
            spare.remove()
        for axes, label in zip(panels, shown, strict=False):
            table = sums[label].unstack("part").reindex(columns=kinds).fillna(0.0)  # noqa: PD010
            table = table.groupby(lambda t: t if t in set(names) else names[-1]).sum()
            left = np.zeros(len(names))
            for style, kind in enumerate(kinds):
                width = table[kind].reindex(names, fill_value=0.0).to_numpy()
                axes.barh(names, width, left=left, color=COLOURS[style], label=kind)
                left += width
            axes.set_title(fill(label, 36), fontsize=8)
            axes.set_xlabel("last round's uplink payload (MB)")
            axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
            axes.set_xlim(0, 1.05 * left.max())
            place = axes.get_subplotspec()
            assert place is not None
            axes.tick_params(axis="y", labelsize=7, labelleft=place.is_first_col())
            axes.invert_yaxis()
        add_legend(panels)


def local_epochs(results: pd.DataFrame, curves: pd.DataFrame, *paths: Path) -> None:
    """Draw loss against local epochs when every configuration has sent the same uplink bytes.

    The budget is what the configuration of a task that sends least sends in all, so that every one
    can spend it; configurations whose first round takes more are left out.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    curves : pandas.DataFrame
        What `measure.mean_curves` makes of them.
    *paths : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    sent = curves.groupby(["task", "configuration"], observed=True)["sent_up"].max()
    budgets = sent.groupby(level="task", observed=True).min()
    budget = curves["task"].astype(str).map(budgets.rename(index=str)).astype(float)
    spent = curves[curves["sent_up"] <= budget].drop_duplicates("configuration", keep="last")
    spent = spent[(spent["sent_up"] > 0) | (budget.loc[spent.index] == 0)]
    done = results[results["status"] == "done"]
    settings = settings_of(done)
    labels = run_labels(done, settings)
    others = [name for name in settings if name != "local_epochs"]
    own = pd.DataFrame({"line": run_labels(done, others), "epochs": done["local_epochs"]})
    own = own.set_axis(labels)[~labels.duplicated().to_numpy()]
    points = spent.join(own, on="configuration").drop(columns="configuration")
    points = points.rename(columns={"line": "configuration"})
    points = points.astype({"epochs": int}).sort_values(["configuration", "epochs"])
    best = points.groupby("configuration", sort=False).agg({"loss": "min", "task": "first"})
    share = NAMED // max(1, min(TASKS, best["task"].nunique()))
    named = [label for _, own in _by_task(best) for label in own["loss"].nsmallest(share).index]
    with _task_rows(paths, points, columns=1) as (panels, tasks):
        for [axes], (task, own) in zip(panels, tasks, strict=True):
            draw_lines(axes, own, "epochs", "loss", named)
            axes.set(xlabel=f"local epochs, at {size(budgets[task] * MB)} of uplink")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def rate_distortion(codecs: pd.DataFrame, *paths: Path) -> None:
    """Draw each codec's error against its bits, beside the Gaussian bound, and save it.

    Parameters
    ----------
    codecs : pandas.DataFrame
        Columns ``method``, ``bits`` per coordinate, ``nmse`` and ``bound_bits``.
    *paths : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    lossy = codecs[codecs["nmse"] > 0]
    with saved_figure(paths, columns=1, height=5.0) as [axes]:
        families = lossy.groupby(lossy["method"].str.split().str[0], sort=False)
        for style, (family, points) in enumerate(families):
            line = points.sort_values("bits")
            colour, marker, dashes = style_of(style)
            axes.plot(
                line["bits"], line["nmse"], color=colour, marker=marker, linestyle=dashes,
                markersize=5, linewidth=1.1, label=family,
            )  # fmt: skip
        bound = lossy.sort_values("bound_bits")
        axes.plot(
            bound["bound_bits"], bound["nmse"], color="0.6", linestyle=":", label="Gaussian bound"
        )
        axes.set(xscale="log", yscale="log", xlim=(0.02, 40))
        axes.set_xlabel("bits per coordinate (log scale)")
        axes.set_ylabel("NMSE: squared error / energy (log scale)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def named_configurations(curves: pd.DataFrame) -> list[str]:
    """Choose what a figure names: all, or of many some from each task's Pareto front."""
    final = _final(curves)
    if len(final) <= NAMED:
        return list(map(str, final["configuration"]))
    share = NAMED // min(TASKS, final["task"].nunique())
    named: list[str] = []
    for _, own in _by_task(final):
        front = own[pareto(own, "sent_up") | pareto(own, "sent")].sort_values("sent_up")
        places = np.unique(np.linspace(0, len(front) - 1, share).round().astype(int))
        named += map(str, front["configuration"].iloc[places])
    return named


def _by_task(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split the first `TASKS` tasks, in the order that they come."""
    groups = table.groupby("task", sort=False, observed=True)
    return [(str(task), own) for task, own in groups][:TASKS]


@contextmanager
def _task_rows(
    paths: Sequence[Path], table: pd.DataFrame, columns: int
) -> Iterator[tuple[list[Sequence[Axes]], list[tuple[str, pd.DataFrame]]]]:
    """Yield a row of panels, which share an axis of losses, for each task; name it if several."""
    tasks = _by_task(table)
    if not tasks:
        with saved_figure(paths, columns=1) as panels:
            yield [], []
            say_nothing_is_there(panels)
        return
    height = 3.2 if len(tasks) == 1 else 2.8 * len(tasks)
    with saved_figure(paths, columns, rows=len(tasks), height=height, share_y=True) as panels:
        rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
        yield rows, tasks
        for row, (task, _) in zip(rows, tasks, strict=True):
            row[0].set_ylabel(LOSS)
            if len(tasks) > 1:
                row[0].set_title(fill(task, 40 * columns), loc="left", fontsize=8)
        add_legend(panels)


def _final(curves: pd.DataFrame) -> pd.DataFrame:
    return curves.drop_duplicates("configuration", keep="last").reset_index(drop=True)
