"""Each round's numbers for TensorBoard, in the sweep's folder ``tensorboard``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedbw_sweep.config.run import RunConfig


@contextmanager
def to_tensorboard(config: RunConfig, folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes each round's row; see `logged`."""
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
