"""``python -m fedbw_sweep.verify RUN``: do a recorded run again and compare every number."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.markup import escape

from fedbw_sweep.config.foreign import refuse_foreign
from fedbw_sweep.config.identity import PLACES, run_id_of
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.console import errors_end_the_command, message_console, printable
from fedbw_sweep.errors import ConfigError, ResultsError
from fedbw_sweep.records.compare import OF_PREDICTION, Tolerance
from fedbw_sweep.records.folder import Run, check_run, read_run
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.schema import (
    CONFIG,
    FORMAT_2,
    MACHINE,
    MESSAGES,
    METRICS,
    OF_STATUS,
    PARTS,
    RESULTS,
    RESULTS_COLUMNS,
    ROUNDS,
)
from fedbw_sweep.records.status import read_status
from fedbw_sweep.records.tables import parse_messages
from fedbw_sweep.report.command import sections_from_columns

SHOWN = 20
"""Differences printed, at most."""

MOVABLE = {f"{section}.{key}": section for section, key in PLACES.items()}
"""Keys of places, which say nothing of what is there."""


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
    why : str or None
        Why last digits may differ, as some do; None if all must be equal, or are.
    loss_difference : float
        The largest relative difference of a held-out loss.
    not_recorded : tuple of str
        Files that the record lacks, so that they were not compared.
    """

    compared: int
    differences: list[str]
    environment: list[str]
    why: str | None
    loss_difference: float
    not_recorded: tuple[str, ...]


def recorded_config(
    run: Path,
    execution: Sequence[str] = (),
    *,
    trust: bool = False,
    config_dir: Path | None = None,
) -> RunConfig:
    """Read a run's own ``config.yaml``; how it is executed comes from today's defaults.

    Parameters
    ----------
    run : pathlib.Path
        A run folder.
    execution : sequence of str
        Overrides of execution keys, such as ``backend.workers=1``, and of where what the run reads
        lies today: ``data.path=``, ``model.name_or_path=``.
    trust : bool
        Whether what the record names beside the package's own choices is run.
    config_dir : pathlib.Path, optional
        A folder of further choices that are the user's own, as the sweep's.

    Raises
    ------
    ResultsError
        If the folder is not a finished run or is damaged, its config is not the one its name was
        made of, or it names what only a user who trusts it may run.
    ConfigError
        If an override is of anything else, or what the run reads is not what it was.
    """
    status, science = _recorded(run)
    if status is None or status["status"] != "done":
        raise ResultsError(f"{run} holds no finished run; give a folder outputs/<sweep>/<run_id>")
    if status["schema_version"] == FORMAT_2:
        raise ResultsError(f"{run} is of format 2: python tools/migrate.py {run.parent} first")
    places = [line for line in execution if line.partition("=")[0] in MOVABLE]
    execution = [line for line in execution if line not in places]
    for override in execution:
        key = override.partition("=")[0]
        if key.split(".")[0].lstrip("+") not in EXECUTION_KEYS:
            raise ConfigError(key, override.partition("=")[2], "only execution can be overridden: "
                              + ", ".join([*sorted(EXECUTION_KEYS), *MOVABLE]))  # fmt: skip
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            own = OmegaConf.to_container(compose("config", list(execution)), resolve=True)
    except HydraException as error:
        raise ConfigError(" ".join(execution), "", str(error).splitlines()[0]) from None
    assert isinstance(own, dict)
    if not trust:
        refuse_foreign(run, science, config_dir)
    config = RunConfig.from_dict({**science, **{key: own[key] for key in EXECUTION_KEYS}})
    run_id = run_id_of(config.science, status["numerics"])
    if run_id != status["run_id"]:
        raise ResultsError(
            f"{run / CONFIG} is not what {status['run_id']} was made of (it makes "
            f"{run_id}): it was changed, or another version means something else by it"
        )
    for place in places:
        key, _, value = place.partition("=")
        moved = getattr(config, MOVABLE[key]).model_copy(update={key.partition(".")[2]: value})
        config = config.model_copy(update={MOVABLE[key]: moved})
    return with_contents(config)


