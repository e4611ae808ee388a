"""What a report measures beyond ``results.csv``: targets, budgets, paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.console import MB
from fedbw_sweep.cost.network import break_even_mbit_s, codec_seconds, link_bytes, run_seconds
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.labels import run_labels, task_settings, varying_settings
from fedbw_sweep.records.read import Records
from fedbw_sweep.records.schema import STOPPED, Column
from fedbw_sweep.report.ranking import of_common_seeds

TARGET_MEASURES: Mapping[str, Column] = {
    "rounds_to_target": Column("Int64", "first round whose held-out loss is at most the target"),
    "uplink_bytes_to_target": Column("Int64", "payload bytes, clients to server, up to it"),
    "downlink_bytes_to_target": Column("Int64", "payload bytes, server to clients, up to it"),
    "bytes_to_target": Column("Int64", "payload bytes in both directions up to it"),
}
"""Need a target loss; empty if no evaluated round reaches it."""

BUDGET_MEASURES: Mapping[str, Column] = {
    "loss_at_budget": Column(
        "Float64", "held-out loss after the last round within the budget in both directions"
    ),
    "loss_at_uplink_budget": Column("Float64", "the same with the budget spent on uplink alone"),
}
"""Need a byte budget. Round 0 has sent nothing, so that there is always a loss."""

BASELINE_MEASURES: Mapping[str, Column] = {
    "loss_difference": Column(
        "Float64", "loss minus the baseline's of the same seed and other settings"
    ),
}
"""Need a baseline among the runs."""

TIME_MEASURES: Mapping[str, Column] = {
    "round_seconds": Column("Float64", "seconds of a round's communication, in the mean"),
    "communication_seconds": Column("Float64", "seconds of all rounds' communication"),
    "seconds_to_target": Column("Float64", "seconds of communication up to rounds_to_target"),
    "codec_seconds": Column(
        "Float64", "measured seconds of a client's encoding and the server's decoding, each round"
    ),
    "break_even_mbit_s": Column(
        "Float64", "link speed, as fast up as down, below which it beats the baseline; inf: always"
    ),
}
"""Need a network; see `measure_time`. Only runs with a folder have them."""

OF_ALL_ROUNDS = frozenset(
    {
        "loss", "perplexity", "bits_per_byte", "loss_difference", "communication_seconds",
        "uplink_bytes", "downlink_bytes", "total_bytes", "uplink_message_bytes",
        "downlink_message_bytes", "predicted_bytes",
    }
)  # fmt: skip
"""Measures that depend on how many rounds a run has done: runs that stopped are not ranked by them
against whole ones."""

MEASURES: Mapping[str, Column] = {**TARGET_MEASURES, **BUDGET_MEASURES, **BASELINE_MEASURES}
"""Columns that `measure` adds to ``results.csv``; only finished runs have them."""


@dataclass(frozen=True)
class Options:
    """What a report compares with.

    Attributes
    ----------
    baseline : mapping
        Settings of the runs that others are compared with, e.g. ``{"compression": "none"}``.
    target_loss : float or None
        Held-out loss to reach, nats per token.
    budget_bytes : float or None
        Payload bytes that may be sent.
    networks : tuple of NetworkConfig
        Those that communication time is estimated for.
    """

    baseline: Mapping[str, Any] = field(default_factory=lambda: {"compression": "none"})
    target_loss: float | None = None
    budget_bytes: float | None = None
    networks: tuple[NetworkConfig, ...] = ()

    @staticmethod
    def parse_baseline(text: str) -> dict[str, Any]:
        """Read ``none``, a compression choice, or ``key=value,key=value``.

        Raises
        ------
        ConfigError
            If a part has no key.
        """
        if "=" not in text:
            return {"compression": text}
        parts = [part.partition("=") for part in text.split(",")]
        try:
            settings = {key.strip(): yaml.safe_load(value) for key, _, value in parts}
        except yaml.YAMLError:
            settings = {}
        plain = [value for value in settings.values() if not isinstance(value, list | dict)]
        empty = not all(key.strip() and value.strip() for key, _, value in parts)
        if len(plain) < len(parts) or empty:
            raise ConfigError("--baseline", text, "a compression choice, or key=value,key=value")
        return settings


def measure(records: Records, options: Options) -> pd.DataFrame:
    """Add `MEASURES` to the results.

    Returns
    -------
    pandas.DataFrame
        ``records.results``, then a column per measure.
    """
    runs = records.results
    done = runs[runs["status"] == "done"]
    columns = ["run_id", "round", "loss", "cumulative_uplink_bytes", "cumulative_bytes"]
    rounds = records.rounds.loc[records.rounds["run_id"].isin(done["run_id"]), columns]
    rounds = rounds.sort_values("round", kind="stable")
    up, both = rounds["cumulative_uplink_bytes"], rounds["cumulative_bytes"]
    found: dict[str, pd.Series] = {}
    if options.target_loss is not None:
        reached = rounds[rounds["loss"] <= options.target_loss]
        first = reached.drop_duplicates("run_id").set_index("run_id")
        found["rounds_to_target"] = first["round"]
        found["uplink_bytes_to_target"] = first["cumulative_uplink_bytes"]
        found["bytes_to_target"] = first["cumulative_bytes"]
        found["downlink_bytes_to_target"] = (
            first["cumulative_bytes"] - first["cumulative_uplink_bytes"]
        )
    if options.budget_bytes is not None:
        for name, spent in (("loss_at_budget", both), ("loss_at_uplink_budget", up)):
            within = rounds[spent <= options.budget_bytes]
            found[name] = within.drop_duplicates("run_id", keep="last").set_index("run_id")["loss"]
    whole = done[~done["end"].isin(STOPPED)].set_index("run_id")["loss"]
    reference = _baseline_of(done, options.baseline)
    loss = whole.reindex(reference.index)
    found["loss_difference"] = loss - loss.reindex(reference).set_axis(loss.index)
    measured = {
        name: runs["run_id"].map(found.get(name, pd.Series(dtype=object))) for name in MEASURES
    }
    dtypes = {name: column.dtype for name, column in MEASURES.items()}
    return runs.assign(**measured).astype(dtypes)


def measure_time(runs: pd.DataFrame, records: Records, options: Options) -> pd.DataFrame:
    """Add `TIME_MEASURES` to what `measure` returns, once for each network.

    Returns
    -------
    pandas.DataFrame
        A row per run and network: `runs`, ``network``, then a column per measure.
    """
    done = runs[runs["status"] == "done"]
    reference = _baseline_of(done, options.baseline)
    own = pd.DataFrame(
        {
            "link_bytes": link_bytes(records.messages),
            "codec_seconds": codec_seconds(records.timing, records.rounds),
        }
    ).reindex(reference.index)
    saved = own.reindex(reference).set_axis(own.index) - own
    speed = break_even_mbit_s(saved["link_bytes"], -saved["codec_seconds"])
    itself = (reference == reference.index).fillna(False).to_numpy(bool)
    own["break_even_mbit_s"] = np.where(itself, np.nan, speed)
    tables = []
    for network in options.networks:
        found = own.join(run_seconds(network, done, records.messages))
        columns = {name: runs["run_id"].map(found[name]) for name in TIME_MEASURES}
        tables.append(runs.assign(network=network.name, **columns))
    dtypes = {name: column.dtype for name, column in TIME_MEASURES.items()}
    return pd.concat(tables, ignore_index=True).astype(dtypes)


def settings_of(runs: pd.DataFrame) -> list[str]:
    """Name the settings that tell configurations apart: all that varies but the seed."""
    plain = runs.drop(columns=[*MEASURES, *TIME_MEASURES], errors="ignore")
    return [name for name in varying_settings(plain) if name != "seed"]


def mean_curves(
    results: pd.DataFrame, rounds: pd.DataFrame, *, common_seeds: bool = False
) -> pd.DataFrame:
    """Average the finished runs of each configuration, which differ in their seed alone.

    Parameters
    ----------
    results, rounds : pandas.DataFrame
        As in `Records`.
    common_seeds : bool
        Whether the configurations of a task are to be compared: over the seeds that all of them
        have, where they have any.

    Returns
    -------
    pandas.DataFrame
        ``configuration`` (its label), ``task`` (the label of what makes losses comparable),
        ``round``, ``loss``, ``sd`` (ddof 1, 0 for one seed), and means over seeds, in MB: ``up``
        and ``down`` of the round, ``sent_up`` and ``sent`` up to it, ``text`` of the clients'
        training text under xz (missing where it was not weighed). The order is that of `results`,
        then that of rounds. With `common_seeds` also ``seeds``: of the task, 0 where its
        configurations have none in common, and missing where all have the same.
    """
    done = results[results["status"] == "done"]
    settings = settings_of(done)
    labels = run_labels(done, settings)
    tasks = run_labels(done, task_settings(settings))
    seeds = pd.Series(dtype="Int64")
    if common_seeds:
        common = of_common_seeds(tasks, labels, done["seed"])
        unequal = ~common.groupby(tasks).all()
        seeds = done["seed"][common].groupby(tasks).nunique().reindex(unequal.index, fill_value=0)
        seeds = seeds.astype("Int64").where(unequal)
        kept = common | tasks.map(seeds == 0).fillna(False).astype(bool)
        done, labels, tasks = done[kept], labels[kept], tasks[kept]
    tasks = tasks[~labels.duplicated()]
    each = list(dict.fromkeys(labels))
    if "text_bytes_xz" in done:
        text = done["text_bytes_xz"].astype(float).groupby(labels).mean() / MB
    else:
        text = pd.Series(dtype=float)
    code = pd.Series(pd.Index(each).get_indexer(pd.Index(labels)), index=done["run_id"])
    codes = rounds["run_id"].map(code)
    own = rounds[codes.notna()]
    numbers = pd.DataFrame(
        {
            "configuration": codes[codes.notna()].to_numpy(int),
            "round": own["round"].to_numpy(int),
            "loss": own["loss"].to_numpy(float),
            "up": own["uplink_bytes"].to_numpy(float) / MB,
            "down": own["downlink_bytes"].to_numpy(float) / MB,
            "sent_up": own["cumulative_uplink_bytes"].to_numpy(float) / MB,
            "sent": own["cumulative_bytes"].to_numpy(float) / MB,
        }
    )
    grouped = numbers.groupby(["configuration", "round"])
    curves = grouped.mean().assign(sd=grouped["loss"].std(ddof=1).fillna(0.0)).reset_index()
    # Where seeds stopped after unlike rounds, only rounds of all of them have a mean.
    seeds_there = grouped.size().reset_index(drop=True)
    of_each_there = seeds_there.groupby(curves["configuration"]).transform("max")
    curves = curves[(seeds_there == of_each_there).to_numpy()].reset_index(drop=True)
    of_task = pd.Series(tasks.to_numpy()[curves["configuration"]], dtype=object)
    if common_seeds:
        curves["seeds"] = of_task.map(seeds).astype("Int64")
    return curves.assign(
        text=curves["configuration"].map(pd.Series(each).map(text)),
        configuration=pd.Categorical.from_codes(curves["configuration"], pd.Index(each)),
        task=pd.Categorical(of_task),
    )


def is_baseline(runs: pd.DataFrame, baseline: Mapping[str, Any]) -> pd.Series:
    """Say which runs have all the baseline's settings."""
    same = pd.Series(True, index=runs.index)
    for key, value in baseline.items():
        if key not in runs:
            raise ConfigError("--baseline", key, f"no such setting; there are {_listed(runs)}")
        equal = runs[key].isna() if value is None else (runs[key] == value).fillna(False)
        same &= equal.astype(bool)
    return same


