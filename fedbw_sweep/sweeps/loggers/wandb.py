"""Each round's numbers for Weights & Biases, in the sweep's folder ``wandb`` or online."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import need


@dataclass
class WeightsAndBiases:
    """Makes a W&B run of each run, under its run_id.

    Parameters
    ----------
    mode : {"offline", "online"}
        ``offline`` writes files that ``wandb sync`` sends later; ``online`` sends at once.
    project : str
        The W&B project.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "fedbw_sweep"

    def __post_init__(self) -> None:
        need("wandb")
        if self.mode not in ("offline", "online"):
            raise ConfigError("mode", self.mode, "must be offline or online")

    def open(self, config: RunConfig, folder: Path) -> None:
        """See `Logger`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own reports of its crashes
        import wandb

        self._run = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=folder,
            id=config.run_id,
            group=config.sweep,
            config=config_columns(config.science),
            reinit="create_new",  # several runs of a sweep go on at a time
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: dict[str, Any]) -> None:
        """See `Logger`."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=row["round"])

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()
