"""What is best: configurations compared over the seeds that all of them have."""

from __future__ import annotations

import pandas as pd


def of_common_seeds(groups: pd.Series, members: pd.Series, seeds: pd.Series) -> pd.Series:
    """Say which finished runs have a seed that all configurations of their group have.

    Parameters
    ----------
    groups, members, seeds : pandas.Series
        Of each finished run: what is compared with one another, its configuration there, its seed.

    Returns
    -------
    pandas.Series of bool
        Indexed as they are. All are False in a group without a common seed.
    """
    runs = pd.DataFrame({"group": groups, "member": members.astype(object), "seed": seeds})
    there = runs.groupby("group")["member"].transform("nunique")
    return runs.groupby(["group", "seed"])["member"].transform("nunique") == there


def statistic_of(values: pd.Series, members: pd.Series, how: str) -> pd.Series:
    """Aggregate each configuration's values; nothing where one of them is missing.

    Parameters
    ----------
    values, members : pandas.Series
        Of each run that is compared: what was measured, and its configuration.
    how : str
        A pandas aggregate: mean, median, min or max.

    Returns
    -------
    pandas.Series
        Indexed by configuration.
    """
    grouped = values.groupby(members)
    return grouped.agg(how).astype("float64").where(grouped.count() == grouped.size())


def speedups(
    values: pd.Series, members: pd.Series, seeds: pd.Series, reference: pd.Series, how: str
) -> pd.DataFrame:
    """Say how many times less each configuration takes than its reference, over common seeds.

    Parameters
    ----------
    values, members, seeds : pandas.Series
        Of each finished run: what was measured, its configuration and its seed.
    reference : pandas.Series
        The configuration that each one is compared with, indexed by configuration.
    how : str
        A pandas aggregate: mean, median, min or max.

    Returns
    -------
    pandas.DataFrame
        Indexed by configuration: ``speedup``, missing where one of the values is, and ``n``, the
        common seeds.
    """
    runs = pd.DataFrame({"value": values.astype("Float64"), "member": members, "seed": seeds})
    own = runs.assign(reference=members.map(reference).astype("Float64"))
    base = runs.rename(columns={"value": "base", "member": "reference"})
    pairs = own.merge(base.astype({"reference": "Float64"}), "inner", ["reference", "seed"])
    own_value, base_value = (
        statistic_of(pairs[name], pairs["member"], how) for name in ("value", "base")
    )
    times = base_value / own_value.where(own_value > 0)
    return pd.DataFrame({"speedup": times, "n": pairs.groupby("member").size()})
