"""Flower's own simulation: slower, the reference that others are compared with."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbw_sweep.config.groups import BackendConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.environment import cores
from fedbw_sweep.federation.client import client_app
from fedbw_sweep.federation.job import Job, server_app
from fedbw_sweep.federation.runs import Sink
from fedbw_sweep.records.checkpoint import Store


class FlowerBackend:
    """Runs Flower's simulation engine, which makes its own grid, and a Ray for each run."""

    def __init__(self, config: BackendConfig) -> None:
        """Keep nothing: every run's config has all there is to know."""

    def start(self, config: RunConfig) -> None:
        """See `Backend`: each run starts its own."""

    def runs_at_a_time(self, configs: Sequence[RunConfig]) -> int:
        """See `Backend`: Flower's engine insists on the main thread."""
        return 1

    def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
        """See `Backend`."""
        simulate(job.config, server_app(job, sinks, store), client_app(job))


def simulate(config: RunConfig, server: ServerApp, client: ClientApp) -> None:
    """Run two apps on Flower's engine, to the server's end."""
    # Imported here: it brings in for a second what no other backend needs.
    from flwr.simulation import run_simulation

    backend = config.backend
    run_simulation(
        server,
        client,
        num_supernodes=config.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": backend.client_gpus or 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": backend.workers or cores(),
                "include_dashboard": False,
                "logging_level": logging.INFO if config.verbose else logging.ERROR,
                "log_to_driver": config.verbose,
            },
        },
    )
