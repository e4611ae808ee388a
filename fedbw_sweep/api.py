"""Runs and sweeps from Python: what the command does, as often as wanted in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import today
from fedbw_sweep.errors import ConfigError, FedbwError
from fedbw_sweep.records.read import load_records
from fedbw_sweep.sweeps.grid import runs_of
from fedbw_sweep.sweeps.preflight import prepare
from fedbw_sweep.sweeps.sweep import Sweep


class RunError(FedbwError):
    """A run failed, and its record has the whole reason; or a record could not be written."""


@dataclass(frozen=True)
class Outcome:
    """What runs have left.

    Attributes
    ----------
    results : pandas.DataFrame
        A row per run: its settings, then what was measured (``docs/columns.md``), typed.
    rounds : pandas.DataFrame
        A row per run and round.
    folder : pathlib.Path
        Where the runs' records are.
    """

    results: pd.DataFrame
    rounds: pd.DataFrame
    folder: Path


def run(
    overrides: Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    config_dir: str | Path | None = None,
) -> Outcome:
    """Do one run, unless it is recorded as done.

    Parameters
    ----------
    overrides : sequence of str
        As of ``python -m fedbw_sweep``: ``["model=tiny", "compression=topk"]``.
    folder : str or pathlib.Path, optional
        Where the record goes; ``outputs/<sweep>`` unless given.
    config_dir : str or pathlib.Path, optional
        A folder with further choices.

    Returns
    -------
    Outcome
        With one row of results.

    Raises
    ------
    ConfigError
        If an override is not allowed, or names more than one run.
    RunError
        If the run fails.
    """
    configs = _configs(overrides, config_dir)
    if len(configs) > 1:
        raise ConfigError("overrides", " ".join(overrides), f"name {len(configs)} runs; use sweep")
    outcome = _do(configs, folder)
    [row] = outcome.results.to_dict("records")
    if row["status"] != "done":
        raise RunError(f"{row['run_id']}: {row['reason']}")
    return outcome


def sweep(
    overrides: Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    config_dir: str | Path | None = None,
) -> Outcome:
    """Do every combination of the values given, but for runs that are recorded as done.

    Parameters
    ----------
    overrides, folder, config_dir
        As of `run`; values with commas between them are swept.

    Returns
    -------
    Outcome
        A run that failed has its reason in ``results``.

    Raises
    ------
    ConfigError
        If an override is not allowed; then no run has started.
    """
    return _do(_configs(overrides, config_dir), folder)


def _configs(overrides: Sequence[str], config_dir: str | Path | None) -> list[RunConfig]:
    further = Path(config_dir) if config_dir is not None else None
    return [config for _, config in runs_of(today(overrides), further)]


def _do(configs: Sequence[RunConfig], folder: str | Path | None) -> Outcome:
    place = Path(folder) if folder is not None else Path("outputs", configs[0].sweep)
    runs = Sweep(configs, place)
    prepare(runs.configs, place, "folder", here=True)
    runs.run()
    if runs.lost:
        raise RunError("; ".join(runs.lost))
    runs.tables()
    records = load_records([place / config.run_id for config in runs.configs])
    return Outcome(records.results, records.rounds, place)
