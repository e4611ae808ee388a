"""Keys that had other names in earlier versions: accepted in overrides, configs and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedbw_sweep.errors import ConfigError

KEYS = {
    "compression.rescale": "compression.norm_correction",
    "downlink.rescale": "downlink.norm_correction",
    "server.server_learning_rate": "server.lr",
    "server.server_momentum": "server.momentum",
    "server.eta": "server.lr",
}
"""Dotted keys: old name -> today's."""

GROUPS = {"way": "preset"}
"""Config groups: old name -> today's."""


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
        renamed.append(key[: len(key) - len(bare)] + today + equals + value)
    return renamed, notes


def rename_settings(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded config with today's names.

    Raises
    ------
    ConfigError
        If a key stands there by its old and by its new name.
    """
    sections = {key: dict(v) if isinstance(v, Mapping) else v for key, v in science.items()}
    for old, new in KEYS.items():
        group, _, name = old.partition(".")
        section = sections.get(group)
        if not isinstance(section, dict) or name not in section:
            continue
        if (today := new.partition(".")[2]) in section:
            raise ConfigError(old, section[name], f"is now called {new}, which is given as well")
        sections[group] = {today if k == name else k: v for k, v in section.items()}
    return sections


def rename_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return today's name of each setting among a table's columns that had another."""
    return {name: KEYS[name] for name in columns if name in KEYS}
