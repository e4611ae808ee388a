"""What Hydra calls: the task of a command, and the sweeper that is given the whole grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig

from fedbw_sweep.errors import FedbwError

if TYPE_CHECKING:  # Hydra imports plugins in every command that uses it: this one must be light
    from collections.abc import Sequence

    from fedbw_sweep.config.run import RunConfig

POOL = "basic"
"""The choice of ``hydra/launcher`` that stands for our own pool: Hydra's default."""


class Command:
    """Hydra's task: the only run of a command, or one that a sweeper or launcher asks for.

    Attributes
    ----------
    code : int
        What the command is to exit with: 1 if a run failed.
    """

    def __init__(self) -> None:
        self.code = 0

    def __call__(self, cfg: DictConfig) -> float | None:
        """Do a run; return its objective if a sweeper of another kind asks for it.

        Raises
        ------
        FedbwError
            If a run that another sweeper or launcher asks for failed.
        """
        from fedbw_sweep.config.run import RunConfig
        from fedbw_sweep.console import errors_end_the_command

        hydra = HydraConfig.get()
        with errors_end_the_command():
            config = RunConfig.from_hydra(cfg)
            if hydra.mode == RunMode.RUN:
                self.sweep([config], Path(hydra.run.dir), "hydra.run.dir")
        if hydra.mode == RunMode.RUN:
            return None
        return self._objective(config, Path(hydra.runtime.output_dir))

    def sweep(self, configs: Sequence[RunConfig], folder: Path, folder_key: str) -> None:
        """Check all runs, do those that are not done, and show the outcome."""
        from fedbw_sweep.sweeps.preflight import prepare
        from fedbw_sweep.sweeps.sweep import Sweep

        sweep = Sweep(configs, folder)
        prepare(sweep.configs, folder, folder_key, here=True)
        sweep.run()
        self.code = sweep.show()

    def _objective(self, config: RunConfig, folder: Path) -> float:
        from fedbw_sweep.records.write import read_status
        from fedbw_sweep.sweeps.sweep import Sweep

        sweep = Sweep([config], folder)
        [config] = sweep.configs
        status = read_status(folder / config.run_id)
        if status is None or status["status"] != "done":
            folder.mkdir(parents=True, exist_ok=True)
            record = sweep.run_one(config)
            status = {"status": record.status, "end": record.end, "summary": record.summary}
            status["reason"] = record.error
        if status["status"] == "done":
            return float(status["summary"][config.objective])
        self.code = 1
        if status["end"] == "diverged":
            return math.inf
        raise FedbwError(f"{sweep.label(config)}: {status['reason']}")


class GridSweeper(Sweeper):
    """Sweeps every combination of the values given.

    With Hydra's own launcher the runs share one pool of workers; another launcher is given a job
    for each run. Either way each run is checked before the first one trains.

    Parameters
    ----------
    params : mapping
        Overrides that are swept besides those of the command line.
    """

    def __init__(self, params: DictConfig) -> None:
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """See `hydra.plugins.sweeper.Sweeper`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Do the runs that a command line names; exit with 2 if one is not allowed."""
        from fedbw_sweep.config.run import RunConfig
        from fedbw_sweep.console import errors_end_the_command
        from fedbw_sweep.sweeps.grid import Composer, expand, overrides_are_named
        from fedbw_sweep.sweeps.preflight import prepare
        from fedbw_sweep.sweeps.sweep import Sweep

        assert self.config is not None
        assert self.hydra_context is not None
        assert isinstance(self.task_function, Command)
        hydra = self.config.hydra
        folder, key = Path(hydra.sweep.dir), "hydra.sweep.dir"
        with errors_end_the_command():
            with overrides_are_named(arguments):
                composer = Composer(hydra.job.config_name)
                grid = expand(arguments, {str(k): v for k, v in self.params.items()})
                configs = [RunConfig.from_hydra(composer.config(lines)) for lines in grid]
            if hydra.runtime.choices["hydra/launcher"] == POOL:
                self.task_function.sweep(configs, folder, key)
                return
            sweep = Sweep(configs, folder)
            prepare(sweep.configs, folder, key, here=False)
        launcher = Plugins.instance().instantiate_launcher(
            self.hydra_context, self.task_function, self.config
        )
        launcher.launch(grid, initial_job_idx=0)
        self.task_function.code = sweep.show()