def _recorded(run: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the status and the config of a run: of its folder, or of the table in the one above.

    Raises
    ------
    ResultsError
        If neither is there.
    """
    table = run.parent / RESULTS
    if not run.is_dir() and table.is_file():
        rows = load_records(table, messages=False).results
        rows = rows[rows["run_id"] == run.name].drop(columns="source")
        if len(rows) == 1:
            sections = sections_from_columns(rows).items()
            science = {key: values[place] for key, ([place], values) in sections}
            row = rows.iloc[0]
            summary = {k: row[k] for k in METRICS if not pd.isna(row[k])}
            own = {key: row[key] for key in OF_STATUS}
            own["numerics"] = int(own["numerics"])
            return {**own, "summary": summary, "environment": {}}, science
    run = run.resolve()
    try:
        status = check_run(run, whole=False)
        return status, Run(run, status).science()
    except FileNotFoundError as error:
        raise ResultsError(f"{run} is not a run folder: {error}") from None


def verify(
    run: Path,
    execution: Sequence[str] = (),
    observe: Callable[[dict[str, Any]], None] = lambda row: None,
    *,
    trust: bool = False,
    config_dir: Path | None = None,
) -> Verification:
    """Do a recorded run again in a temporary folder and compare.

    Compared are every value of ``rounds.csv``, every row of ``messages.parquet`` and of
    ``parts.csv`` if it was recorded, and the summary, the hash of the final model among it: to the
    last digit, or, if the run was recorded at other `numerics` or on another processor or device,
    within `Tolerance`. Of a run known only from a ``results.csv`` the summary and the rounds beside
    it are compared. Arguments and errors are those of `recorded_config`; `observe` is called with
    each round's row.
    """
    config = recorded_config(run, execution, trust=trust, config_dir=config_dir)
    from fedbw_sweep.sweeps.run import (
        execute,  # torch, Ray and Flower, only once there is work for them
    )

    recorded = _tables(run)
    with TemporaryDirectory(prefix="fedbw_sweep-") as folder:
        execute(config, Path(folder), observe)
        again = Path(folder) / config.run_id
        old, new = _recorded(run)[0], read_status(again)
        assert old is not None
        assert new is not None
        tables = _tables(again)
    why = _why_tolerant(old, new)
    compared, differences = _differences(old, new, recorded, tables, Tolerance())
    if not differences:
        why = None
    if why:
        parts = config.compression, config.downlink
        fixed_size = all(part.build().fixed_size for part in parts)
        renumbered = old["numerics"] != new["numerics"]
        allowed = Tolerance.of(fixed_size=fixed_size, renumbered=renumbered)
        compared, differences = _differences(old, new, recorded, tables, allowed)
    environment: list[str] = []
    if old.get("environment"):
        _compare("", _versions(old), _versions(new), environment)
    before, after = (of[ROUNDS].set_index("round")["loss"] for of in (recorded, tables))
    apart = float(((after - before).abs() / before.abs()).max()) if len(before) else 0.0
    lacking = tuple(name for name in tables if name not in recorded)
    return Verification(compared, differences, environment, why, apart, lacking)


def _differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    recorded: Mapping[str, pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
    tolerance: Tolerance,
) -> tuple[int, list[str]]:
    """Count what is compared of two records and list what differs.

    Bytes that may differ are not compared part by part: a small part may differ more.
    """
    differences: list[str] = []
    if new["status"] == "failed":
        differences.append(f"the run failed this time: {new['reason'].strip().splitlines()[-1]}")
    before = old.get("summary") or {}
    later = {name for name, column in RESULTS_COLUMNS.items() if not column.required}
    later -= before.keys()  # columns that were added after the run was recorded
    summary = {key: value for key, value in new["summary"].items() if key not in later}
    compared = _compare("summary", before, summary, differences, tolerance)
    for name in [name for name in tables if name in recorded]:
        if not (tolerance.bytes and name == PARTS):
            compared += _compare_tables(
                name, recorded[name], tables[name], differences, tolerance.of_rounds
            )
    return compared, differences


def _why_tolerant(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Say why last digits may differ between two records."""
    if old["numerics"] != new["numerics"]:
        return f"recorded at numerics {old['numerics']}, done again at {new['numerics']}"
    for key in MACHINE:
        if old.get(key) is None or pd.isna(old[key]):
            return f"it is not known what {key} it was recorded on"
        if old[key] != new[key]:
            return f"recorded on another {key}: {old[key]}, done again on {new[key]}"
    return None


def _tables(run: Path) -> dict[str, pd.DataFrame]:
    """Read a run's tables by their files' names; ``parts.csv`` may be missing.

    Raises
    ------
    ResultsError
        If another one is missing or one is damaged.
    """
    if not run.is_dir():
        rounds = load_records(run.parent / RESULTS, messages=False).rounds
        own = rounds[rounds["run_id"] == run.name].drop(columns="run_id")
        return {ROUNDS: own.reset_index(drop=True)}
    read = read_run(run.resolve(), [ROUNDS, MESSAGES, PARTS])
    if read.damage:
        raise ResultsError(read.damage)
    readers: dict[str, Callable[[Any], pd.DataFrame]] = {
        ROUNDS: pd.read_csv, MESSAGES: pd.read_parquet, PARTS: pd.read_csv
    }  # fmt: skip
    tables = {}
    for name, parse in readers.items():
        if name == PARTS and name not in read.files:
            continue
        try:
            if name == MESSAGES:
                parse_messages(run / name, read.files[name])  # it is within limits
            tables[name] = parse(BytesIO(read.files[name]))
        except KeyError:
            raise ResultsError(f"{run / name} is missing") from None
        except (OSError, ValueError) as error:
            raise ResultsError(f"{run / name} cannot be read: {error}") from None
    return tables


def _compare_tables(
    name: str, old: pd.DataFrame, new: pd.DataFrame, differences: list[str], tolerance: Tolerance
) -> int:
    if set(old) - set(new) or len(old) != len(new):  # later versions add columns
        differences.append(f"{name}: {len(old)} rows of {list(old)}, now {len(new)} of {list(new)}")
        return 0
    keys = [key for key in ("round", "client", "direction", "tensor", "part") if key in old]
    names = [str(name) for name in old if name not in OF_PREDICTION]
    for column in names:
        pairs = zip(old[column], new[column], strict=True)
        differ = [tolerance.differ(column, before, after) for before, after in pairs]
        for row in old.index[differ]:
            where = ", ".join(f"{key} {old[key][row]}" for key in keys)
            differences.append(f"{name}, {where}: {column} {old[column][row]}, now "
                               f"{new[column][row]}")  # fmt: skip
    return len(old) * len(names)


def _compare(
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    differences: list[str],
    tolerance: Tolerance | None = None,
) -> int:
    names = dict.fromkeys(key for key in [*old, *new] if key not in OF_PREDICTION)
    if name:  # later versions add columns
        names = {key: None for key in names if key in old}
    for key in names:
        if (tolerance or Tolerance()).differ(key, old.get(key), new.get(key)):
            where = f"{name}: {key}" if name else key
            differences.append(f"{where} {old.get(key)}, now {new.get(key)}")
    return len(names)


def _versions(status: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in status["environment"].items() if key != "execution"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if anything differs, exit with 2 if nothing can be done."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.verify",
        description="Do a recorded run again from its own config.yaml and compare every byte "
        "count, every loss and the model's hash.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="its folder: outputs/<sweep>/<run_id>, or FOLDER/<run_id> for a run that only "
        "FOLDER/results.csv has",
    )
    parser.add_argument(
        "execution", nargs="*", metavar="KEY=VALUE", help="how to execute it: backend.workers=1"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run what the record names that is not the package's: it can do all that you can",
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder with your own choices, which may be run"
    )
    given = parser.parse_args(arguments)
    with errors_end_the_command(), message_console().status(f"doing {given.run} again") as shown:
        found = verify(
            given.run,
            given.execution,
            lambda row: shown.update(f"round {row['round']}: loss {row['loss']:.3f}"),
            trust=given.trust,
            config_dir=given.config_dir,
        )
    return _show(given.run, found)


def _show(run: Path, found: Verification) -> int:
    """Print what was found; return 1 if anything differs."""
    console = message_console()
    for difference in found.differences[:SHOWN]:
        console.print(f"[red]differs:[/red] {escape(printable(difference))}")
    if len(found.differences) > SHOWN:
        console.print(f"and {len(found.differences) - SHOWN} more")
    for difference in found.environment:
        console.print(f"[yellow]another environment:[/yellow] {escape(printable(difference))}")
    if found.differences:
        why = "; versions or hardware differ, see above" if found.environment else ""
        print(f"{run}: {len(found.differences)} of {found.compared} values differ{why}")
        return 1
    lacking = " and ".join(found.not_recorded)
    lacking = f" (its {lacking} are not recorded and not compared)" if lacking else ""
    if found.why:
        print(
            f"{run}: reproduced within tolerance (largest relative difference of a loss: "
            f"{found.loss_difference:.1e}); {found.compared} values are compared; {found.why}"
            f"{lacking}"
        )
        return 0
    print(
        f"{run}: reproduced exactly; {found.compared} values are equal, the model's hash too"
        f"{lacking}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
