"""How a run's configuration differs from the defaults, and the command that repeats the run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from fedbw_sweep.config.identity import optional
from fedbw_sweep.config.run import EXECUTION_KEYS
from fedbw_sweep.config.section import CONF

GROUPS = {
    "compression": "compression",
    "downlink": "compression@downlink",
    "optimizer": "optimizer",
    "server": "server",
    "model": "model",
    "trainable": "trainable",
    "sampling": "sampling",
    "data": "data",
}
"""Keys of a run's science that a config group fills, and what an override calls the group; each
names its choice in ``name``."""

ABSENT = "(absent)"
"""Stands in `changes` for a key that one of the two configurations does not have."""

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[A-Za-z_/][\w/.:-]*", re.IGNORECASE)
"""Strings that an override may hold without quotes and that stay strings."""


def changes(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare a run's science config with the defaults of its choices.

    Parameters
    ----------
    config : mapping
        A run's ``config.yaml``.

    Returns
    -------
    dict
        Dotted key -> (default, the run's value), without the seed. A group's own key stands for its
        choice: ``compression: ("none", "topk")``; its other keys are compared with that choice's
        own defaults. Values are compared with their types: ``2`` is not ``2.0``, nor is its run.
    """
    top = _defaults()
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in config.items():
        if key == "seed":
            continue
        if key not in GROUPS:
            old, new = (dict(_flat(key, side)) for side in (top.get(key, ABSENT), value))
        else:
            choice, default = value["name"], top[key]["name"]
            if choice != default:
                found[key] = (default, choice)
            old, new = _flat_choice(key, choice), dict(_flat(key, value))
        for name in old | new:
            if name.endswith(".content"):  # follows from what is read
                continue
            pair = old.get(name, ABSENT), new.get(name, ABSENT)
            if type(pair[0]) is not type(pair[1]) or repr(pair[0]) != repr(pair[1]):
                found[name] = pair
    return found


def overrides(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Write what `changes` found as Hydra overrides, quoted for a shell."""
    top = _defaults()
    known = _known(*(found[g][1] if g in found else top[g]["name"] for g in GROUPS))
    added = {key for key in found if "." in key and key not in known}
    return [
        shlex.quote(
            f"~{key}"
            if value == ABSENT
            else f"{'++' if key in added else ''}{GROUPS.get(key, key)}={_grammar(value)}"
        )
        for key, (_, value) in found.items()
    ]


def command(arguments: Iterable[str], seed: int | str) -> str:
    """Write the shell command that repeats a run, into a sweep folder of its own.

    In its old sweep the run counts as done and would be skipped.

    Parameters
    ----------
    arguments : iterable of str
        What `overrides` returns.
    seed : int or str
        The run's.
    """
    return " ".join(["python -m fedbw_sweep", *arguments, f"seed={seed}", "sweep=again"])


def sections_from_columns(results: pd.DataFrame) -> dict[str, tuple[list[int], list[Any]]]:
    """Undo `config_columns`, for runs of which only rows of results are at hand.

    Parameters
    ----------
    results : pandas.DataFrame
        Rows of ``results.csv``.

    Returns
    -------
    dict
        For each top-level key of a config, in their order: the place of each row's value in a list,
        and that list, which has each value once. Whether columns told all of a config is proven by
        the hash in its ``run_id``.
    """
    sections = {}
    for key, default in _defaults().items():
        columns = [name for name in results if name == key or str(name).startswith(f"{key}.")]
        if not columns:  # a key that was not there yet when the runs were recorded
            sections[key] = [0] * len(results), [_section(key, default, {})]
            continue
        places = results.groupby(columns, dropna=False, sort=False).ngroup()
        rows = results.loc[~places.duplicated(), columns].astype(object)
        plain_rows = rows.where(rows.notna(), None).to_dict("records")
        sections[key] = places.tolist(), [_section(key, default, row) for row in plain_rows]
    return sections


def _section(key: str, default: Any, row: Mapping[Any, Any]) -> Any:
    if key not in GROUPS:
        inside = isinstance(default, Mapping)
        return {inner: row.get(f"{key}.{inner}") for inner in default} if inside else row.get(key)
    choice = str(row.get(key))
    own = optional(key) | _choice(key, choice)
    told = {inner: read_setting(row.get(f"{key}.{inner}")) for inner in own}
    # What a row lacks counts as its default.
    return {k: own[k] if v is None else v for k, v in told.items()} | {"name": choice}


def plain(values: Any, prefix: str = "") -> dict[str, str]:
    """Write nested settings as dotted names with their values as text."""
    return {name.removeprefix("."): as_text(value) for name, value in _flat(prefix, values)}


def as_text(value: Any) -> str:
    """Write a setting's value as the configuration files do."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str) else json.dumps(value)


def read_setting(value: Any) -> Any:
    """Read a setting's cell in a table, where what is no plain value stands as JSON."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with suppress(ValueError, RecursionError):  # a text that only starts so
            return json.loads(value)
    return value


def _grammar(value: Any) -> str:
    """Spell a value so that Hydra reads the same value and type."""
    if isinstance(value, str):
        quoted = QuotedString(value.replace("${", "\\${"), Quote.single).with_quotes()
        return value if PLAIN.fullmatch(value) else quoted
    if isinstance(value, list):
        return f"[{','.join(map(_grammar, value))}]"
    if isinstance(value, Mapping):  # only an empty one: others are compared key by key
        return "{}"
    return json.dumps(value)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}", inner)


@cache
def _flat_choice(group: str, name: str) -> dict[str, Any]:
    return dict(_flat(group, optional(group) | _choice(group, name)))


@cache
def _known(*choices: str) -> set[str]:
    """Name the keys there are when the groups have these choices."""
    top = {key: value for key, value in _defaults().items() if key not in GROUPS}
    chosen = {group: _choice(group, name) for group, name in zip(GROUPS, choices, strict=True)}
    return {name for key, value in (top | chosen).items() for name, _ in _flat(key, value)}


def _defaults() -> dict[str, Any]:
    return _conf()[0]


@cache
def _conf() -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """Return the defaults of a run's science, and those of every choice by folder and name.

    All are composed at once, each choice under a key of its own: what composing costs is nearly
    the same for one and for all.
    """
    folders = sorted({group.partition("@")[0] for group in GROUPS.values()})
    choices = [(name, path.stem) for name in folders for path in (CONF / name).glob("*.yaml")]
    added = [f"+{folder}@_{place}={name}" for place, (folder, name) in enumerate(choices)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", added)
    values = OmegaConf.to_container(
        OmegaConf.masked_copy(composed, [str(k) for k in composed if k not in EXECUTION_KEYS])
    )
    assert isinstance(values, dict)
    own = {choice: _classless(values.pop(f"_{place}")) for place, choice in enumerate(choices)}
    return {str(key): _classless(value) for key, value in values.items()}, own


def _classless(section: Any) -> Any:
    """Leave out the class of a choice: records do not name those of the package."""
    if not isinstance(section, Mapping):
        return section
    return {name: value for name, value in section.items() if name != "_target_"}


def _choice(group: str, name: str) -> dict[str, Any]:
    """Return a choice's own defaults; only its name is known of a user's choice outside conf/."""
    return _conf()[1].get((GROUPS[group].partition("@")[0], name), {"name": name})
