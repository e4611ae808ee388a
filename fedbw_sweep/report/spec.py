"""Tables described in YAML: which settings make rows and columns, which measures fill them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import pandas as pd
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fedbw_sweep.config.section import Section
from fedbw_sweep.console import BYTE_UNITS, byte_unit
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.schema import RESULTS_COLUMNS, Column
from fedbw_sweep.report.measure import MEASURES, TIME_MEASURES

BUILT_IN = Path(__file__).parent / "tables"

TIME_UNITS: Mapping[str, float] = {"s": 1, "min": 60, "h": 3600}

SPEED_UNITS: Mapping[str, float] = {"kbit/s": 1e-3, "Mbit/s": 1, "Gbit/s": 1e3}

WHOLE_MODEL = "whole_model_ratio"
"""A measure that tables show where it is not ``uplink_ratio``: where not all of a model travels."""

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
    "<measure>_speedup": Column(
        "float64", "the baseline's value over this row's, both over the seeds that both have"
    ),
}
"""Columns of ``tables/<name>.csv`` after the settings; a measure is a column of results.csv."""


class ValueSpec(Section):
    """One measure of a table."""

    value: str = Field(description="a numeric column of results.csv or a measure of the report")
    header: str
    unit: str | None = Field(
        default=None,
        description="of bytes the largest unit that is used: a smaller one is where values need it",
    )
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

    @model_validator(mode="after")
    def _has_a_unit_of_its_kind(self) -> Self:
        all_units = {*BYTE_UNITS, *TIME_UNITS, *SPEED_UNITS}
        if self.unit is None or (not self.units and self.unit not in all_units):
            return self
        if self.unit not in self.units:
            allowed = f"in {', '.join(self.units)}" if self.units else "no unit of bytes or time"
            raise ValueError(f"unit {self.unit}: {self.value} has {allowed}")
        return self

    @property
    def units(self) -> Mapping[str, float]:
        """The units that the measure can be shown in, and what each is of what is recorded.

        Of a measure that has none, a unit is only written in the header.
        """
        if self.value == "bits_per_byte":
            return {}
        kinds = {"bytes": BYTE_UNITS, "seconds": TIME_UNITS, "mbit_s": SPEED_UNITS}
        return next((units for kind, units in kinds.items() if kind in self.value), {})

    @property
    def title(self) -> str:
        """The header with its unit."""
        return f"{self.header} ({self.unit})" if self.unit else self.header

    def fitted(self, shown: pd.Series) -> ValueSpec:
        """Return the measure in the unit in which all of `shown` but zeros have three digits."""
        if self.unit is None or self.units is not BYTE_UNITS:
            return self
        decimals = re.search(r"\.(\d+)f$", self.format)
        least = 10.0 ** (2 - int(decimals[1])) if decimals else 0.0
        unit = byte_unit(shown.dropna(), self.unit, least)
        if unit == self.unit:
            return self
        grouped = self.format if "," in self.format else f",{self.format}"  # numbers grow long
        return self.model_copy(update={"unit": unit, "format": grouped})

    def text(self, value: float) -> str:
        """Write a number in the measure's unit; a whole number of bytes has no decimals."""
        if self.unit == "B" and value == int(value):
            return f"{value:,.0f}"
        return format(value / self.units.get(self.unit or "", 1), self.format)


class TableSpec(Section):
    """A table: a row for each combination of `rows`, aggregated over seeds and nothing else.

    Settings that vary and are named in neither `rows` nor `columns` become further rows, on the
    left; the best value is looked for among rows that agree in them.
    """

    title: str
    rows: list[str] = Field(min_length=1)
    columns: list[str] = Field(default=[])
    measures: list[ValueSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        kinds = {
            "rows and columns": [*self.rows, *self.columns],
            "measures": [measure.value for measure in self.measures],
        }
        for kind, names in kinds.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{kind} name {twice[0]} twice; name it once")
        return self


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
        if first["type"] == "value_error":
            raise ConfigError("--spec", path, f"{key}: {first['ctx']['error']}") from None
        raise ConfigError(f"{path}: {key}", first["input"], first["msg"]) from None
