"""What Hydra calls: the sweeper that is given the whole grid, and the task of single jobs.

Hydra imports plugins in every command that uses it, so that this module imports little by itself.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fedbw_sweep.errors import FedbwError

POOL = "basic"
"""The choice of ``hydra/launcher`` that stands for our own pool: Hydra's default."""


class Command:
    """Hydra's task: one run, for a sweeper of another kind or in a job of another launcher.

    Attributes
    ----------
    code : int
        What the command is to exit with: 1 if a run failed.
    """

    def __init__(self) -> None:
        self.code = 0

    def __call__(self, cfg: DictConfig) -> float:
        """Do a run, unless it is recorded as done; return its objective.

        A run that diverged is infinitely bad.

        Raises
        ------
        FedbwError
            If the run failed.
        """
        from fedbw_sweep.config.defaults import refuse_other_names
        from fedbw_sweep.config.run import RunConfig
        from fedbw_sweep.records.status import read_status
        from fedbw_sweep.sweeps.sweep import Sweep

        runtime = HydraConfig.get().runtime
        refuse_other_names(cfg, runtime.choices)
        folder = Path(runtime.output_dir)
        sweep = Sweep([RunConfig.from_hydra(cfg)], folder)
        [config] = sweep.configs
        sweep.run()
        status = read_status(folder / config.run_id)
        if status is None:
            raise FedbwError("; ".join(sweep.lost) or f"run {config.run_id} was deleted")
        if status["status"] == "done":
            return float(status["summary"][config.objective])
        self.code = 1
        if status["end"] == "diverged":
            return math.inf
        raise FedbwError(f"{sweep.label(config)}: {status['reason']}")


class GridSweeper(Sweeper):
    """Sweeps every combination of the values given: one, if no key has several.

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
        assert isinstance(self.task_function, Command)
        hydra = self.config.hydra
        with errors_end_the_command():
            with overrides_are_named(arguments):
                composer = Composer(hydra.job.config_name)
                grid = expand(arguments, {str(k): v for k, v in self.params.items()})
                configs = [RunConfig.from_hydra(composer.config(lines)) for lines in grid]
            here = hydra.runtime.choices["hydra/launcher"] == POOL
            sweep = Sweep(configs, Path(hydra.sweep.dir))
            prepare(sweep.configs, sweep.folder, "hydra.sweep.dir", here=here)
        if here:
            sweep.run()
        else:
            assert self.hydra_context is not None
            launcher = Plugins.instance().instantiate_launcher(
                self.hydra_context, self.task_function, self.config
            )
            launcher.launch(grid, initial_job_idx=0)
        self.task_function.code = sweep.show()
