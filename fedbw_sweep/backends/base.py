"""What executes clients: the protocol that every backend implements, and who implements it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hydra.utils import get_class

from fedbw_sweep.config.groups import BackendConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError

if TYPE_CHECKING:  # it imports torch, which loads while a backend starts
    from fedbw_sweep.federation.job import Job
    from fedbw_sweep.federation.runs import Sink
    from fedbw_sweep.records.checkpoint import Store


@runtime_checkable
class Backend(Protocol):
    """Executes the clients of runs, and the server where the backend has a place of its own."""

    def start(self, config: RunConfig) -> None:
        """Start what clients run in, once a command, and let it get ready meanwhile.

        Parameters
        ----------
        config : RunConfig
            The first of the command's runs.

        Raises
        ------
        ConfigError
            If what the config asks for is not there.
        """

    def runs_at_a_time(self, configs: Sequence[RunConfig]) -> int:
        """Say how many runs of a sweep go on at the same time."""

    def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
        """Do a job's runs to their ends; rows go into their sinks as they are measured.

        Parameters
        ----------
        job : Job
        sinks : sequence of Sink
            One for each of ``job.configs``, in their order.
        store : Store, optional
            Where checkpoints are kept, and gone on from.

        Raises
        ------
        FedbwError
            What the server raised.
        """


def backend_of(config: BackendConfig) -> Backend:
    """Make the backend that ``backend`` names.

    Raises
    ------
    ConfigError
        If its class is not there, or is no backend's.
    """
    try:
        backend = get_class(config.target)(config)
    except (ImportError, ValueError) as error:
        raise ConfigError("backend._target_", config.target, str(error)) from None
    if not isinstance(backend, Backend):
        raise ConfigError("backend._target_", config.target, "must be a Backend")
    return backend


def set_verbosity(verbose: bool) -> None:
    """Let Flower's log through, or nothing of it."""
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.CRITICAL)
