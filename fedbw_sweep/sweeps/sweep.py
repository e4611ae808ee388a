"""Runs that go into one folder: those that are not done yet are done, and all are tabulated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.console import MB, duration, message_console, output_console, printable, size
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.checkpoint import Store
from fedbw_sweep.records.claims import claimed, claimed_by
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.running import Heartbeat
from fedbw_sweep.records.waiting import Writer
from fedbw_sweep.records.write import RunRecord, is_done
from fedbw_sweep.report.measure import mean_curves
from fedbw_sweep.report.table import describe_bytes, summary_table
from fedbw_sweep.sweeps.loggers.base import logged
from fedbw_sweep.sweeps.progress import Bars

if TYPE_CHECKING:  # it imports torch, which loads while the backend starts
    from fedbw_sweep.sweeps.trajectories import Kept

Watcher = Callable[[dict[str, Any]], None]

FIGURE = "loss_against_bytes.png"

COLLECT_SHARE = 0.02
"""The tables are rebuilt after a run unless that would take more than this share of the time."""


WAIT_S = 2.0
"""Seconds from one look at runs that another command does to the next."""


class Sweep:
    """The runs of a command.

    Parameters
    ----------
    configs : sequence of RunConfig
        The runs.
    folder : pathlib.Path
        Where their records go.

    Attributes
    ----------
    lost : list of str
        After `run`, a line for each run whose record could not be written.

    Raises
    ------
    ConfigError
        If two of the runs are the same one.
    """

    def __init__(self, configs: Sequence[RunConfig], folder: Path) -> None:
        self.configs = [with_contents(config) for config in configs]
        self.folder = folder
        _refuse_equal(self.configs)
        self._labels = _labels(self.configs)
        self._console = message_console()
        self._bars = Bars(len(configs), self._console)
        self._writer = Writer(folder, self._say, self.configs[0].records.retry_s)
        self.lost: list[str] = []
        self._collecting, self._collected_until = Lock(), 0.0  # on time.monotonic()'s clock
        self._looking = RLock()
        self._said: set[str] = set()
        self._checkpoints: Kept | None = None

    def label(self, config: RunConfig) -> str:
        """Name a run by what varies in the sweep."""
        return self._labels[config.run_id]

    def run(self) -> None:
        """Do the runs that are not done, which were checked.

        Those that another command does are waited for, and done here if that command ends without
        them. What could not be recorded is in `lost`.
        """
        todo = [config for config in self.configs if not is_done(config, self.folder)]
        finished = told = False
        try:
            while todo := self._pass(todo):
                if not told:
                    doer = claimed_by(self.folder / todo[0].run_id) or "another command"
                    self._console.print(f"waiting for {len(todo)} runs that {escape(doer)} does")
                told = True
                time.sleep(WAIT_S)
            finished = True
        finally:
            self.lost = self._writer.finish(wait=finished)
            if not finished:
                for line in self.lost:
                    self._say(line)

    def _pass(self, todo: Sequence[RunConfig]) -> list[RunConfig]:
        """Do runs; return those that other commands do.

        One run alone leaves cores idle at the end of each round, so there are several at a time, on
        one pool of workers, where the backend can.
        """
        if not todo:
            return []
        # Imported here: torch loads while the backend starts.
        from fedbw_sweep.sweeps.trajectories import together

        groups = together(todo)
        alone = len(groups) == 1  # then the run itself starts the backend, if nothing has yet
        at_a_time = 1 if alone else backend_of(todo[0].backend).runs_at_a_time(todo)
        if at_a_time == 1:  # in this thread: some backends insist on the main one
            left = [self._do(group) for group in groups]
        else:
            with ThreadPoolExecutor(at_a_time) as threads:
                left = [done.result() for done in [threads.submit(self._do, g) for g in groups]]
        return [config for configs in left for config in configs]

    def _do(self, group: Sequence[RunConfig]) -> list[RunConfig]:
        """Do runs of one trajectory that are not done meanwhile; return those that others do.

        If another command does the longest of them, the others wait: it may do them on its way.
        """
        with ExitStack() as held:
            own = []
            for config in group:
                if self._claim(config, held):
                    own.append(config)
                elif config is group[0]:
                    return list(group)
            if todo := [config for config in own if not is_done(config, self.folder)]:
                self._train(todo)
        return [config for config in group if config not in own]

    def _claim(self, config: RunConfig, held: ExitStack) -> bool:
        """Claim a run until the stack is closed; return whether it is this command's to do."""
        place = self.folder / config.run_id
        try:
            return held.enter_context(claimed(place, config.claims.stale_s)) is not None
        except OSError as error:  # its record may wait until there is room
            self._say(
                f"{self.label(config)} cannot be claimed: {error.strerror}; another command "
                "might do it too"
            )
            return True

    def _train(self, configs: Sequence[RunConfig]) -> None:
        """Do runs of one trajectory, from as late a round as there is a checkpoint of."""
        from fedbw_sweep.sweeps.run import made_by, processor

        own = configs[0].checkpoint
        if not own.enabled:
            self._train_from(configs, None)
            return
        made = made_by(configs[0])
        for group, start in self._kept().starts(configs, self.folder, made):
            place = self.folder / group[0].run_id
            store = Store(place, made, processor(), own.keep_mb * MB, start, self._say_once)
            if start is not None:
                self._say(f"{self.label(group[0])}: goes on after round {start.round}")
            self._train_from(group, store)

    def _train_from(self, configs: Sequence[RunConfig], store: Store | None) -> None:
        """Do runs of one trajectory, record each as it ends, and say how it went."""
        from fedbw_sweep.sweeps.run import train

        with ExitStack() as watched:
            label = self.label(configs[0])
            shorter = f" and {len(configs) - 1} shorter" if len(configs) > 1 else ""
            show = watched.enter_context(self._bars.run(label + shorter, configs[0].rounds))
            observers = {}
            for config in configs:
                log = watched.enter_context(logged(config, self.folder))
                watchers: list[Watcher] = [Heartbeat(config, self.folder), log]
                watchers += [show] if config is configs[0] else []
                observers[config.run_id] = _all_of(watchers)
            train(configs, observers, lambda record: self._record(record, configs[0], store), store)

    def _record(self, record: RunRecord, longest: RunConfig, store: Store | None) -> None:
        """Record a run that has ended, say how it went, and renew the tables."""
        config = record.config
        if record.status == "done":
            first, last = record.rounds[0], record.summary
            outcome = (
                f"loss {first['loss']:.3f} -> {last['loss']:.3f}, "
                f"uplink {size(last['uplink_bytes'])}"
            )
            outcome += f"; {record.error}" if record.error else ""
        else:
            outcome = f"[red]failed[/red]: {escape(str(record.error).strip().splitlines()[-1])}"
        seconds = math.fsum(row["round_seconds"] for row in record.timing)
        self._console.print(f"{escape(self.label(config))}: {outcome} ({duration(seconds)})")
        kept = record.status == "failed" or (store is not None and store.is_kept)
        written = self._writer.write(config.run_id, record.files(), with_checkpoint=kept)
        ended_early = record.status == "done" and config.run_id != longest.run_id
        if written and kept and store is not None and ended_early:
            with suppress(OSError):  # then the run has none, which costs nothing now
                store.copy_to(self.folder / config.run_id)
        self._bars.advance()
        self._renew_tables()

    def _kept(self) -> Kept:
        """Look for checkpoints, once a command."""
        from fedbw_sweep.sweeps.trajectories import Kept

        with self._looking:
            if self._checkpoints is None:
                source = self.configs[0].checkpoint.source
                further = None if source is None else Path(source)
                self._checkpoints = Kept(self.folder, further, self._say_once)
            return self._checkpoints

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rebuild the folder's ``results.csv`` and ``rounds.csv``; return the sweep's own rows.

        Raises
        ------
        OSError
            If they cannot be written.
        """
        notes: list[str] = []
        results, rounds = collect(self.folder, notes)
        for note in notes:
            self._say(note)
        own = [config.run_id for config in self.configs]
        return results[results["run_id"].isin(own)], rounds[rounds["run_id"].isin(own)]

    def show(self) -> int:
        """Print the sweep's table, draw its figure and return the exit code.

        It is 1 if a run failed, was not recorded, or was deleted meanwhile, or if the tables cannot
        be written.
        """
        for line in self.lost:
            self._say(line)
        try:
            return max(self._show(), int(bool(self.lost)))
        except OSError as error:
            self._say(
                f"{error.filename or self.folder} cannot be written: {error.strerror}; the same "
                "command again writes it once it can be, and does only what is missing"
            )
            return 1

    def _show(self) -> int:
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
        deleted = {config.run_id for config in self.configs} - {*results["run_id"]}
        for run_id in sorted(deleted):
            self._say(f"run {run_id} was deleted while the sweep ran")
        return int(bool(len(failed) or deleted))

    def _say(self, line: str) -> None:
        self._console.print(escape(printable(line)))

    def _say_once(self, line: str) -> None:
        with self._looking:
            said, self._said = line in self._said, {*self._said, line}
        if not said:
            self._say(line)

    def _renew_tables(self) -> None:
        """Rebuild the folder's tables, unless they have just been: `show` does it in any case."""
        with self._collecting:
            started = time.monotonic()
            if started >= self._collected_until:
                with suppress(OSError):  # `show` says so, if they can't be written then either
                    collect(self.folder)
                took = time.monotonic() - started
                self._collected_until = time.monotonic() + took * (1 / COLLECT_SHARE - 1)


def _all_of(watchers: Sequence[Watcher]) -> Watcher:
    """Return what hands a row to each of several watchers."""

    def observe(row: dict[str, Any]) -> None:
        for watcher in watchers:
            watcher(row)

    return observe


def _labels(configs: Sequence[RunConfig]) -> dict[str, str]:
    """Name runs by the settings that tell them apart; by run_id."""
    settings = pd.DataFrame([config_columns(c.science) for c in configs], dtype=object)
    labels = run_labels(settings, varying_settings(settings))
    return dict(zip((config.run_id for config in configs), labels, strict=True))


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
