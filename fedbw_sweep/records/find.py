"""Where runs are recorded in the folders that a user names, and their settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedbw_sweep.config.defaults import MANDATORY, choice, groups, plain_defaults, with_defaults
from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.errors import ConfigError, DamagedError, ResultsError
from fedbw_sweep.records.folder import Run, is_run, left_alone, runs_in
from fedbw_sweep.records.schema import AXES, CONFIG, RESULTS, RESULTS_AND_SOURCE, STATUS


class Configs(Mapping[str, Mapping[str, Any]]):
    """Each run's ``config.yaml``, read when asked for: parsing 10,000 takes seconds."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs = runs

    def __getitem__(self, run_id: str) -> Mapping[str, Any]:
        return self._runs[run_id].science()

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)


def find_records(paths: Iterable[str | Path], notes: list[str]) -> tuple[list[Path], list[Path]]:
    """Return the run folders and the tables of results in `paths`, each once.

    Raises
    ------
    ResultsError
        If a path does not exist or holds neither.
    """
    folders: dict[Path, Path] = {}
    tables: dict[Path, Path] = {}
    others: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ResultsError(f"{path} does not exist; give run folders, sweep folders or CSVs")
        if not path.is_dir():
            tables[path.resolve()] = path
            continue
        whole, before = path.resolve(), len(folders) + len(tables)
        if is_run(whole):
            folders[whole] = whole if path.is_symlink() else path
            continue
        for root, names, files in os.walk(whole):
            here = Path(root)
            inner = path / here.relative_to(whole)
            if RESULTS in files and not (here / RESULTS).is_symlink():
                tables[here / RESULTS] = inner / RESULTS
            runs, other = runs_in(here, names)
            folders |= {run: inner / run.name for run in runs}
            others += [inner / each.name for each in other]
            names[:] = sorted(
                name
                for name in set(names) - {each.name for each in (*runs, *other)}
                if not name.startswith(".")
            )
        if len(folders) + len(tables) == before and not any(
            found.is_relative_to(whole) for found in (*folders, *tables)
        ):
            said = "; ".join(["", *left_alone(others)])
            raise ResultsError(
                f"{path} holds no run: no {STATUS} and no {RESULTS} in or below it{said}"
            )
    notes += left_alone(others)
    return list(folders.values()), list(tables.values())


def read_settings(
    runs: pd.Series[str], tables: Iterable[pd.DataFrame], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, dict[str, Exception]]:
    """Return the settings of `runs`, a row for each, and why those of some are unknown.

    A ``run_id`` is a hash of them, so that any CSV will do; without one, the run's folder.
    """
    beside = [name for name in RESULTS_AND_SOURCE if name != "run_id"]
    own = [_whole(table.drop(columns=beside).set_index("run_id")) for table in tables]
    _refuse_contradictions(own)
    read: dict[str, dict[str, Any]] = {}
    unknown: dict[str, Exception] = {}
    for run in runs[~runs.isin({run for table in own for run in table.index})]:
        try:
            read[run] = columns_of(configs[run])
        except (ResultsError, OSError) as error:
            unknown[run] = error
    own.append(pd.DataFrame(list(read.values()), index=list(read), dtype=object))
    known = pd.concat(own)
    known = known[~known.index.duplicated()].reindex(runs)
    for name, default in plain_defaults().items():
        known[name] = (
            known.get(name, pd.Series(index=known.index, dtype=object))
            .astype(object)
            .where(lambda c: c.notna(), default)
        )
    names = [*AXES, "seed", *sorted(set(map(str, known)) - {*AXES, "seed"})]
    nothing = pd.Series(index=known.index, dtype=object)
    typed = {name: _typed(known.get(name, nothing)) for name in names}
    return pd.DataFrame(typed).reset_index(drop=True), unknown


def columns_of(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a recorded config, whatever it is a mapping of.

    Raises
    ------
    DamagedError
        If its settings are none.
    """
    try:
        return config_columns(with_defaults(rename_settings(science)))
    except (ConfigError, TypeError, LookupError, AttributeError, ValueError) as error:
        raise DamagedError(f"its {CONFIG} is damaged: {error}") from None


def _whole(settings: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that a table lacks of its choices' parameters, at their defaults.

    An empty cell of a column that is there is a parameter that is null or that the choice lacks.
    """
    added: dict[str, pd.Series] = {}
    for group in groups().keys() & set(settings):
        foreign = settings.get(f"{group}._target_", pd.Series(pd.NA, settings.index)).notna()
        for name in settings[group].dropna().unique():
            columns = config_columns({group: choice(group, name) or {"name": name}})
            own = (settings[group] == name).fillna(False) & ~foreign
            for column, default in columns.items():
                if column not in settings and default not in (None, MANDATORY):
                    empty = pd.Series(pd.NA, settings.index, dtype=object)
                    added[column] = added.get(column, empty).mask(own, default)
    return settings.assign(**added)


def _refuse_contradictions(settings: Sequence[pd.DataFrame]) -> None:
    """Refuse tables that say different settings of one run, whose ``run_id`` is their hash.

    Raises
    ------
    ResultsError
        Naming the run and the setting.
    """
    known = pd.concat([pd.DataFrame(), *settings])
    again = known[known.index.duplicated(keep=False)]
    kinds = again.groupby(level=0).nunique().gt(1)
    for name in kinds.columns[kinds.any(axis=0)]:
        run = str(kinds.index[kinds[name]][0])
        values = ", ".join(map(str, again[name][again.index == run].dropna().unique()))
        raise ResultsError(f"run {run} has {name} {values} in different tables: one was changed")


def _typed(values: pd.Series) -> pd.Series:
    """Give a setting's column the type all its values have in common."""
    if values.dtype != object:
        return values
    kinds = {type(value) for value in values.dropna()}
    for allowed, dtype in (({int}, "Int64"), ({int, float}, "Float64"), ({bool}, "boolean")):
        if kinds and kinds <= allowed:
            return values.astype(pd.api.types.pandas_dtype(dtype))
    return values.astype("string")
