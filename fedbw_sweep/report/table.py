"""The table a sweep prints when it ends, and how runs are named by what varies."""

from __future__ import annotations

import numpy as np
import pandas as pd
from rich.table import Table

from fedbw_sweep.console import MB, in_all_units
from fedbw_sweep.results import AXES, RESULTS_COLUMNS

TASK = "model", "data", "sequence_length"
"""Settings with whose parameters a held-out loss is another measure: it has no common scale."""

TASKS = 6
"""Rows of a figure of losses: one for each task."""


def task_settings(settings: list[str]) -> list[str]:
    """Return those of `settings` that runs must share for their losses to be comparable."""
    return [name for name in settings if name.partition(".")[0] in TASK]


def varying_settings(results: pd.DataFrame) -> list[str]:
    """Name the configuration columns that tell runs apart, `compression` always first.

    A choice's own parameter counts only where it differs between runs of the same choice:
    ``compression.density`` when top-k runs with several densities, not when there is one.
    """
    settings = [name for name in results.columns if name not in {*RESULTS_COLUMNS, "source"}]

    def differs(name: str) -> bool:
        if results[name].nunique() < 2:
            return False
        group = name.partition(".")[0]
        is_choice = name != group and group in results.columns
        alike = results.groupby(group)[name] if is_choice else results[name]
        return bool(np.max(alike.nunique(dropna=False)) > 1)

    ordered = [*AXES, *(name for name in settings if name not in AXES)]
    return [name for name in ordered if name == "compression" or differs(name)]


def setting_labels(results: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Write settings as text, a choice's own parameters beside its name: ``topk density=0.01``.

    Parameters
    ----------
    results : pandas.DataFrame, a row per run
    settings : list of str
        Columns of `results`, e.g. of `varying_settings`.

    Returns
    -------
    pandas.DataFrame
        Indexed as `results`, a column for each setting that is no parameter of another.
    """
    labels: dict[str, pd.Series] = {}
    for name in sorted(settings, key=lambda name: "." in name):
        group, _, parameter = name.partition(".")
        known = {value: _plain(value) for value in results[name].dropna().unique()}
        text = results[name].map(known).astype(object).fillna("")
        if parameter and group in labels:
            text = text.where(text == "", f" {parameter}=" + text)
            labels[group] = labels[group] + text
        else:
            labels[name] = text
    ordered = dict.fromkeys(n if n in labels else n.partition(".")[0] for n in settings)
    return pd.DataFrame(labels, index=results.index)[list(ordered)]


def run_labels(results: pd.DataFrame, settings: list[str]) -> pd.Series:
    """Name each run by `settings` in one text: ``topk density=0.01, num_clients=4``."""
    labels = setting_labels(results, settings)
    parts = [
        text if name == "compression" else (f"{name}=" + text).where(text != "", "")
        for name, text in labels.items()
    ]
    rows = zip(*parts, strict=True) if parts else [()] * len(results)
    whole = [", ".join(filter(None, row)) for row in rows]
    return pd.Series(whole, index=results.index, dtype=object)


def _plain(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def summary_table(results: pd.DataFrame) -> Table:
    """Lay out a row per run: what was varied, the bytes sent and the loss they gave.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    """
    settings = varying_settings(results)
    table = Table(
        title="Payload (MB = 10^6 bytes) and held-out loss (nats per token)", title_justify="left"
    )
    for name in settings:
        table.add_column(name)
    for name in (
        "uplink MB",
        "downlink MB",
        "uplink ratio",
        "bits/coordinate",
        "loss before",
        "loss after",
        "status",
    ):
        table.add_column(name, justify="right")
    for _, row in results.iterrows():
        table.add_row(
            *("" if pd.isna(row[name]) else str(row[name]) for name in settings),
            _number(row["uplink_bytes"], 2, MB),
            _number(row["downlink_bytes"], 2, MB),
            _number(row["uplink_ratio"], 1),
            _number(row["bits_per_coordinate"], 3),
            _number(row["initial_loss"], 3),
            _number(row["loss"], 3),
            row["status"],
        )
    return table


def describe_bytes(results: pd.DataFrame) -> list[str]:
    """Say in words what a dense message weighs and, for a single run, what all of them add up to.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    """
    done = results[results["status"] == "done"]
    columns = ["model", "model_parameters", "frozen_parameters", "dense_message_bytes"]
    models = done[columns].drop_duplicates()
    lines = [
        f"{model}: {parameters:,} parameters"
        + (f" and {frozen:,} frozen ones" if frozen else "")
        + f"; a dense fp32 message is {in_all_units(dense)}"
        for model, parameters, frozen, dense in models.itertuples(index=False)
    ]
    if len(done) == len(results) == 1:
        [run] = done.to_dict("records")
        messages = 2 * run["rounds"] * run["clients_per_round"]
        formula = "" if pd.isna(run["predicted_bytes"]) else f"{run['predicted_bytes']:,} B"
        lines.append(
            f"{messages} messages: {run['downlink_bytes']:,} B down + {run['uplink_bytes']:,} B up "
            f"= {in_all_units(run['total_bytes'])}"
            + (f"; the formula gives {formula} ({run['prediction']})" if formula else "")
        )
    return lines


def _number(value: float, digits: int, unit: float = 1) -> str:
    return "-" if pd.isna(value) else f"{value / unit:,.{digits}f}"
