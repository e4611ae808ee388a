"""Runs that go into one folder: those that are not done yet are done, and all are tabulated."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
from rich.markup import escape

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.console import MB, duration, message_console, output_console
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import varying_settings
from fedbw_sweep.records.running import Heartbeat
from fedbw_sweep.records.write import RunRecord, is_done
from fedbw_sweep.report.measure import mean_curves
from fedbw_sweep.report.table import describe_bytes, summary_table
from fedbw_sweep.sweeps.loggers.base import logged
from fedbw_sweep.sweeps.progress import Bars

FIGURE = "loss_against_bytes.png"

COLLECT_SHARE = 0.02
"""The tables are rebuilt after a run unless that would take more than this share of the time."""


class Sweep:
    """The runs of a command.

    Parameters
    ----------
    configs : sequence of RunConfig
        The runs.
    folder : pathlib.Path
        Where their records go.

    Raises
    ------
    ConfigError
        If two of the runs are the same one.
    """

    def __init__(self, configs: Sequence[RunConfig], folder: Path) -> None:
        self.configs = [with_contents(config) for config in configs]
        self.folder = folder
        _refuse_equal(self.configs)
        self._varying = _varying(self.configs)
        self._console = message_console()
        self._bars = Bars(len(configs), self._console)
        self._collecting, self._collected_until = Lock(), 0.0  # on time.monotonic()'s clock

    def label(self, config: RunConfig) -> str:
        """Name a run by what varies in the sweep."""
        own = config_columns(config.science)
        names = self._varying or _varying([config])
        return " ".join(f"{name}={own[name]}" for name in names if not pd.isna(own.get(name)))

    def run(self) -> None:
        """Do the runs that are not done, which were checked.

        One run alone leaves cores idle at the end of each round, so there are several at a time, on
        one pool of workers, where the backend can.
        """
        todo = [config for config in self.configs if not is_done(config, self.folder)]
        if not todo:
            return
        at_a_time = backend_of(todo[0].backend).runs_at_a_time(todo)
        if at_a_time == 1:  # in this thread: some backends insist on the main one
            for config in todo:
                self.run_one(config)
            return
        with ThreadPoolExecutor(at_a_time) as threads:
            for run in [threads.submit(self.run_one, config) for config in todo]:
                run.result()

    def run_one(self, config: RunConfig) -> RunRecord:
        """Do one run, say how it went, and renew the tables."""
        # Imported here: torch loads while the backend starts.
        from fedbw_sweep.sweeps.run import execute

        label = self.label(config)
        with self._bars.run(label, config.rounds) as show, logged(config, self.folder) as log:
            beat = Heartbeat(config, self.folder)

            def observe(row: dict[str, Any]) -> None:
                for watcher in (show, beat, log):
                    watcher(row)

            record = execute(config, self.folder, observe)
        if record.status == "done":
            first, last = record.rounds[0], record.summary
            outcome = (
                f"loss {first['loss']:.3f} -> {last['loss']:.3f}, "
                f"uplink {last['uplink_bytes'] / MB:.2f} MB"
            )
        else:
            outcome = f"[red]failed[/red]: {escape(str(record.error).strip().splitlines()[-1])}"
        seconds = math.fsum(row["round_seconds"] for row in record.timing)
        self._console.print(f"{label}: {outcome} ({duration(seconds)})")
        self._renew_tables()
        return record

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rebuild the folder's ``results.csv`` and ``rounds.csv``; return the sweep's own rows."""
        results, rounds = collect(self.folder)
        own = [config.run_id for config in self.configs]
        return results[results["run_id"].isin(own)], rounds[rounds["run_id"].isin(own)]

    def show(self) -> int:
        """Print the sweep's table, draw its figure and return the exit code: 1 if a run failed."""
        # Imported here: matplotlib is needed only now.
        from fedbw_sweep.report.figure import loss_against_bytes

        results, rounds = self.tables()
        output = output_console()
        output.print(summary_table(results))
        for line in describe_bytes(results):
            output.print(line, soft_wrap=True)
        made = ["results.csv", "rounds.csv"]
        if (results["status"] == "done").any():
            loss_against_bytes(mean_curves(results, rounds), self.folder / FIGURE)
            made.append(FIGURE)
        self._console.print(f"{self.folder}/: {', '.join(made)} and a folder per run")
        failed = results[results["status"] != "done"]
        for _, row in failed.iterrows():
            reason = escape(str(row["reason"]).strip())
            self._console.print(f"[red]{row['status']}[/red] {row['run_id']}: {reason}")
        return int(len(failed) > 0)

    def _renew_tables(self) -> None:
        """Rebuild the folder's tables, unless they have just been: `show` does it in any case."""
        with self._collecting:
            started = time.monotonic()
            if started >= self._collected_until:
                collect(self.folder)
                took = time.monotonic() - started
                self._collected_until = time.monotonic() + took * (1 / COLLECT_SHARE - 1)


def _varying(configs: Sequence[RunConfig]) -> list[str]:
    """Return the settings that tell runs apart."""
    return varying_settings(
        pd.DataFrame([config_columns(c.science) for c in configs], dtype=object)
    )


def _refuse_equal(configs: Sequence[RunConfig]) -> None:
    """Refuse a grid of which two points are the same run."""
    first: dict[str, RunConfig] = {}
    for config in configs:
        other = first.setdefault(config.run_id, config)
        if other is config:
            continue
        keys = [
            key for key in sorted(EXECUTION_KEYS) if getattr(config, key) != getattr(other, key)
        ]
        if not keys:
            raise ConfigError("run", config.run_id, "two points of the grid are this same run")
        names = [getattr(getattr(c, keys[0]), "name", getattr(c, keys[0])) for c in (other, config)]
        raise ConfigError(
            keys[0],
            ",".join(map(str, names)),
            "makes no difference to results: two points of the grid are the same run; give "
            f"{' and '.join(keys)} one value",
        )
