"""Each round's numbers for TensorBoard, in the sweep's folder ``tensorboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.extras import need


class TensorBoard:
    """Writes an event file for each run."""

    def __init__(self) -> None:
        need("tensorboard")

    def open(self, config: RunConfig, folder: Path) -> None:
        """See `Logger`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / config.run_id))
        self._writer.add_text("config", yaml.safe_dump(config.science))

    def log(self, row: dict[str, Any]) -> None:
        """See `Logger`."""
        for name, value in row.items():
            if isinstance(value, int | float) and name != "round":
                self._writer.add_scalar(name, value, row["round"])
        if row["loss"] is not None:  # TensorBoard's steps are whole numbers
            kilobytes = row["cumulative_uplink_bytes"] // 1000
            self._writer.add_scalar("loss over uplink kB", row["loss"], kilobytes)
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()