def shared_settings(runs: pd.DataFrame, baseline: Mapping[str, Any]) -> list[str]:
    """Name what varies but is not the baseline's: what a run and its baseline have in common."""
    groups = {key.partition(".")[0] for key in baseline}
    return [name for name in settings_of(runs) if name.partition(".")[0] not in groups]


def _baseline_of(done: pd.DataFrame, baseline: Mapping[str, Any]) -> pd.Series:
    """Return each run's baseline, both by ``run_id``: of the same seed and other settings."""
    keys = [*shared_settings(done, baseline), "seed"]
    own = done[is_baseline(done, baseline)]
    if (twice := own.duplicated(keys)).any():
        groups = {key.partition(".")[0] for key in baseline}
        names = [n for n in settings_of(own) if n.partition(".")[0] in groups]
        raise ConfigError(
            "--baseline",
            ",".join(f"{key}={value}" for key, value in baseline.items()),
            f"names {int(twice.sum()) + 1} runs of one seed; add {' or '.join(names)}",
        )
    paired = done[["run_id", *keys]].merge(
        own[[*keys, "run_id"]], "left", keys, suffixes=("", "_of_baseline")
    )
    return paired.set_index("run_id")["run_id_of_baseline"]


def _listed(runs: pd.DataFrame) -> str:
    return ", ".join(name for name in runs.columns if name not in MEASURES)
