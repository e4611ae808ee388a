"""The table a sweep prints when it ends, and how runs are named by what varies."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from fedbw_sweep.console import MB, in_all_units
from fedbw_sweep.records.labels import varying_settings

TASKS = 6
"""Rows of a figure of losses: one for each task."""


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
            + (f"; the bandwidth formula gives {formula} ({run['prediction']})" if formula else "")
        )
    return lines


def _number(value: float, digits: int, unit: float = 1) -> str:
    return "-" if pd.isna(value) else f"{value / unit:,.{digits}f}"
