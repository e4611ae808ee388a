"""``python -m fedbw_sweep.verify RUN``: do a recorded run again and compare every number."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import ConfigError, FedbwError, ResultsError
from fedbw_sweep.records.schema import CONFIG, MESSAGES, PARTS, ROUNDS
from fedbw_sweep.records.write import read_status

SHOWN = 20
"""Differences printed, at most."""


@dataclass(frozen=True)
class Verification:
    """What doing a run again found.

    Attributes
    ----------
    compared : int
        Numbers and hashes compared.
    differences : list of str
        Where they differ: place, recorded value, new value.
    environment : list of str
        Versions and hardware that differ.
    """

    compared: int
    differences: list[str]
    environment: list[str]


def recorded_config(run: Path, execution: Sequence[str] = ()) -> RunConfig:
    """Read a run's own ``config.yaml``; how it is executed comes from today's defaults.

    Parameters
    ----------
    run : pathlib.Path
        A run folder.
    execution : sequence of str
        Overrides of execution keys, such as ``backend.workers=1``.

    Raises
    ------
    ResultsError
        If the folder is not a finished run, or its config is not the one its name was made of.
    ConfigError
        If an override is of anything but execution.
    """
    try:
        status = read_status(run)
        science = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ResultsError(f"{run} is not a run folder: {error}") from None
    if status is None or status["status"] != "done":
        raise ResultsError(f"{run} holds no finished run; give a folder outputs/<sweep>/<run_id>")
    for override in execution:
        key = override.partition("=")[0]
        if key.split(".")[0].lstrip("+") not in EXECUTION_KEYS:
            raise ConfigError(key, override.partition("=")[2], "only execution can be overridden: "
                              + ", ".join(sorted(EXECUTION_KEYS)))  # fmt: skip
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            own = OmegaConf.to_container(compose("config", list(execution)), resolve=True)
    except HydraException as error:
        raise ConfigError(" ".join(execution), "", str(error).splitlines()[0]) from None
    assert isinstance(own, dict)
    config = RunConfig.from_dict({**science, **{key: own[key] for key in EXECUTION_KEYS}})
    if config.run_id != status["run_id"]:
        raise ResultsError(
            f"{run / CONFIG} is not what {status['run_id']} was made of (it makes "
            f"{config.run_id}): it was changed, or another version means something else by it"
        )
    return config


def verify(
    run: Path,
    execution: Sequence[str] = (),
    observe: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Verification:
    """Do a recorded run again in a temporary folder and compare.

    Compared are every value of ``rounds.csv``, every row of ``messages.parquet`` and of
    ``parts.csv`` if it was recorded, and the summary, the hash of the final model among it: to the
    last digit. Arguments and errors are those of
    `recorded_config`; `observe` is called with each round's row.
    """
    config = recorded_config(run, execution)
    from fedbw_sweep.sweep.run import (
        execute,  # torch, Ray and Flower, only once there is work for them
    )

    recorded = _tables(run)
    with TemporaryDirectory(prefix="fedbw_sweep-") as folder:
        execute(config, Path(folder), observe)
        again = Path(folder) / config.run_id
        differences: list[str] = []
        compared = 0
        for name, table in _tables(again).items():
            if name in recorded:
                compared += _compare_tables(name, recorded[name], table, differences)
        old, new = (json.loads((f / "status.json").read_text("utf-8")) for f in (run, again))
    if new["error"]:
        differences.append(f"the run failed this time: {new['error'].strip().splitlines()[-1]}")
    compared += _compare("summary", old["summary"], new["summary"], differences)
    environment: list[str] = []
    _compare("", _versions(old), _versions(new), environment)
    return Verification(compared, differences, environment)


def _tables(run: Path) -> dict[str, pd.DataFrame]:
    """Read a run's tables by their files' names; ``parts.csv`` may be missing.

    Raises
    ------
    ResultsError
        If another one is missing or one is damaged.
    """
    tables = {}
    for name, read in ((ROUNDS, pd.read_csv), (MESSAGES, pd.read_parquet), (PARTS, pd.read_csv)):
        if name == PARTS and not (run / PARTS).exists():
            continue
        try:
            tables[name] = read(run / name)
        except (OSError, ValueError) as error:
            raise ResultsError(f"{run / name} cannot be read: {error}") from None
    return tables


def _compare_tables(name: str, old: pd.DataFrame, new: pd.DataFrame, differences: list[str]) -> int:
    if list(old) != list(new) or len(old) != len(new):
        differences.append(f"{name}: {len(old)} rows of {list(old)}, now {len(new)} of {list(new)}")
        return 0
    keys = [key for key in ("round", "client", "direction", "tensor", "part") if key in old]
    for column in old:
        same = (old[column] == new[column]) | (old[column].isna() & new[column].isna())
        for row in old.index[~same]:
            where = ", ".join(f"{key} {old[key][row]}" for key in keys)
            differences.append(f"{name}, {where}: {column} {old[column][row]}, now "
                               f"{new[column][row]}")  # fmt: skip
    return int(old.size)


def _compare(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], differences: list[str]
) -> int:
    names = dict.fromkeys([*old, *new])
    for key in names:
        if old.get(key) != new.get(key):
            where = f"{name}: {key}" if name else key
            differences.append(f"{where} {old.get(key)}, now {new.get(key)}")
    return len(names)


def _versions(status: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in status["environment"].items() if key != "execution"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if anything differs, 2 if the run cannot be done again."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.verify",
        description="Do a recorded run again from its own config.yaml and compare every byte "
        "count, every loss and the model's hash.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="its folder: outputs/<sweep>/<run_id>"
    )
    parser.add_argument(
        "execution", nargs="*", metavar="KEY=VALUE", help="how to execute it: backend.workers=1"
    )
    given = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with console.status(f"doing {given.run} again") as shown:
            found = verify(
                given.run,
                given.execution,
                lambda row: shown.update(f"round {row['round']}: loss {row['loss']:.3f}"),
            )
    except FedbwError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2
    for difference in found.differences[:SHOWN]:
        console.print(f"[red]differs:[/red] {escape(difference)}")
    if len(found.differences) > SHOWN:
        console.print(f"and {len(found.differences) - SHOWN} more")
    for difference in found.environment:
        console.print(f"[yellow]another environment:[/yellow] {escape(difference)}")
    if found.differences:
        why = "; versions or hardware differ, see above" if found.environment else ""
        print(f"{given.run}: {len(found.differences)} of {found.compared} values differ{why}")
        return 1
    print(f"{given.run}: reproduced; {found.compared} values are equal, the model's hash too")
    return 0


if __name__ == "__main__":
    sys.exit(main())
