"""The cells of a sweep: check all before the first starts, skip what is done, show progress."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import MB, errors_end_the_command, message_console, output_console
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import varying_settings
from fedbw_sweep.records.running import Heartbeat
from fedbw_sweep.records.write import announce, is_done
from fedbw_sweep.report.measure import cell_curves
from fedbw_sweep.report.table import describe_bytes, summary_table
from fedbw_sweep.sweep.grid import Composer, expand

FIGURE = "loss_against_bytes.png"


OWN_OF_HYDRA = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)
"""The launcher and the sweeper that Hydra uses where no other is chosen."""


COLLECT_SHARE = 0.02
"""The tables are rebuilt after a run unless that would take more than this share of the time."""


_console = message_console()


@dataclass
class _Command:
    """What the command at hand is doing. Empty in a process that another launcher started.

    Attributes
    ----------
    cells
        The command's runs, and `folder` where they go.
    varying
        The settings that tell the runs apart.
    """

    cells: list[RunConfig] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    varying: list[str] = field(default_factory=list)


_command = _Command()


_collecting = Lock()


_collected_until = 0.0  # on time.monotonic()'s clock


class _Progress:
    """A bar for each run under way and one for all of them, in a terminal."""

    def __init__(self) -> None:
        self.lock, self.running = Lock(), 0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[unit]} {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=_console,
            transient=True,
            disable=not _console.is_terminal,
        )
        self.all = self.bars.add_task("all", unit="run", status="", visible=False)

    @contextmanager
    def of(self, config: RunConfig) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Show one run's rounds, loss and MB as they come; yield what each round's row goes to."""
        task = self.bars.add_task(
            _label(config), total=config.rounds, unit="round", status="starting"
        )
        cells = len(_command.cells)
        with self.lock:
            self.running += 1
            self.bars.update(self.all, total=cells, visible=cells > 1)
            self.bars.start()

        def observe(row: dict[str, Any]) -> None:
            status = f"loss {row['loss']:.3f}, {row['cumulative_bytes'] / MB:.2f} MB"
            self.bars.update(task, completed=row["round"], status=status)

        try:
            yield observe
        finally:
            self.bars.remove_task(task)
            self.bars.advance(self.all)
            with self.lock:
                self.running -= 1
                if not self.running:
                    self.stop()

    def stop(self) -> None:
        """Take the bars away and give the cursor back."""
        self.bars.stop()


_progress = _Progress()


def stop_showing_progress() -> None:
    """Take the progress bars away, e.g. before the process ends in the middle."""
    _progress.stop()


class Checked(BaseException):
    """Raised to leave Hydra, which would make a warning of an `Exception`: `run_all` is next.

    Hydra's own launcher would compose every cell twice more, and longer than a short run takes.
    """


