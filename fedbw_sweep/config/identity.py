"""What a run is called: the hash of what determines its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedbw_sweep.config.defaults import choice, groups, is_own, top_level
from fedbw_sweep.config.groups import DataConfig, ModelConfig

RECORD_FORMAT = 3
"""Version of the recorded files. A column or a file that is added later does not change it."""

Science = Mapping[str, Any]
"""A run's settings but for how it is executed, as plain values: what ``config.yaml`` holds."""


@dataclass(frozen=True)
class Change:
    """A change by design of the results of some runs.

    Attributes
    ----------
    number : int
        Its place in `NUMERICS`.
    what : str
        What changed.
    touches : callable
        Whether it changes the results of a run, by the run's settings.
    """

    number: int
    what: str
    touches: Callable[[Science], bool]


NUMERICS = (
    Change(2, "what runs recorded in format 2 are", lambda science: True),
    Change(
        3,
        "the loss is computed without its logits where a model's head is a linear layer; decoding "
        "is the same on every processor (lowrank, ecsq, lowrank_ecsq, eden, sketch); the server's "
        "step is made in float64; FedAdam is the paper's Algorithm 2",
        lambda science: True,
    ),
)
"""Every change by design of results. A default in ``conf/`` changes only with a line here.

The number of the last one that touches a run enters its id, so that the repair of one method leaves
the ids of all other runs alone.
"""

PLACES = {"data": "path", "model": "name_or_path"}
"""Where a run's text and model lie. A place is a label where the content is known."""

OPTIONAL = {
    group: {
        key: field.default
        for key, field in section.model_fields.items()
        if not field.is_required() and key != "target"
    }
    for group, section in (("data", DataConfig), ("model", ModelConfig))
}
"""Defaults of the keys that a choice's file need not have."""


def numerics_of(science: Science) -> int:
    """Return the number of the last change by design that touches a run's settings."""
    return max(change.number for change in NUMERICS if change.touches(science))


def run_id_of(science: Science, numerics: int) -> str:
    """Name a run: twelve hexadecimal digits of a hash of what determines its results.

    These are the choices by name, the values that differ from the defaults, the content of what is
    read from disk in place of its path, and `numerics`. Where a class of the package lives, and a
    key that stands at its default, do not enter; a class that the package does not offer for a
    choice enters by its dotted name.

    Parameters
    ----------
    science : mapping
        The run's settings. A key that is not there counts as its default.
    numerics : int
        See `numerics_of`.
    """
    entered = {}
    for key, value in science.items():
        if key in groups():
            own = _own_settings(key, value)
        elif isinstance(value, Mapping):
            own = _differing(value, top_level().get(key, {}))
        else:
            own = _differing({key: value}, top_level()).get(key, _NOTHING)
        if own not in ({}, _NOTHING):
            entered[key] = own
    text = json.dumps([RECORD_FORMAT, numerics, entered], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_NOTHING = object()


def _own_settings(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a group's section enters."""
    known = is_own(key, section)
    offered = choice(key, section["name"]) if known else None
    defaults = {**OPTIONAL.get(key, {}), **(offered or {}), "name": groups()[key][1]}
    left_out = {"_target_"} if known else set()
    if section.get("content") is not None:
        left_out.add(PLACES[key])
    values = {name: value for name, value in section.items() if name not in left_out}
    if key == "data" and "path" in left_out and section["name"] == "text":
        values["path"] = PurePath(section["path"]).suffix.lower()  # says how the text is read
    return _differing(values, defaults)


def _differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: _canonical(value) for name, value in values.items()}
    return {
        name: value
        for name, value in plain.items()
        if name not in defaults or json.dumps(value) != json.dumps(_canonical(defaults[name]))
    }


def _canonical(value: Any) -> Any:
    """Spell a value in one way: 1 is 1.0, and a mapping's keys are sorted."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(value[name]) for name in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def config_columns(science: Science) -> dict[str, Any]:
    """Flatten a run's settings to dotted columns; a group's own name stands under the group.

    ``{"data": {"name": "text", "alpha": 1.0}}`` gives the columns ``data`` and ``data.alpha``.
    """
    columns: dict[str, Any] = {}
    for key, value in science.items():
        if not isinstance(value, Mapping):
            columns[key] = value
            continue
        known = key in groups() and is_own(key, value)
        for inner, inner_value in value.items():
            if inner == "_target_" and known:
                continue
            name = key if inner == "name" else f"{key}.{inner}"
            is_plain = inner_value is None or isinstance(inner_value, str | int | float | bool)
            columns[name] = inner_value if is_plain else json.dumps(inner_value, sort_keys=True)
    return columns
