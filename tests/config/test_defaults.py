"""The defaults stand still: a run's id is made of what differs from them.

``python -m tests.config.test_defaults`` notes new keys and choices in ``defaults.yaml``, and
changed ones once `NUMERICS` has a line for the change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedbw_sweep.config.defaults import choice, groups, offered, read_yaml, top_level
from fedbw_sweep.config.identity import NUMERICS, optional
from fedbw_sweep.config.run import EXECUTION_KEYS
from fedbw_sweep.config.section import CONF

TABLE = Path(__file__).with_name("defaults.yaml")

HOW = (
    "add a line to NUMERICS in config/identity.py that touches the runs which get the new default, "
    "then: python -m tests.config.test_defaults"
)


def flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "architecture":
            yield from flat(f"{prefix}{key}.", value)
        elif key not in ("name", "_target_"):
            yield f"{prefix}{key}", value


def stated() -> dict[str, Any]:
    """Every default that a run's id leaves out, by key: ``compression/topk.density``."""
    found = dict(flat("", {k: v for k, v in top_level().items() if k not in EXECUTION_KEYS}))
    for key, (folder, name) in groups().items():
        if key in EXECUTION_KEYS:
            continue
        found[key] = name
        for each in offered(key):
            own = optional(key) | (choice(key, each) or {})
            found |= flat(f"{folder}/{each}.", own)
    return dict(sorted(found.items()))


def recorded() -> dict[str, Any]:
    return read_yaml(TABLE)


def same(old: Any, new: Any) -> bool:
    return json.dumps(old) == json.dumps(new)


def test_a_default_changes_only_with_a_line_in_numerics() -> None:
    table, now = recorded(), stated()
    del table["numerics"]
    changed = [f"{k}: {v} -> {now.get(k)}" for k, v in table.items() if not same(v, now.get(k))]
    assert not changed, f"a default changed, and with it what runs of its id are; {HOW}: {changed}"
    new = now.keys() - table.keys()
    assert not new, f"note new keys: python -m tests.config.test_defaults: {sorted(new)}"


@pytest.mark.parametrize(
    "path",
    [CONF / "config.yaml", *sorted(CONF.glob("*/*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_files_are_read_as_omegaconf_reads_them(path: Path) -> None:
    read = read_yaml(path)
    assert repr(read) == repr(OmegaConf.to_container(OmegaConf.load(path)))


def note() -> None:
    table, now = recorded() if TABLE.exists() else {}, stated()
    latest = NUMERICS[-1].number
    changed = [key for key in table if key != "numerics" and not same(table[key], now.get(key))]
    if changed and table["numerics"] == latest:
        raise SystemExit(f"{', '.join(changed)}: {HOW}")
    lines = [f"{key}: {json.dumps(value)}" for key, value in {"numerics": latest, **now}.items()]
    TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    note()
