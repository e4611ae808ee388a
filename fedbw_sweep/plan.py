"""``python -m fedbw_sweep.plan OVERRIDES``: what a sweep will send, without training."""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from rich.markup import escape
from rich.table import Table

from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import (
    Fitted,
    byte_unit,
    duration,
    errors_end_the_command,
    in_all_units,
    in_unit,
    output_console,
    today,
    units_in_words,
)
from fedbw_sweep.cost.network import describe, expected_round_seconds
from fedbw_sweep.cost.prediction import EXACT, MEASURED_OF, Prediction, oversized, predict
from fedbw_sweep.model.layout_cache import find_layout
from fedbw_sweep.sweeps.grid import runs_of

FORMULAS_SHOWN = 12
WAYS = "uplink", "downlink", "total"
OUTPUTS = Path("outputs")
UPDATE_DEPENDS_ON = ("compression", "model", "trainable", "optimizer", "upload")
"""Keys of the runs whose recorded updates say how large an update will be."""


@dataclass(frozen=True)
class PlannedRun:
    """One planned run.

    Attributes
    ----------
    overrides : mapping of str to str
        What the command line gives it.
    config : RunConfig
    prediction : Prediction or None
        None where nothing is known of the method's size.
    warnings : list of str
        What of the run sends more than it need.
    """

    overrides: Mapping[str, str]
    config: RunConfig
    prediction: Prediction | None
    warnings: list[str]

    @property
    def round_seconds(self) -> float | None:
        """Seconds of communication in a round with the configured network."""
        if self.prediction is None:
            return None
        return expected_round_seconds(
            self.config.network,
            self.prediction.mean_model_bytes,
            self.prediction.update_bytes,
            self.config.clients_per_round,
        )


def plan(overrides: Sequence[str], config_dir: Path | None = None) -> Iterator[PlannedRun]:
    """Predict every run that the command line names.

    Parameters
    ----------
    overrides : sequence of str
        As of ``python -m fedbw_sweep -m``.
    config_dir : pathlib.Path, optional
        A folder with further choices.

    Raises
    ------
    ConfigError
        If an override is not allowed.
    """
    for lines, config in runs_of(overrides, config_dir):
        given = dict(line.split("=", 1) for line in lines if "=" in line)
        yield PlannedRun(given, config, *_predict(config, OUTPUTS / config.sweep))


