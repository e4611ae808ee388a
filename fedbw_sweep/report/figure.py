"""Figures: held-out loss against bytes sent, and codecs' error against bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbw_sweep.report.table import MB, varying_settings

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers."""
MARKERS = "os^Dv*P"
LINES = "-", "--", "-."


def loss_against_bytes(results: pd.DataFrame, rounds: pd.DataFrame, path: Path) -> None:
    """Draw held-out loss against cumulative uplink payload, a line per run, and save it.

    Runs that differ only in their seed share a colour. Round 0, which has sent nothing, is left out
    of the logarithmic axis.

    Parameters
    ----------
    results, rounds : pandas.DataFrame
        Rows of ``results.csv`` and ``rounds.csv``.
    path : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    settings = [name for name in varying_settings(results) if name != "seed"]
    sent = rounds[rounds["cumulative_uplink_bytes"] > 0]
    styles: dict[str, int] = {}
    with _figure(path) as axes:
        for _, run in results.iterrows():
            line = sent[sent["run_id"] == run["run_id"]]
            present = [name for name in settings if not pd.isna(run[name])]
            label = ", ".join(
                str(run[name]) if name == "compression" else f"{name}={run[name]}"
                for name in present
            )
            seen = label in styles
            style = styles.setdefault(label, len(styles))
            axes.plot(
                line["cumulative_uplink_bytes"] / MB,
                line["loss"].astype(float),
                color=COLOURS[style % len(COLOURS)],
                marker=_marker(style),
                markersize=4,
                linewidth=1.3,
                label="_" if seen else label,
            )
        axes.set_xscale("log")
        axes.set_xlabel("cumulative uplink payload (MB = $10^6$ bytes, log scale)")
        axes.set_ylabel("held-out loss (nats per token)")
        if styles:
            axes.legend(frameon=False)


def rate_distortion(codecs: pd.DataFrame, path: Path) -> None:
    """Draw each codec's error against its bits, beside the Gaussian bound, and save it.

    Parameters
    ----------
    codecs : pandas.DataFrame
        Columns ``method``, ``bits`` per coordinate, ``nmse`` and ``bound_bits``.
    path : pathlib.Path
        Where to save; the suffix chooses the format.
    """
    lossy = codecs[codecs["nmse"] > 0]
    with _figure(path, height=5.0) as axes:
        families = lossy.groupby(lossy["method"].str.split().str[0], sort=False)
        for style, (family, points) in enumerate(families):
            line = points.sort_values("bits")
            axes.plot(
                line["bits"],
                line["nmse"],
                color=COLOURS[style % len(COLOURS)],
                marker=_marker(style),
                linestyle=LINES[style // len(COLOURS) % len(LINES)],
                markersize=5,
                linewidth=1.1,
                label=family,
            )
        bound = lossy.sort_values("bound_bits")
        axes.plot(
            bound["bound_bits"], bound["nmse"], color="0.6", linestyle=":", label="Gaussian bound"
        )
        axes.set(xscale="log", yscale="log", xlim=(0.02, 40))
        axes.set_xlabel("bits per coordinate (log scale)")
        axes.set_ylabel("NMSE: squared error / energy (log scale)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _marker(style: int) -> str:
    """Return another marker each time the colours start again, so that no two points look alike."""
    return MARKERS[(style + style // len(COLOURS)) % len(MARKERS)]


@contextmanager
def _figure(path: Path, height: float = 4.0) -> Iterator[Axes]:
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes
        axes.grid(visible=True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
