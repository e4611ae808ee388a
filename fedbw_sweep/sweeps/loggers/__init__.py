"""Where a run's rounds are written besides its record: one file a logger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.sweeps.loggers.tensorboard import to_tensorboard

Log = Callable[[dict[str, Any]], None]
"""Called with each row of ``rounds.csv`` as it is measured."""


@contextmanager
def _to_nowhere(config: RunConfig, folder: Path) -> Iterator[Log]:
    yield lambda row: None


LOGGERS: dict[str, Callable[[RunConfig, Path], AbstractContextManager[Log]]] = {
    "none": _to_nowhere,
    "tensorboard": to_tensorboard,
}
"""What ``logger=`` may be; see `RunConfig`."""


def logged(config: RunConfig, folder: Path) -> AbstractContextManager[Log]:
    """Return a context that yields what each round's row goes to, as ``logger=`` says.

    Parameters
    ----------
    config : RunConfig
    folder : pathlib.Path
        The sweep's.
    """
    return LOGGERS[config.logger](config, folder)
