"""Tables described in YAML: which settings make rows and columns, which measures fill them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import Field, ValidationError, field_validator

from fedbw_sweep.config.section import Section
from fedbw_sweep.cost.network import describe
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.labels import run_labels, setting_labels
from fedbw_sweep.records.schema import RESULTS_COLUMNS, STATES, Column
from fedbw_sweep.report.measure import (
    BASELINE_MEASURES,
    BUDGET_MEASURES,
    MEASURES,
    TARGET_MEASURES,
    TIME_MEASURES,
    Options,
    is_baseline,
    settings_of,
    shared_settings,
)
from fedbw_sweep.report.render import Rendered

BUILT_IN = Path(__file__).parent / "tables"

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
"""Units of bytes; any other unit is only written in the header."""

NUMBERS = {
    name: column
    for name, column in {**RESULTS_COLUMNS, **MEASURES, **TIME_MEASURES}.items()
    if column.dtype in {"Int64", "Float64"} and name not in {"schema_version", "numerics"}
}
"""What a table can show."""

TABLE_COLUMNS: Mapping[str, Column] = {
    "runs": Column("int64", "runs of this row: one per seed"),
    "done": Column("int64", "of which finished"),
    "failed": Column("int64", "of which failed"),
    "missing": Column("int64", "of which nothing was recorded"),
    "<measure>": Column("float64", "the mean (or what the table's aggregate says) over seeds"),
    "<measure>_sd": Column("float64", "standard deviation over seeds, ddof 1; empty for one"),
    "<measure>_n": Column("int64", "seeds that have a value"),
    "<measure>_speedup": Column("float64", "the baseline's value over this row's"),
}
"""Columns of ``tables/<name>.csv`` after the settings; a measure is a column of results.csv."""

REASONS_SHOWN = 5


class ValueSpec(Section):
    """One measure of a table."""

    value: str = Field(description="a numeric column of results.csv or a measure of the report")
    header: str
    unit: str | None = None
    aggregate: Literal["mean", "mean_sd", "median", "min", "max"] = "mean"
    format: str = Field(default=".2f", description="a Python format of a number, e.g. .3f")
    best: Literal["min", "max"] | None = None
    speedup: bool = Field(default=False, description="show in parentheses how often less it is")

    @field_validator("value")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in NUMBERS:
            raise ValueError(f"no such measure; there are {', '.join(NUMBERS)}")
        return name

    @field_validator("format")
    @classmethod
    def _is_a_format(cls, text: str) -> str:
        format(1.0, text)
        return text

    @cached_property
    def scale(self) -> int:
        """What one unit is of what is recorded."""
        return UNITS.get(self.unit or "", 1)

    @property
    def title(self) -> str:
        """The header with its unit."""
        return f"{self.header} ({self.unit})" if self.unit else self.header

    def text(self, value: float) -> str:
        """Write a number in the table's unit."""
        return format(value / self.scale, self.format)


class TableSpec(Section):
    """A table: a row for each combination of `rows`, aggregated over seeds and nothing else.

    Settings that vary and are named in neither `rows` nor `columns` become further rows, on the
    left; the best value is looked for among rows that agree in them.
    """

    title: str
    rows: list[str] = Field(min_length=1)
    columns: list[str] = Field(default=[])
    measures: list[ValueSpec] = Field(min_length=1)


def load_spec(path: Path) -> TableSpec:
    """Read a table's description.

    Raises
    ------
    ConfigError
        If the file cannot be read or says something that is not allowed.
    """
    try:
        return TableSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--spec", path, f"cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "table"
        raise ConfigError(f"{path}: {key}", first["input"], first["msg"]) from None


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
        values = [v for v in spec.measures if v.value not in BASELINE_MEASURES or self.has_baseline]
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
        best = pd.DataFrame(False, index=text.index, columns=text.columns)
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
            speedup = pd.Series(float("nan"), index=data.index)
            if value.speedup and self.has_baseline:
                speedup = self._speedup(configurations, statistic.where(count == data["done"]))
                data[f"{value.value}_speedup"] = speedup
            title = value.title if value.title not in text else f"{value.title}, {value.value}"
            shown = statistic.map(value.text, na_action="ignore")
            numbers = (shown, deviation, count, data["done"], data["failed"], speedup, rounds)
            explains = value is first_target
            text[title] = [_cell(value, explains, *row) for row in zip(*numbers, strict=True)]
            best[title] = _best(value, statistic.where(count == data["runs"]), shown, block)
        notes = self._notes(values)
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
        frame = pd.DataFrame(
            {
                "run": bad["run_id"],
                "settings": run_labels(bad, [*self.settings, "seed"]),
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

    def _speedup(self, configurations: pd.DataFrame, statistic: pd.Series) -> pd.Series:
        baseline = self.options.baseline
        shared = [name for name in shared_settings(self.known, baseline) if name in configurations]
        is_own = is_baseline(configurations, baseline) & statistic.notna()
        own = configurations.assign(_baseline=statistic)[is_own]
        if not shared:
            alone = own["_baseline"].iloc[0] if len(own) else None
            reference = pd.Series(alone, configurations.index)
        else:
            merged = configurations.merge(own[[*shared, "_baseline"]], "left", shared)
            reference = merged["_baseline"].set_axis(configurations.index)
        return reference.astype("float64") / statistic.where(statistic > 0)

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
        labels = run_labels(bad, [*self.settings, "seed"])
        notes += [
            f"{status}: {label}: {_reason(error)}"
            for label, status, error in zip(labels, bad["status"], bad["reason"], strict=True)
        ][:REASONS_SHOWN]
        if len(bad) > REASONS_SHOWN:
            notes.append(f"{len(bad) - REASONS_SHOWN} more runs without results are in failures.")
        return tuple(notes)


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
    speedup: float,
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
    return text if pd.isna(speedup) else f"{text} ({speedup:.1f}x)"


def _best(value: ValueSpec, statistic: pd.Series, text: pd.Series, block: pd.Series) -> pd.Series:
    """Mark the best of each block, and all that print the same, unless all rows do.

    Rows that lack a seed do not compete: a mean over fewer seeds is no fair comparison.
    """
    if value.best is None:
        return pd.Series(False, index=text.index)
    text = text.where(statistic.notna())
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