class Preflight(Callback):
    """Hydra callback: every cell is checked before the first one trains.

    Hydra turns a callback's exceptions into warnings, so an error is printed here and ends the
    process with exit code 2.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the only run."""
        with errors_end_the_command():
            _prepare([RunConfig.from_hydra(config)], "hydra.run.dir", config, here=True)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check every cell of the grid; have them run here unless another launcher is chosen."""
        with errors_end_the_command():
            composer = Composer(kwargs["config_name"])
            grid = expand(config.hydra.overrides.task, config.hydra.sweeper.get("params"))
            cells = [RunConfig.from_hydra(composer.config(overrides)) for overrides in grid]
            chosen = config.hydra.launcher._target_, config.hydra.sweeper._target_
            here = chosen == OWN_OF_HYDRA
            _prepare(cells, "hydra.sweep.dir", config, here)
        if here:
            raise Checked


def run_cell(cfg: DictConfig) -> None:
    """Do the run a composed config describes: the command's only one, or a launcher's."""
    _run(with_contents(RunConfig.from_hydra(cfg)), Path(HydraConfig.get().runtime.output_dir))


def run_all() -> None:
    """Do the command's runs, which were checked.

    One run alone leaves cores idle at the end of each round, so there are several at a time, on one
    pool of workers, where the backend can.
    """
    folder = _command.folder
    todo = [cell for cell in _command.cells if not is_done(cell, folder)]
    if not todo:
        return
    at_a_time = backend_of(todo[0].backend).runs_at_a_time(todo)
    if at_a_time == 1:  # in this thread: some backends insist on the main one
        for cell in todo:
            _run(cell, folder)
        return
    with ThreadPoolExecutor(at_a_time) as threads:
        for run in [threads.submit(_run, cell, folder) for cell in todo]:
            run.result()


@contextmanager
def logged(config: RunConfig, folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes each round's row to TensorBoard, with ``logger=tensorboard``."""
    if config.logger == "none":
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / config.run_id)) as writer:
        writer.add_text("config", yaml.safe_dump(config.science))

        def log(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "round":
                    writer.add_scalar(name, value, row["round"])
            # A curve over bytes: TensorBoard's steps are whole numbers.
            kilobytes = row["cumulative_uplink_bytes"] // 1000
            writer.add_scalar("loss over uplink kB", row["loss"], kilobytes)
            writer.flush()

        yield log


def _run(config: RunConfig, folder: Path) -> None:
    """Do one run unless it is recorded as done, say how it went, and renew the tables."""
    if is_done(config, folder):
        return
    from fedbw_sweep.sweep.run import execute

    with _progress.of(config) as show, logged(config, folder) as log:
        beat = Heartbeat(config, folder)

        def observe(row: dict[str, Any]) -> None:
            for watcher in (show, beat, log):
                watcher(row)

        record = execute(config, folder, observe)
    if record.status == "done":
        first, last = record.rounds[0], record.rounds[-1]
        outcome = (
            f"loss {first['loss']:.3f} -> {last['loss']:.3f}, "
            f"uplink {last['cumulative_uplink_bytes'] / MB:.2f} MB"
        )
    else:
        outcome = f"[red]failed[/red]: {escape(str(record.error).strip().splitlines()[-1])}"
    seconds = sum(row["round_seconds"] for row in record.timing)
    _console.print(f"{_label(config)}: {outcome} ({seconds:.0f} s)")
    _renew_tables(folder)


def _renew_tables(folder: Path) -> None:
    """Rebuild the sweep's tables, unless they have just been: `finish` does it in any case."""
    global _collected_until
    with _collecting:
        started = time.monotonic()
        if started >= _collected_until:
            collect(folder)
            took = time.monotonic() - started
            _collected_until = time.monotonic() + took * (1 / COLLECT_SHARE - 1)


def finish() -> int:
    """Print the sweep's table, draw its figure and return the exit code: 1 if any run failed."""
    if not _command.cells:  # --help, --cfg and the like
        return 0
    # Imported here: matplotlib is needed only now.
    from fedbw_sweep.report.figure import loss_against_bytes

    results, rounds = collect(_command.folder)
    mine = results[results["run_id"].isin([cell.run_id for cell in _command.cells])]
    output = output_console()
    output.print(summary_table(mine))
    for line in describe_bytes(mine):
        output.print(line, soft_wrap=True)
    figure = _command.folder / FIGURE
    loss_against_bytes(cell_curves(mine, rounds), figure)
    _console.print(f"{_command.folder}/: results.csv, rounds.csv, {FIGURE} and a folder per run")
    failed = mine[mine["status"] == "failed"]
    for _, row in failed.iterrows():
        _console.print(f"[red]failed[/red] {row['run_id']}: {escape(row['reason'].strip())}")
    return int(len(failed) > 0)


def _prepare(cells: list[RunConfig], folder_key: str, config: DictConfig, here: bool) -> None:
    """Check the folder, the text and the model of every run that is still to do."""
    cells = [with_contents(cell) for cell in cells]
    folder = Path(OmegaConf.select(config, folder_key))
    _command.cells, _command.folder = list({cell.run_id: cell for cell in cells}.values()), folder
    _command.varying = _varying(_command.cells)
    for cell in cells:
        if here and cell.backend != cells[0].backend:
            raise ConfigError("backend", cell.backend.name, "must be the same for all runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            folder_key, folder, f"cannot be written: {error.strerror}; choose another folder"
        ) from None
    todo = [cell for cell in _command.cells if not is_done(cell, folder)]
    if len(todo) < len(_command.cells):
        _console.print(f"{len(_command.cells) - len(todo)} of {len(_command.cells)} runs are done")
    if any(cell.logger == "tensorboard" for cell in todo) and not find_spec("tensorboard"):
        raise ConfigError("logger", "tensorboard", "needs its package: pip install tensorboard")
    if todo and here:
        backend_of(todo[0].backend).start(todo[0])
    from fedbw_sweep.sweep.run import check

    needs: dict[str, dict[str, RunConfig]] = {}
    for cell in todo:
        drawn = cell.seed if cell.data.partition != "natural" else None
        text = str((cell.model, cell.data, cell.num_clients, cell.sequence_length, drawn))
        different = str((cell.trainable, cell.optimizer, cell.server))
        needs.setdefault(text, {})[different] = cell
    for alike in needs.values():
        check(list(alike.values()))
    announce(todo, folder)


def _varying(cells: list[RunConfig]) -> list[str]:
    """Return the settings that tell runs apart."""
    return varying_settings(pd.DataFrame([config_columns(c.science) for c in cells], dtype=object))


def _label(config: RunConfig) -> str:
    """Name a run by what varies between the command's cells."""
    own = config_columns(config.science)
    names = _command.varying or _varying([config])
    return " ".join(f"{name}={own[name]}" for name in names if not pd.isna(own.get(name)))
