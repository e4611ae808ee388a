"""How runs are named by what varies between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from fedbw_sweep.records.schema import AXES, RESULTS_COLUMNS, SETS_APART

TASK = "model", "data", "sequence_length"
"""Settings with whose parameters a held-out loss is another measure: it has no common scale."""

NULL = "null"
"""Stands in labels for a setting that is null, as it does on the command line."""


def task_settings(settings: list[str]) -> list[str]:
    """Return those of `settings` that runs must share for their losses to be comparable."""
    return [name for name in settings if name.partition(".")[0] in TASK]


def varying_settings(results: pd.DataFrame) -> list[str]:
    """Name the configuration columns that tell runs apart, `compression` always first.

    Null is a value as any other. A choice's own parameter counts only where it differs between runs
    of the same choice: ``compression.density`` when top-k runs with several densities, not when
    there is one.
    """
    own = {*RESULTS_COLUMNS, "source"} - {*SETS_APART}
    settings = [name for name in results.columns if name not in own]
    known = results[results["compression"].notna()]  # of other runs no setting is known

    def differs(name: str) -> bool:
        values = known[name]
        null = values.isna() & ~_may_be_unknown(name)
        if values.nunique() + null.any() < 2:
            return False
        if (choice := _choice_of(name, known)) is None:
            return True
        return bool((values.groupby(choice).nunique() + null.groupby(choice).any()).max() > 1)

    ordered = [*AXES, *(name for name in settings if name not in AXES)]
    return [name for name in ordered if name == "compression" or differs(name)]


def mixed(results: pd.DataFrame) -> list[str]:
    """Say in which of `SETS_APART` runs differ: they are then told apart by it, as by a setting."""
    values = {name: sorted(results[name].dropna().unique()) for name in SETS_APART}
    return [
        f"the runs differ in {name} ({', '.join(map(str, values))}), which tells them apart"
        for name, values in values.items()
        if len(values) > 1
    ]


def setting_texts(results: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Write each setting as text.

    Parameters
    ----------
    results : pandas.DataFrame
        A row per run: all runs that are told apart, or the text may not tell them apart.
    settings : list of str
        Columns of `results`, e.g. of `varying_settings`.

    Returns
    -------
    pandas.DataFrame
        Indexed as `results`, a column for each setting. It is empty where a run's choice has no
        such parameter. Of a setting that holds others, as an architecture does, it has those that
        differ: ``num_hidden_layers=2``.
    """
    known = results.get("compression", pd.Series("", results.index)).notna()
    texts = {}
    for name in settings:
        values, choice = results[name], _choice_of(name, results)
        plain = {value: _plain(value) for value in values.dropna().unique()}
        if holds_settings(values):
            own = known.map(str) if choice is None else choice
            texts[name] = _leaf_texts(values, own)
            continue
        has = known if choice is None else values.notna().groupby(choice).transform("any")
        null = values.isna() & has.fillna(False).astype(bool) & ~_may_be_unknown(name)
        texts[name] = values.map(plain).astype(object).fillna("").mask(null, NULL)
    return pd.DataFrame(texts, index=results.index)


def setting_labels(results: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Write settings as text, a choice's own parameters beside its name: ``topk density=0.01``.

    Returns
    -------
    pandas.DataFrame
        As `setting_texts`, but a column only for each setting that is no parameter of another.
    """
    texts, labels = setting_texts(results, settings), dict[str, pd.Series]()
    for name in sorted(settings, key=lambda name: "." in name):
        group, _, parameter = name.partition(".")
        text = texts[name]
        if parameter and group in labels:
            said = " " if holds_settings(results[name]) else f" {parameter}="
            labels[group] = labels[group] + text.where(text == "", said + text)
        else:
            labels[name] = text
    ordered = dict.fromkeys(n if n in labels else n.partition(".")[0] for n in settings)
    return pd.DataFrame(labels, index=results.index)[list(ordered)]


def run_labels(results: pd.DataFrame, settings: list[str]) -> pd.Series:
    """Name each run by `settings` in one text: ``topk density=0.01, num_clients=4``.

    See `setting_texts` for what `results` must have.
    """
    labels = setting_labels(results, settings)
    parts = [
        text
        if name == "compression" or holds_settings(results[name])
        else (f"{name}=" + text).where(text != "", "")
        for name, text in labels.items()
    ]
    rows = zip(*parts, strict=True) if parts else [()] * len(results)
    whole = [", ".join(filter(None, row)) for row in rows]
    return pd.Series(whole, index=results.index, dtype=object)


def holds_settings(values: pd.Series) -> bool:
    """Whether a setting's values are mappings of others, which stand in columns as JSON."""
    return any(isinstance(value, str) and value.startswith("{") for value in values.unique())


def _leaf_texts(values: pd.Series, choice: pd.Series) -> pd.Series:
    """Write of each mapping what differs between the mappings of runs of the same choice."""
    texts: dict[tuple[Any, Any], str] = {}
    for own, column in values.groupby(choice):
        maps = {text: dict(_leaves(json.loads(text))) for text in column.dropna().unique()}
        names = dict.fromkeys(name for leaves in maps.values() for name in leaves)
        differ = [
            name
            for name in names
            if len({json.dumps(leaves.get(name, ...), default=str) for leaves in maps.values()}) > 1
        ]
        for text, leaves in maps.items():
            said = (f"{name}={_plain(leaves[name])}" for name in differ if name in leaves)
            texts[own, text] = " ".join(said)
    pairs = zip(choice, values, strict=True)
    return pd.Series([texts.get(pair, "") for pair in pairs], values.index, dtype=object)


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _choice_of(name: str, results: pd.DataFrame) -> pd.Series | None:
    """Return which choice each run made of the group that a setting is a parameter of."""
    group = name.partition(".")[0]
    return results[group] if name != group and group in results else None


def _may_be_unknown(name: str) -> bool:
    """Whether a record may lack a setting that is never null."""
    return name in SETS_APART or name.endswith(".content")


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list):
        return json.dumps(value)
    return NULL if value is None else str(value)
