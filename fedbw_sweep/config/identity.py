"""What a run is called: the hash of what determines its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 2
"""Version of the recorded files and of what a run means; part of every ``run_id``."""


def science_id(science: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits: a hash of a run's science config and the schema version."""
    text = json.dumps([SCHEMA_VERSION, science], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_columns(science: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a science config to dotted columns; a group's own name stands under the group.

    ``{"data": {"name": "text", "alpha": 1.0}}`` gives the columns ``data`` and ``data.alpha``.
    """
    columns: dict[str, Any] = {}
    for key, value in science.items():
        if not isinstance(value, Mapping):
            columns[key] = value
            continue
        for inner, inner_value in value.items():
            if inner == "_target_":
                continue
            name = key if inner == "name" else f"{key}.{inner}"
            is_plain = inner_value is None or isinstance(inner_value, str | int | float | bool)
            columns[name] = inner_value if is_plain else json.dumps(inner_value, sort_keys=True)
    return columns
