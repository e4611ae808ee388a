"""Tables built from runs as `spec` describes them: aggregated over seeds and nothing else."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pandas as pd

from fedbw_sweep.cost.network import describe
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.labels import run_labels, setting_labels
from fedbw_sweep.records.schema import STATES, STOPPED
from fedbw_sweep.report.measure import (
    BASELINE_MEASURES,
    BUDGET_MEASURES,
    OF_ALL_ROUNDS,
    TARGET_MEASURES,
    TIME_MEASURES,
    Options,
    is_baseline,
    settings_of,
    shared_settings,
)
from fedbw_sweep.report.ranking import of_common_seeds, speedups, statistic_of
from fedbw_sweep.report.render import Rendered
from fedbw_sweep.report.spec import WHOLE_MODEL, TableSpec, ValueSpec

REASONS_SHOWN = 5


class TableBuilder:
    """Builds tables of one set of runs.

    Parameters
    ----------
    runs : pandas.DataFrame
        What `fedbw_sweep.report.measure.measure` returns.
    options : Options
    """

    def __init__(self, runs: pd.DataFrame, options: Options) -> None:
        self.runs, self.options = runs, options
        self.known = runs[runs["compression"].notna()]
        self.settings = settings_of(self.known)

    @cached_property
    def has_baseline(self) -> bool:
        """Whether any finished run is the baseline."""
        done = self.known[self.known["status"] == "done"]
        return bool(is_baseline(done, self.options.baseline).any())

    def check(self, spec: TableSpec) -> None:
        """Refuse a user's table of settings that the runs do not have.

        Raises
        ------
        ConfigError
            Naming the first.
        """
        if unknown := self._unknown(spec):
            vary = ", ".join(self.settings)
            raise ConfigError("--spec: rows", unknown[0], f"no such setting; these vary: {vary}")

    def _unknown(self, spec: TableSpec) -> list[str]:
        return [name for name in [*spec.rows, *spec.columns] if name not in self.known]

    def why_not(self, spec: TableSpec) -> str | None:
        """Say what a table lacks, or None if it can be built."""
        if unknown := self._unknown(spec):
            return f"needs {' and '.join(unknown)}, which the runs were recorded without"
        measures = {value.value for value in spec.measures}
        if measures & set(TIME_MEASURES) and not self.options.networks:
            return "needs --network"
        if measures & set(TARGET_MEASURES) and self.options.target_loss is None:
            return "needs --target-loss"
        if measures & set(BUDGET_MEASURES) and self.options.budget_bytes is None:
            return "needs --budget-mb"
        if not set(spec.rows) & set(self.settings):
            return f"needs runs that differ in {' or '.join(spec.rows)}"
        return None

    def build(self, name: str, spec: TableSpec) -> Rendered:
        """Aggregate over seeds and write the table down; see `why_not` first."""
        values = [value for value in spec.measures if self._says_something(value.value)]
        listed = self._with_parameters(spec.rows)
        across = [c for c in self._with_parameters(spec.columns) if c not in listed]
        blocks = [s for s in self.settings if s not in {*listed, *across}]
        order = [*across, *blocks, *listed]
        runs = self.known.sort_values([*order, "run_id"], kind="stable", ignore_index=True)
        key = runs.groupby(order, dropna=False, sort=False).ngroup()
        grouped = runs.groupby(key)

        configurations = runs.loc[~key.duplicated(), order].reset_index(drop=True)
        status = pd.get_dummies(runs["status"]).groupby(key).sum()
        status = status.reindex(columns=STATES, fill_value=0)
        data = pd.concat([configurations, grouped.size().rename("runs"), status], axis=1)
        text = setting_labels(configurations, [*blocks, *listed])
        row_names = list(map(str, text))
        text["n"] = [_n(*row) for row in data[["runs", *STATES]].to_numpy()]
        block = run_labels(configurations, [*across, *blocks])
        done = runs["status"] == "done"
        of_block = key[done].map(block)
        common = of_common_seeds(of_block, key[done], runs.loc[done, "seed"])
        best = pd.DataFrame(False, index=text.index, columns=text.columns)
        stopped = runs["end"].isin(STOPPED).groupby(key).any()
        rounds = grouped["rounds"].max()
        first_target = next((v for v in values if v.value in TARGET_MEASURES), None)
        for value in values:
            how = "mean" if value.aggregate == "mean_sd" else value.aggregate
            statistic = grouped[value.value].agg(how).astype("float64")
            deviation = grouped[value.value].std(ddof=1).astype("float64")
            count = grouped[value.value].count().astype("int64")
            data[value.value], data[f"{value.value}_n"] = statistic, count
            if value.aggregate == "mean_sd":
                data[f"{value.value}_sd"] = deviation
            times = pd.Series("", index=data.index)
            if value.speedup and self.has_baseline:
                found = self._speedups(configurations, runs[done], key[done], value.value, how)
                data[f"{value.value}_speedup"] = found["speedup"]
                times = _times(found, data["done"])
            explains, value = value is first_target, value.fitted(statistic)
            title = value.title if value.title not in text else f"{value.title}, {value.value}"
            shown = statistic.map(value.text, na_action="ignore")
            numbers = (shown, deviation, count, data["done"], data["failed"], times, rounds)
            text[title] = [_cell(value, explains, *row) for row in zip(*numbers, strict=True)]
            compared = statistic_of(runs.loc[done, value.value][common], key[done][common], how)
            compared = compared.reindex(data.index)
            if value.value in OF_ALL_ROUNDS:
                compared = compared.mask(stopped)
            best[title] = _best(value, compared, block)
        notes = self._notes(values)
        if stopped.any() and any(value.value in OF_ALL_ROUNDS for value in values):
            notes = (*notes, STOPPED_NOTE)
        if not common.all() and any(value.best for value in values):
            notes = (*notes, _which_seeds(of_block, key[done], common))
        if across:
            labels = run_labels(configurations, across)
            text, best = (_pivot(part, row_names, text, labels) for part in (text, best))
        return Rendered(name, spec.title, text.astype(str), best.astype(bool), data, notes)

    def failures(self) -> Rendered | None:
        """List every run that failed or is missing, with its reason; None if there is none."""
        bad = self.runs[self.runs["status"] != "done"]
        if bad.empty:
            return None
        data = bad[["run_id", *self.settings, "seed", "status", "reason", "source"]]
        labels = run_labels(self.runs, [*self.settings, "seed"])
        frame = pd.DataFrame(
            {
                "run": bad["run_id"],
                "settings": labels[bad.index],
                "status": bad["status"],
                "reason": [_reason(error) for error in bad["reason"]],
                "read in": bad["source"],
            }
        ).astype(str)
        none_best = pd.DataFrame(False, index=frame.index, columns=frame.columns)
        return Rendered("failures", "Runs that failed or are missing", frame, none_best, data)

    def _with_parameters(self, names: list[str]) -> list[str]:
        """Return the varying ones of `names`, each choice followed by its varying parameters."""
        return [
            setting
            for name in names
            for setting in self.settings
            if setting == name or setting.startswith(f"{name}.")
        ]

    def _says_something(self, measure: str) -> bool:
        """Whether a measure tells more than the others that a table has."""
        if measure == WHOLE_MODEL:
            return bool((self.runs[WHOLE_MODEL] != self.runs["uplink_ratio"]).any())
        return measure not in BASELINE_MEASURES or self.has_baseline

    def _speedups(
        self, configurations: pd.DataFrame, runs: pd.DataFrame, key: pd.Series, value: str, how: str
    ) -> pd.DataFrame:
        """Compare every configuration with the baseline that has all its other settings."""
        baseline = self.options.baseline
        shared = [name for name in shared_settings(self.known, baseline) if name in configurations]
        own = configurations[is_baseline(configurations, baseline)]
        reference = own.assign(_row=own.index, _all=0).drop_duplicates(shared or "_all")
        places = configurations.assign(_all=0).merge(
            reference[[*shared, "_all", "_row"]], "left", [*shared, "_all"]
        )["_row"]
        found = speedups(runs[value], key, runs["seed"], places, how)
        of_baseline = runs.groupby(key).size().reindex(places).set_axis(places.index)
        return found.reindex(configurations.index).assign(of_baseline=of_baseline)

    def _notes(self, values: list[ValueSpec]) -> tuple[str, ...]:
        """Explain below the table what its header cannot."""
        named = {value.value for value in values}
        notes = []
        has_seeds = self.known.groupby(self.settings, dropna=False).size().max() > 1
        if has_seeds and any(value.aggregate == "mean_sd" for value in values):
            notes.append("Mean ± standard deviation (ddof 1) over n seeds.")
        baseline = ", ".join(f"{key}={value}" for key, value in self.options.baseline.items())
        if named & set(TARGET_MEASURES):
            target = f"Target: a held-out loss of {self.options.target_loss:g} nats per token"
            notes.append(f"{target}, first crossing on the evaluated rounds.")
        if named & set(TIME_MEASURES):
            notes += map(describe, self.options.networks)
        if "break_even_mbit_s" in named:
            notes.append(
                f"On links slower than break-even a method's rounds are faster than those of "
                f"{baseline}: what it saves in bytes outweighs its measured encoding and decoding."
            )
        if named & set(BUDGET_MEASURES) and self.options.budget_bytes is not None:
            notes.append(
                f"Budget: {self.options.budget_bytes / 10**6:g} MB of payload; a run that ends "
                "before it is spent counts with its final loss, one whose first round costs more "
                "with its initial loss."
            )
        if any(value.speedup for value in values) and self.has_baseline:
            notes.append(f"In parentheses: how many times less than {baseline}.")
        if named & set(BASELINE_MEASURES):
            notes.append(f"Differences are paired over seeds, against {baseline}.")
        bad = self.known[self.known["status"] != "done"]
        labels = run_labels(self.known, [*self.settings, "seed"])[bad.index]
        notes += [
            f"{status}: {label}: {_reason(error)}"
            for label, status, error in zip(labels, bad["status"], bad["reason"], strict=True)
        ][:REASONS_SHOWN]
        if len(bad) > REASONS_SHOWN:
            notes.append(f"{len(bad) - REASONS_SHOWN} more runs without results are in failures.")
        return tuple(notes)


STOPPED_NOTE = (
    "Runs that stopped at a loss or a budget are not ranked by final losses and by sums over all "
    "rounds."
)


def _n(runs: int, done: int, failed: int, missing: int) -> str:
    if done == runs:
        return str(runs)
    bad = [f"{count} {name}" for count, name in ((failed, "failed"), (missing, "missing")) if count]
    return f"{done} of {runs}: {', '.join(bad)}"


def _cell(
    value: ValueSpec,
    explains: bool,
    text: str,
    deviation: float,
    count: int,
    done: int,
    failed: int,
    times: str,
    rounds: Any,
) -> str:
    if not done:
        return "failed" if failed else "missing"
    if not count:
        return f"— (not reached in {rounds} rounds)" if explains else "—"
    if value.aggregate == "mean_sd" and count > 1:
        text += f" ± {value.text(deviation).lstrip('+')}"
    if count < done:
        text += f" [{count} of {done}]"
    return text + times


def _times(found: pd.DataFrame, done: pd.Series) -> pd.Series:
    """Write speed-ups, with their number of seeds where a row or its baseline has others."""
    all_seeds = found[["of_baseline"]].assign(own=done).max(axis=1) == found["n"]
    return pd.Series(
        [
            "" if pd.isna(times) else f" ({times:.1f}x{'' if whole else f', n={n:.0f}'})"
            for times, n, whole in zip(found["speedup"], found["n"], all_seeds, strict=True)
        ],
        index=found.index,
    )


def _which_seeds(blocks: pd.Series, rows: pd.Series, common: pd.Series) -> str:
    """Say over how many seeds the rows of a table are compared that have not all the same."""
    unequal = ~common.groupby(blocks).transform("all")
    blocks, rows, common = blocks[unequal], rows[unequal], common[unequal]
    sizes = common.groupby(rows).sum().groupby(blocks.groupby(rows).first()).first()
    shared = sorted({int(size) for size in sizes if size})
    if not shared:
        return "The rows have no seed in common: none is marked as the best."
    n = " or ".join(map(str, shared))
    alone = " Rows without a common seed are not compared." if (sizes == 0).any() else ""
    return f"Bold is the best over the seeds that all rows compared have: n = {n}.{alone}"


def _best(value: ValueSpec, statistic: pd.Series, block: pd.Series) -> pd.Series:
    """Mark the best of each block, and all that print the same, unless all rows do.

    Parameters
    ----------
    value : ValueSpec
    statistic : pandas.Series
        Each row's, over the seeds that all rows of its block have; missing where a value is.
    block : pandas.Series
        Which rows are compared.
    """
    if value.best is None:
        return pd.Series(False, index=statistic.index)
    text = statistic.map(value.text, na_action="ignore")
    best = statistic.groupby(block).transform(value.best)
    is_best = text == best.map({number: value.text(number) for number in best.dropna().unique()})
    return is_best & (text.groupby(block).transform("nunique") > 1)


def _pivot(
    part: pd.DataFrame, row_names: list[str], text: pd.DataFrame, labels: pd.Series
) -> pd.DataFrame:
    """Put the groups of `labels` side by side; `part` is the text itself or what is bold."""
    rows = pd.Series(map("|".join, text[row_names].to_numpy()), dtype=object)
    first = text[row_names][~rows.duplicated()].set_axis(rows[~rows.duplicated()])
    is_text = part is text
    sides = [first if is_text else pd.DataFrame(False, first.index, row_names)]
    for label in dict.fromkeys(labels):
        side = part[labels == label].drop(columns=row_names).set_axis(rows[labels == label])
        side.columns = pd.Index([f"{name}, {label}" for name in side])
        sides.append(side.reindex(first.index, fill_value="" if is_text else False))
    return pd.concat(sides, axis=1).reset_index(drop=True)


def _reason(error: Any) -> str:
    """Return the last line of an error: of a traceback, the exception itself."""
    lines = [] if pd.isna(error) else str(error).strip().splitlines()
    return lines[-1] if lines else "no reason was recorded"
