"""Before the first run of a command starts: Hydra's callback, and the checks of every run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.defaults import refuse_other_names
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import errors_end_the_command, message_console
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import require
from fedbw_sweep.records.write import announce, device_of
from fedbw_sweep.sweep import launcher
from fedbw_sweep.sweep.grid import Composer, expand

OWN_OF_HYDRA = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)
"""The launcher and the sweeper that Hydra uses where no other is chosen."""


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
            refuse_other_names(config, config.hydra.runtime.choices)
            prepare([RunConfig.from_hydra(config)], "hydra.run.dir", config, here=True)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check every cell of the grid; have them run here unless another launcher is chosen."""
        with errors_end_the_command():
            composer = Composer(kwargs["config_name"])
            grid = expand(config.hydra.overrides.task, config.hydra.sweeper.get("params"))
            cells = [RunConfig.from_hydra(composer.config(overrides)) for overrides in grid]
            chosen = config.hydra.launcher._target_, config.hydra.sweeper._target_
            here = chosen == OWN_OF_HYDRA
            prepare(cells, "hydra.sweep.dir", config, here)
        if here:
            raise Checked


def prepare(cells: list[RunConfig], folder_key: str, config: DictConfig, here: bool) -> None:
    """Check the folder, the text and the model of every run that is still to do."""
    cells = [with_contents(cell) for cell in cells]
    folder = Path(OmegaConf.select(config, folder_key))
    launcher.command.begin(cells, folder)
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
    cells = launcher.command.cells
    devices = [device_of(cell, folder) for cell in cells]
    todo = [cell for cell, device in zip(cells, devices, strict=True) if device is None]
    if len(todo) < len(cells):
        message_console().print(f"{len(cells) - len(todo)} of {len(cells)} runs are done")
    for cell in todo:
        require("data", cell.data.name)
        require("data.partition", cell.data.partition)
        require("trainable", cell.trainable.name)
        require("logger", cell.logger)
    if todo and here:
        backend_of(todo[0].backend).start(todo[0])
    from fedbw_sweep.sweep.run import check
    from fedbw_sweep.training.process import pick_device

    asked: str = cells[0].device
    asked = pick_device(asked).type if asked == "auto" else asked
    if others := set(devices) - {None, asked}:
        done = sum(device in others for device in devices)
        message_console().print(
            f"{done} of them were trained on {', '.join(map(str, others))} and stay as they are; "
            "another folder (sweep=<name>) trains them here"
        )
    needs: dict[str, dict[str, RunConfig]] = {}
    for cell in todo:
        drawn = cell.seed if cell.data.partition != "natural" else None
        text = str((cell.model, cell.data, cell.num_clients, cell.sequence_length, drawn))
        different = str(
            (cell.trainable, cell.optimizer, cell.server, cell.compression, cell.downlink)
        )
        needs.setdefault(text, {})[different] = cell
    for alike in needs.values():
        check(list(alike.values()))
    announce(todo, folder)
