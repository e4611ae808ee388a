"""What a logger is: a class that a choice of ``conf/logger`` names, ours or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.markup import escape

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import message_console
from fedbw_sweep.errors import ConfigError

Log = Callable[[dict[str, Any]], None]
"""Called with each row of ``rounds.csv`` as it is measured."""


@runtime_checkable
class Logger(Protocol):
    """Writes one run's rounds somewhere. Its parameters are the keys of its YAML file.

    It is made before anything trains, once to be checked and once for its run. A constructor
    refuses parameters with `ConfigError` or ``ValueError``, and a missing package with
    ``ImportError``. Whatever the three methods raise ends the logging, never the run.
    """

    def open(self, config: RunConfig, folder: Path) -> None:
        """Start to log a run.

        Parameters
        ----------
        config : RunConfig
            The run.
        folder : pathlib.Path
            The sweep's folder, for what is written to disk.
        """

    def log(self, row: dict[str, Any]) -> None:
        """Take a row of ``rounds.csv``, by column name; round 0 is the initial model."""

    def close(self) -> None:
        """Finish, also after a run that failed."""


class Silent:
    """Logs nothing."""

    def open(self, config: RunConfig, folder: Path) -> None:
        """See `Logger`."""

    def log(self, row: dict[str, Any]) -> None:
        """See `Logger`."""

    def close(self) -> None:
        """See `Logger`."""


def logger_of(config: RunConfig) -> Logger:
    """Make the logger that ``logger`` names.

    Raises
    ------
    ConfigError
        If it is no logger, refuses its parameters, or lacks a package.
    """
    logger = config.logger.instantiate("logger")
    if not isinstance(logger, Logger):
        wanted = "must have the methods open, log and close of a Logger"
        raise ConfigError("logger._target_", config.logger.target, wanted)
    return logger


@contextmanager
def logged(config: RunConfig, folder: Path) -> Iterator[Log]:
    """Yield what each round's row goes to, as ``logger`` says.

    A logger that fails is reported once and called no more: hours of training are worth more.

    Parameters
    ----------
    config : RunConfig
    folder : pathlib.Path
        The sweep's.
    """
    logger, works = logger_of(config), True

    def attempt(call: Callable[..., None], *arguments: Any) -> None:
        nonlocal works
        try:
            call(*arguments)
        except Exception as error:  # whatever another package raises
            works = False
            reason = escape(f"{type(error).__name__}: {error}".splitlines()[0])
            message_console().print(
                f"[yellow]logger={escape(config.logger.name)} stopped[/yellow], the run goes on: "
                f"{reason}"
            )

    attempt(logger.open, config, folder)
    opened = works
    try:
        yield lambda row: attempt(logger.log, row) if works else None
    finally:
        if opened:
            attempt(logger.close)
