"""The table a sweep prints when it ends, and what it says of bytes below it."""

from __future__ import annotations

import pandas as pd
from rich.markup import escape
from rich.table import Table

from fedbw_sweep.console import Fitted, byte_unit, in_all_units, in_unit, size, units_in_words
from fedbw_sweep.records.labels import run_labels, setting_texts, varying_settings
from fedbw_sweep.records.schema import STOPPED

TASKS = 6
"""Rows of a figure of losses: one for each task."""


def summary_table(results: pd.DataFrame) -> Fitted:
    """Lay out a row per run: what was varied, the bytes sent and the loss they gave.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    """
    units = {
        way: byte_unit(results[f"{way}_bytes"].dropna(), "MB") for way in ("uplink", "downlink")
    }
    table = Table(
        title=f"Payload ({units_in_words(units.values())}) and held-out loss (nats per token)",
        title_justify="left",
    )
    texts = setting_texts(results, varying_settings(results))
    for name in texts:
        table.add_column(str(name))
    columns = {
        f"{way} {unit}": [
            "-" if pd.isna(count) else in_unit(count, unit) for count in results[f"{way}_bytes"]
        ]
        for way, unit in units.items()
    }
    columns["uplink ratio"] = _numbers(results["uplink_ratio"], 1)
    if (results["whole_model_ratio"] != results["uplink_ratio"]).any():
        columns["of the whole model"] = _numbers(results["whole_model_ratio"], 1)
    columns |= {
        "bits/coordinate": _numbers(results["bits_per_coordinate"], 3),
        "loss before": _numbers(results["initial_loss"], 3),
        "loss after": _numbers(results["loss"], 3),
        "status": [
            f"{status}: {end}" if end in STOPPED else status
            for status, end in zip(results["status"], results["end"].fillna(""), strict=True)
        ],
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*(texts[name].map(escape) for name in texts), *columns.values(), strict=True):
        table.add_row(*row)
    return Fitted(table, ("bits/coordinate", "loss before", "uplink ratio"))


def describe_bytes(results: pd.DataFrame) -> list[str]:
    """Say in words what a dense message weighs and, for a single run, what all of them add up to.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.
    """
    done = results[results["status"] == "done"]
    columns = ["model", "model_parameters", "frozen_parameters", "dense_message_bytes"]
    models = done.dropna(subset=["model_parameters", "dense_message_bytes"])
    models = models.fillna({"frozen_parameters": 0}).drop_duplicates(columns)
    settings = [
        name
        for name in varying_settings(models)
        if name.partition(".")[0] in ("model", "trainable")
    ]
    labels = run_labels(models, list(dict.fromkeys(["model", *settings])))
    lines = [
        f"{label.removeprefix('model=')}: {parameters:,} parameters"
        + (f" and {frozen:,} frozen ones" if frozen else "")
        + f"; a dense fp32 message is {in_all_units(dense)}"
        for label, (_, parameters, frozen, dense) in zip(
            labels, models[columns].itertuples(index=False), strict=True
        )
    ]
    weights = done.get(["text_bytes", "text_bytes_xz"], pd.DataFrame()).dropna().drop_duplicates()
    if len(weights) == 1:
        [(text, xz)] = weights.itertuples(index=False)
        lines.append(f"the clients' training text itself: {size(text)}, {size(xz)} under xz")
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


def _numbers(values: pd.Series, digits: int) -> list[str]:
    return ["-" if pd.isna(value) else f"{value:,.{digits}f}" for value in values]
