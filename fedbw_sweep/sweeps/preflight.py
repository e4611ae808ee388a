"""Before the first run of a sweep starts: the checks of every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import message_console
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import require
from fedbw_sweep.records.place import clock, leftovers, remove
from fedbw_sweep.records.schema import RESULTS_COLUMNS
from fedbw_sweep.records.write import announce, device_of
from fedbw_sweep.sweeps.loggers.base import logger_of

OBJECTIVES = [name for name, c in RESULTS_COLUMNS.items() if c.dtype in ("Int64", "Float64")]
"""Columns of ``results.csv`` that ``objective`` may name."""


def prepare(configs: Sequence[RunConfig], folder: Path, folder_key: str, *, here: bool) -> None:
    """Check the folder, the text and the model of every run that is still to do.

    Parameters
    ----------
    configs : sequence of RunConfig
        The runs of a sweep.
    folder : pathlib.Path
        Where their records go.
    folder_key : str
        The key that names the folder.
    here : bool
        Whether the runs are done in this process: its backend is started.

    Raises
    ------
    ConfigError
        If anything that a run needs is not there, or is not allowed.
    """
    for config in configs:
        if here and config.backend != configs[0].backend:
            raise ConfigError("backend", config.backend.name, "must be the same for all runs")
        if (source := config.checkpoint.source) is not None and not Path(source).is_dir():
            raise ConfigError("checkpoint.source", source, "must be a sweep's or a run's folder")
        if config.objective not in OBJECTIVES:
            known = f"no number in results.csv; there are: {', '.join(OBJECTIVES)}"
            raise ConfigError("objective", config.objective, known)
    with _written(folder, folder_key):
        folder.mkdir(parents=True, exist_ok=True)
        for path in leftovers(folder, clock(folder)):
            remove(path)
    devices = [device_of(config, folder) for config in configs]
    todo = [config for config, device in zip(configs, devices, strict=True) if device is None]
    if len(todo) < len(configs):
        message_console().print(f"{len(configs) - len(todo)} of {len(configs)} runs are done")
    for config in todo:
        require("data", config.data.name)
        require("data.partition", config.data.partition)
        require("trainable", config.trainable.name)
        logger_of(config)
    if todo and here:
        backend_of(todo[0].backend).start(todo[0])
    # Imported here: torch loads while the backend starts.
    from fedbw_sweep.sweeps.run import check
    from fedbw_sweep.training.process import pick_device

    asked: str = configs[0].device
    asked = pick_device(asked).type if asked == "auto" else asked
    if others := set(devices) - {None, asked}:
        done = sum(device in others for device in devices)
        message_console().print(
            f"{done} of them were trained on {', '.join(map(str, others))} and stay as they are; "
            "another folder (sweep=<name>) trains them here"
        )
    needs: dict[str, dict[str, RunConfig]] = {}
    for config in todo:
        drawn = config.seed if config.data.partition != "natural" else None
        text = str((config.model, config.data, config.num_clients, config.sequence_length, drawn))
        methods = config.compression, config.downlink
        different = str(
            (config.trainable, config.optimizer, config.server, config.sampling, *methods)
        )
        needs.setdefault(text, {})[different] = config
    for alike in needs.values():
        check(list(alike.values()))
    with _written(folder, folder_key):
        announce(todo, folder)


@contextmanager
def _written(folder: Path, folder_key: str) -> Iterator[None]:
    """Say where nothing can be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            folder_key,
            folder,
            f"cannot be written: {error.strerror}; make room in it, or choose another folder",
        ) from None
