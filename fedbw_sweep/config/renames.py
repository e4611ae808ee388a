"""Keys that had other names in earlier versions: accepted in overrides, configs and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedbw_sweep.config.defaults import choice, is_own, offered
from fedbw_sweep.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

KEYS = {
    "compression.rescale": "compression.norm_correction",
    "downlink.rescale": "downlink.norm_correction",
    "server.server_learning_rate": "server.lr",
    "server.server_momentum": "server.momentum",
    "server.eta": "server.lr",
    "hydra.run.dir": "hydra.sweep.dir",
}
"""Dotted keys: old name -> today's."""

GROUPS = {"way": "preset"}
"""Config groups: old name -> today's."""

CHOICES = {"experiment": {"seed": "lesson"}}
"""Choices of a config group: old name -> today's."""

_INSIDE = {
    old: (*old.split("."), new.partition(".")[2])
    for old, new in KEYS.items()
    if not old.startswith("hydra.")
}
"""Old key of a run -> its group, its old name there, and today's."""


def rename_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Spell overrides of a command line with today's names.

    Parameters
    ----------
    overrides : sequence of str
        As typed: ``key=value``, with or without ``+``, ``++`` or ``~`` before it.

    Returns
    -------
    renamed : list of str
        The overrides with today's names.
    notes : list of str
        A line for each old name.
    """
    renamed, notes = [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        bare = key.lstrip("+~")
        today = (KEYS | GROUPS).get(bare, bare)
        if today != bare:
            notes.append(f"{bare} is now called {today}")
        choices = value.split(",")
        for old, new in CHOICES.get(bare, {}).items():
            if old in choices:
                notes.append(f"{bare}={old} is now called {bare}={new}")
                choices = [new if choice == old else choice for choice in choices]
        renamed.append(key[: len(key) - len(bare)] + today + equals + ",".join(choices))
    return renamed, notes


def rename_settings(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config with today's names.

    A class of the user's own keeps the names of its parameters, whatever they are.

    Raises
    ------
    ConfigError
        If a key stands there by its old and by its new name. A new one at its default does not
        count: Hydra puts it beside an old one that a file of the user's own sets.
    """
    renamed = dict(science)
    for old, (group, name, today) in _INSIDE.items():
        section = renamed.get(group)
        if not isinstance(section, Mapping) or name not in section or not is_own(group, section):
            continue
        offered = choice(group, section["name"]) or {}
        if today not in offered:
            continue
        value = section[name]
        if section.get(today, value) not in (offered[today], value):
            raise ConfigError(old, value, f"is now called {KEYS[old]}, which is given as well")
        renamed[group] = {k: v for k, v in section.items() if k != name} | {today: value}
    return renamed


def rename_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of results with today's names of the settings.

    Several old columns may become one, of which each row has the value that its choice had.

    Parameters
    ----------
    table : pandas.DataFrame
        A row per run, with the columns of `config_columns` among others.
    """
    for old, (group, _, today) in _INSIDE.items():
        if old not in table or group not in table:
            continue
        having = [name for name in offered(group) if today in (choice(group, name) or {})]
        moved = table[group].isin(having) & table[old].notna()
        new, values = KEYS[old], table[old]
        table[new] = table[new].mask(moved, values) if new in table else values.where(moved)
        table[old] = values.mask(moved)
        if table[old].isna().all():
            table = table.drop(columns=old)
    return table
