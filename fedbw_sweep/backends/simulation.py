"""Start what executes the clients, and run a ServerApp against it."""

from __future__ import annotations

import atexit
import hashlib
import logging
import socket
import sys
import sysconfig
from functools import cache
from math import floor
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedbw_sweep.backends.ray import grid
from fedbw_sweep.backends.ray.broker import Broker, submit
from fedbw_sweep.backends.ray.node import Node, cores
from fedbw_sweep.backends.ray.nursery import importing
from fedbw_sweep.config.groups import BackendConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import PACKAGE
from fedbw_sweep.errors import ConfigError

CONNECT_S = 5.0


def set_verbosity(verbose: bool) -> None:
    """Let Flower's log through, or nothing of it."""
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.CRITICAL)


def worker_count(backend: BackendConfig) -> int:
    """Clients that can train at the same time."""
    if ray.is_initialized():
        return grid.worker_count(grid.alive_nodes())
    return backend.workers or cores()


def start(config: RunConfig, node: Node | None = None) -> None:
    """Start Ray or join a cluster, once a process, and let its workers get ready meanwhile.

    Parameters
    ----------
    config : RunConfig
        Its ``backend`` says which.
    node : Node, optional
        The Ray to use where one is to start here, if it is starting already.

    Raises
    ------
    ConfigError
        If there is no cluster at ``backend.address``, or fewer GPUs than a client asks for.
    """
    backend = config.backend
    if backend.name == "flower" or ray.is_initialized():
        return
    quiet: dict[str, Any] = {
        "logging_level": logging.INFO if config.verbose else logging.ERROR,
        "log_to_driver": config.verbose,
    }
    if backend.address is None:
        node = node or Node(backend.workers, config.verbose)
        atexit.register(_stop, node)
        ray.init(address=node.address(), **quiet)
    else:
        environment = {"py_modules": [str(PACKAGE)]}
        try:
            host, _, port = backend.address.rpartition(":")
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(address=backend.address, runtime_env=environment, **quiet)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "backend.address",
                backend.address,
                f"no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
                "`ray start --head` and give the address it prints, or null to start Ray here",
            ) from None
    # With a client's share: a worker computes on the GPU that it has seen first.
    gpus, through = client_gpus(config), _broker(config)
    ask = through.submit if through else submit
    for _ in range(worker_count(backend)):
        ask(_get_ready, [config.model_dump_json(by_alias=True)], gpus=gpus)


def _stop(node: Node) -> None:
    ray.shutdown()
    node.stop()


def _get_ready(run_config: str) -> None:
    # Imported here: starting Ray need not wait for torch.
    with importing():
        from fedbw_sweep.federation.client import workplace

    workplace(RunConfig.model_validate_json(run_config))


def _broker(config: RunConfig) -> Broker | None:
    """Return who keeps the workers of a cluster warm; a Ray started here ends with this command.

    Not with -v: what other commands' workers print, Ray does not show.
    """
    if config.backend.address is None or config.verbose:
        return None
    # A worker computes on the GPU that it has seen first, so shares are kept apart.
    return Broker(f"{_code()}, {client_gpus(config):g} GPU")


@cache
def _code() -> str:
    """Name what a worker started now for this command would import."""
    packages = ray.get_runtime_context().runtime_env["py_modules"]  # named by their contents
    # What is installed or removed changes its folder.
    changed = Path(sysconfig.get_path("purelib")).stat().st_mtime_ns
    # Ray has workers import from where the command runs, too: a method's file may be there.
    folders = ("stdlib", "platstdlib", "purelib", "platlib")
    others = (str(PACKAGE), *map(sysconfig.get_path, folders))
    files = {Path(vars(module).get("__file__") or "") for module in list(sys.modules.values())}
    own = {file for file in files if file.is_file() and not str(file).startswith(others)}
    contents = [(file, file.read_bytes()) for file in sorted(own)]
    everything = repr((packages, changed, Path.cwd(), sys.argv[0], contents))
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def simulate(config: RunConfig, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run a ServerApp against ``config.num_clients`` simulated clients, to its end.

    Parameters
    ----------
    config : RunConfig
        Its ``backend`` says what trains the clients.
    server_app, client_app
        The two sides of the federation.

    Raises
    ------
    FedbwError
        What the ServerApp raised.
    """
    if config.backend.name == "flower":
        _simulate_with_flower(config, server_app, client_app)
        return
    start(config)
    gpus, through = client_gpus(config), _broker(config)
    clients = grid.RayGrid(config.num_clients, client_app, gpus, through)
    server_app(clients, Context(0, config.num_clients, {}, RecordDict(), {}))


def client_gpus(config: RunConfig) -> float:
    """Return each client's share of a GPU: what the config says, or an equal share of all.

    Raises
    ------
    ConfigError
        If no machine of Ray's has what one client asks for: its task would wait without end.
    """
    if config.device == "cpu":
        return 0.0
    nodes = grid.alive_nodes()
    gpus = [node.get("GPU", 0.0) for node in nodes]
    share = config.backend.client_gpus
    if share is None:
        if config.device == "cuda" and not any(gpus):
            raise ConfigError("device", "cuda", "Ray finds no GPU; use cpu or auto")
        return float(min(1.0, floor(1e4 * sum(gpus) / grid.worker_count(nodes)) / 1e4))
    if share > max(gpus) or share != round(share, 4 if share < 1 else None):  # Ray counts so
        allowed = (
            f"must be at most {max(gpus):g}, the GPUs that Ray finds on one machine, in steps of "
            "0.0001 below 1 and of 1 above; null is an equal share of all"
        )
        raise ConfigError("backend.client_gpus", share, allowed)
    return share


def _simulate_with_flower(config: RunConfig, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run on Flower's own simulation, the reference: it starts and stops a Ray of its own."""
    # Imported here: it brings in for a second what the default never needs.
    from flwr.simulation import run_simulation

    run_simulation(
        server_app,
        client_app,
        num_supernodes=config.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": config.backend.client_gpus or 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": worker_count(config.backend),
                "include_dashboard": False,
                "logging_level": logging.INFO if config.verbose else logging.ERROR,
                "log_to_driver": config.verbose,
            },
        },
    )