def formula(config: RunConfig, prediction: Prediction) -> str:
    """Write the bandwidth formula with a run's numbers filled in."""
    sampled = config.fraction_fit * config.num_clients
    clients = f"{config.num_clients:,} x {config.fraction_fit:g}"
    if sampled != config.clients_per_round:
        clients = f"{config.clients_per_round:,} of {config.num_clients:,}"
    down, up = prediction.mean_model_bytes, prediction.update_bytes
    about = "" if prediction.basis == EXACT else "about "
    differ = "on average " if not config.downlink.codes_weights else ""
    text = f"({differ}{down:,} B + {about}{up:,} B) x {clients} x {config.rounds}"
    if frozen := sum(prediction.frozen_bytes):
        text += f" + {frozen:,} B that are frozen, once to each client"
    if lost := sum(prediction.sent) - sum(prediction.received):
        text += f" - {lost:,} x {about}{up:,} B that drop out"
    return f"{text} = {about}{in_all_units(prediction.total_bytes)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    gc.disable()  # a short-lived process: collecting takes a tenth of its time
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.plan",
        description="Predict what a sweep will send and how long that takes, without training.",
        epilog="Overrides are those of python -m fedbw_sweep; commas sweep, with or without -m.",
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="may be given, as there")
    parser.add_argument(
        "-cd", "--config-dir", type=Path, help="a folder with further choices, as there"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args(arguments)
    with errors_end_the_command():
        _show(list(plan(today(given.overrides), given.config_dir)))
    return 0


def _predict(config: RunConfig, outputs: Path) -> tuple[Prediction | None, list[str]]:
    """Predict from shapes alone; an estimate from recorded runs of the method where there are."""
    fixed = config.compression.build().fixed_size
    recorded = None if fixed else recorded_update(config, outputs)
    layout, frozen = find_layout(config)
    return predict(config, layout, frozen, recorded), oversized(config, layout, frozen)


def recorded_update(config: RunConfig, sweep_dir: Path) -> tuple[int, str] | None:
    """Look for finished runs of the same method and model in a sweep's ``results.csv``.

    Returns
    -------
    payload_bytes : int
        Of one update, in the mean.
    basis : str
        Where that is from.
    """
    settings = config_columns(
        {key: value for key, value in config.science.items() if key in UPDATE_DEPENDS_ON}
    )
    known = {key: "" if value is None else str(value) for key, value in settings.items()}
    sizes = [
        int(row["uplink_bytes"]) * int(row["dense_message_bytes"]) / int(row["dense_uplink_bytes"])
        for row in _results((sweep_dir / "results.csv").resolve())
        if row["status"] == "done"
        and int(row["dense_uplink_bytes"] or 0)
        and all(row.get(key) == value for key, value in known.items())
    ]
    if not sizes:
        return None
    runs = "1 run" if len(sizes) == 1 else f"{len(sizes)} runs"
    return round(fmean(sizes)), f"{runs} of this method recorded in {sweep_dir}"


@cache
def _results(path: Path) -> list[dict[str, str]]:
    with suppress(FileNotFoundError), path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
    return []


def _show(runs: list[PlannedRun]) -> None:
    output = output_console()
    predicted = [run.prediction for run in runs if run.prediction is not None]
    units = {
        way: byte_unit([getattr(each, f"{way}_bytes") for each in predicted], "MB") for way in WAYS
    }
    table = Table(
        title=f"Predicted payload ({units_in_words(units.values())})", title_justify="left"
    )
    swept = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.overrides)
        if len({run.overrides.get(key) for run in runs}) > 1
    ]
    for name in swept:
        table.add_column(name)
    sizes = [f"{way} {unit}" for way, unit in units.items()]
    for name in (*sizes, "s/round", "in all", "basis"):
        table.add_column(name, justify="left" if name == "basis" else "right")
    for run in runs:
        table.add_row(
            *(escape(run.overrides.get(name, "")) for name in swept), *_numbers(run, units)
        )
    output.print(Fitted(table))
    output.print("bandwidth = (model sent + update received) x clients x fraction x rounds")
    output.print("the clients' training text itself: - (it is not loaded here; results.csv has it)")
    if any(run.config.may_stop for run in runs):
        output.print("at most: stop_at_loss and stop_at_mb may end a run before its last round")
    for run in runs[:FORMULAS_SHOWN]:
        label = ", ".join(
            f"{name}={run.overrides[name]}" for name in swept if name in run.overrides
        )
        if run.prediction is not None:
            text = f"{label}: " if label else "= "
            output.print(escape(text + formula(run.config, run.prediction)), soft_wrap=True)
    if len(runs) > FORMULAS_SHOWN:
        output.print(f"and {len(runs) - FORMULAS_SHOWN} more")
    for warning in dict.fromkeys(warning for run in runs for warning in run.warnings):
        output.print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)
    for network in dict.fromkeys(run.config.network for run in runs):
        output.print(escape(describe(network)), soft_wrap=True)


def _why_unknown(config: RunConfig) -> str:
    if not config.sampler().known:
        return (
            f"unknown: sampling={config.sampling.name} goes by the clients' text, not loaded here"
        )
    if config.trainable.name not in MEASURED_OF:
        return f"unknown: none measured of trainable={config.trainable.name}; run it once"
    return "unknown: run it once, or give the method expected_bytes"


def _numbers(run: PlannedRun, units: Mapping[str, str]) -> tuple[str, ...]:
    predicted, seconds = run.prediction, run.round_seconds
    if predicted is None or seconds is None:
        return *["-"] * 5, _why_unknown(run.config)
    return (
        *(in_unit(getattr(predicted, f"{way}_bytes"), unit) for way, unit in units.items()),
        f"{seconds:,.2f}",
        duration(seconds * run.config.rounds),
        escape(predicted.basis),
    )


if __name__ == "__main__":
    sys.exit(main())
