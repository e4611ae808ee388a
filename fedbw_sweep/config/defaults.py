"""Every default and every choice as ``conf/`` states them, read without Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import ConfigError

PACKAGE = "fedbw_sweep."

MANDATORY = "???"
"""Stands in a YAML file for a value that has no default."""

FORMER_CLASSES = {
    "server": {
        "fedavg": "flwr.serverapp.strategy.FedAvg",
        "fedavgm": "flwr.serverapp.strategy.FedAvgM",
        "fedadam": "flwr.serverapp.strategy.FedAdam",
    }
}
"""Classes outside the package that its choices named before; `is_own` takes them as today's."""


class _Loader(yaml.CSafeLoader):
    """Reads numbers as OmegaConf does: ``1e-3`` is one. OmegaConf itself takes 20 times as long."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one file of ``conf/`` as it stands, its ``defaults`` among its keys."""
    return dict(yaml.load(path.read_text(encoding="utf-8"), _Loader) or {})


@cache
def groups() -> dict[str, tuple[str, str]]:
    """Return the keys that a config group fills: key -> its folder in ``conf/``, default choice."""
    found = {}
    for entry in read_yaml(CONF / "config.yaml")["defaults"]:
        for group, choice in entry.items() if isinstance(entry, Mapping) else ():
            folder, _, key = group.partition("@")
            if choice is not None and not folder.startswith("override "):
                found[key or folder] = folder, choice
    return found


@cache
def top_level() -> dict[str, Any]:
    """Return the defaults of the keys that no config group fills."""
    values = read_yaml(CONF / "config.yaml")
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


@cache
def beside(key: str) -> dict[str, Any]:
    """Return the defaults that ``config.yaml`` adds to every choice of a group's."""
    return dict(top_level().get(key, {})) if key in groups() else {}


@cache
def offered(key: str) -> tuple[str, ...]:
    """Name the choices that the package offers for a key, such as ``downlink``."""
    return tuple(sorted(path.stem for path in (CONF / groups()[key][0]).glob("*.yaml")))


@cache
def choice(key: str, name: str) -> dict[str, Any] | None:
    """Return a choice's own values, inherited ones too; None if the package does not offer it."""
    if name not in offered(key):
        return None
    return beside(key) | _composed(CONF / groups()[key][0] / f"{name}.yaml")


def is_own(key: str, section: Mapping[str, Any]) -> bool:
    """Whether a section is a choice that the package offers, of the class that it offers for it.

    Where a class of the package lives does not matter: it goes by its own name.
    """
    name = section.get("name")
    own = choice(key, name) if isinstance(name, str) else None
    if own is None:
        return False
    target, today = section.get("_target_"), own.get("_target_")
    if target is None or target == today:
        return True
    if target == FORMER_CLASSES.get(groups()[key][0], {}).get(str(name)):
        return True
    parts = [str(target).rpartition("."), str(today).rpartition(".")]
    return parts[0][2] == parts[1][2] and all(f"{p[0]}.".startswith(PACKAGE) for p in parts)


def refuse_other_names(config: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """Refuse a choice that is called other than its file: tables would name what did not run.

    Parameters
    ----------
    config : mapping
        A composed config.
    chosen : mapping of str to str
        What was chosen for each key, which Hydra calls ``compression@downlink`` where its group has
        another name.

    Raises
    ------
    ConfigError
        Naming the key, its value and what it must be.
    """
    for key, (folder, _) in groups().items():
        stem = chosen.get(key, chosen.get(f"{folder}@{key}"))
        name = config[key].get("name") if key in config else None
        if stem is not None and name != stem:
            label = ", or model.label= for people to read beside it" if key == "model" else ""
            raise ConfigError(
                f"{key}.name",
                name,
                f"must be {stem}, the name of the file that is chosen; choose another with "
                f"{key}={label}",
            )


def _composed(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    own: dict[str, Any] = {}
    for base in [*values.pop("defaults", []), "_self_"]:
        own = _merged(
            own, values if base == "_self_" else _composed(path.with_name(f"{base}.yaml"))
        )
    return own


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Put `new` over `old` as Hydra does: mappings key by key, all else whole."""
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}


def with_defaults(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with today's defaults for the keys that it lacks.

    Those of a choice are filled in only where the package offers the choice: a class has defaults
    of its own, which need not be those of the choice.
    """
    filled = {**_absent(), **science}
    for key in groups().keys() & filled.keys():
        section = filled[key]
        if isinstance(section, Mapping) and is_own(key, section):
            offered = choice(key, section["name"]) or {}
            defaults = {
                name: value
                for name, value in offered.items()
                if name != "_target_" and value != MANDATORY
            }
            filled[key] = defaults | {
                name: float(value)  # a class's 4 is its 4.0; sections see to it
                if "_target_" in offered and type(value) is int and type(offered.get(name)) is float
                else value
                for name, value in section.items()
            }
    return filled


ADDED = "evaluate_every", "sampling", "stop_at_loss", "stop_at_mb"
"""Top-level keys that were added after format 2, so that records may lack them."""


@cache
def _absent() -> dict[str, Any]:
    return {
        key: {"name": groups()[key][1]} if key in groups() else top_level()[key] for key in ADDED
    }


def plain_defaults() -> dict[str, Any]:
    """Return the columns of the settings that records may lack, with their defaults."""
    own = {k: v["name"] if isinstance(v, Mapping) else v for k, v in _absent().items()}
    return own | {f"{key}.{name}": v for key in groups() for name, v in beside(key).items()}
