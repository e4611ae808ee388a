"""The only file that knows Ray and Flower's simulation internals."""

from __future__ import annotations

import logging
import os

# Before Flower and Ray are imported: no telemetry, no notices.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from fedbw_sweep.config import RunConfig


def set_verbosity(verbose: bool) -> None:
    """Let Flower's log through, or nothing of it."""
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.CRITICAL)


def simulate(config: RunConfig, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run a ServerApp against ``config.num_clients`` simulated clients, to its end.

    Parameters
    ----------
    config : RunConfig
        Its ``backend`` says how many worker processes train clients; each uses one core.
    server_app, client_app
        The two sides of the federation.

    Raises
    ------
    FedbwError
        What the ServerApp raised.
    """
    workers = config.backend.workers or os.cpu_count() or 1
    run_simulation(
        server_app,
        client_app,
        num_supernodes=config.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": workers,
                "include_dashboard": False,
                "logging_level": logging.INFO if config.verbose else logging.ERROR,
                "log_to_driver": config.verbose,
            },
        },
    )
