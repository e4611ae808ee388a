"""How runs are named by what varies between them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fedbw_sweep.records.schema import AXES, RESULTS_COLUMNS, SETS_APART

TASK = "model", "data", "sequence_length"
"""Settings with whose parameters a held-out loss is another measure: it has no common scale."""


def task_settings(settings: list[str]) -> list[str]:
    """Return those of `settings` that runs must share for their losses to be comparable."""
    return [name for name in settings if name.partition(".")[0] in TASK]


def varying_settings(results: pd.DataFrame) -> list[str]:
    """Name the configuration columns that tell runs apart, `compression` always first.

    A choice's own parameter counts only where it differs between runs of the same choice:
    ``compression.density`` when top-k runs with several densities, not when there is one.
    """
    own = {*RESULTS_COLUMNS, "source"} - {*SETS_APART}
    settings = [name for name in results.columns if name not in own]

    def differs(name: str) -> bool:
        if results[name].nunique() < 2:
            return False
        group = name.partition(".")[0]
        is_choice = name != group and group in results.columns
        alike = results.groupby(group)[name] if is_choice else results[name]
        return bool(np.max(alike.nunique(dropna=False)) > 1)

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
