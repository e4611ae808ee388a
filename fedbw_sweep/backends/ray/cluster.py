"""Ray as this command sees it: joined or started here, its machines, tasks and GPUs."""

from __future__ import annotations

import atexit
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import floor
from typing import Any

import ray

from fedbw_sweep.backends.ray.node import Node
from fedbw_sweep.backends.ray.nursery import importing
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import PACKAGE
from fedbw_sweep.errors import ConfigError

Reference = Any
"""A ray.ObjectRef."""


CONNECT_S = 5.0
"""How long a cluster may take to answer at ``backend.address``."""


def connect(config: RunConfig, node: Node | None = None) -> None:
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
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {
        "logging_level": logging.INFO if config.verbose else logging.ERROR,
        "log_to_driver": config.verbose,
    }
    if backend.address is None:
        node = node or Node(backend.workers, config.verbose, backend.start_timeout_s)
        atexit.register(_stop, node)
        address = node.address()
        with _own_handler():
            ray.init(address=address, runtime_env=node.runtime_env, **quiet)
    else:
        environment = {"py_modules": [str(PACKAGE)]}
        try:
            host, _, port = backend.address.rpartition(":")
            if host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), CONNECT_S).close()
            with _own_handler():
                ray.init(address=backend.address, runtime_env=environment, **quiet)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "backend.address",
                backend.address,
                f"no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
                "`ray start --head` and give the address it prints, or null to start Ray here",
            ) from None
    get_ready(config)


def get_ready(config: RunConfig) -> None:
    """Have workers import what they need and build the model, meanwhile."""
    # With a client's share: a worker computes on the GPU that it has seen first.
    gpus = client_gpus(config)
    for _ in range(worker_count(alive_nodes())):
        submit(_prepare, [config.model_dump_json(by_alias=True)], gpus=gpus)


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep what SIGTERM does: Ray would abort the process with a stack trace."""
    if threading.current_thread() is not threading.main_thread():  # there Ray sets none
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _stop(node: Node) -> None:
    ray.shutdown()
    node.stop()


def _prepare(run_config: str) -> None:
    # Imported here: starting Ray need not wait for torch.
    with importing():
        from fedbw_sweep.federation.shared import worker_model

    worker_model(RunConfig.model_validate_json(run_config))


def alive_nodes() -> list[dict[str, float]]:
    """List what each machine of Ray's has: how much of which resource."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def worker_count(nodes: list[dict[str, float]]) -> int:
    """Clients that Ray can train at the same time."""
    return max(1, int(sum(node.get("CPU", 0.0) for node in nodes)))


def submit(
    function: Callable[..., Any], arguments: Sequence[Any], *, gpus: float = 0.0, returns: int = 1
) -> Any:
    """Let Ray call a function in a worker.

    Parameters
    ----------
    function : callable
        One that a module defines: workers import it from there.
    arguments : sequence
        References among them are what they refer to for the function.
    gpus : float
        Share of a GPU that it takes, besides a core.
    returns : int
        How many values it returns.

    Returns
    -------
    reference or list of references
        One for each value.
    """
    return _task(function).options(num_gpus=gpus, num_returns=returns).remote(*arguments)


@cache
def _task(function: Callable[..., Any]) -> Any:
    # max_calls=0: a worker that used a GPU stays warm too. max_retries=0: the grid asks again,
    # since Ray would also repeat what was killed for its time.
    return ray.remote(num_cpus=1, max_retries=0, max_calls=0)(function)


def client_gpus(config: RunConfig) -> float:
    """Return each client's share of a GPU: what the config says, or an equal share of all.

    Raises
    ------
    ConfigError
        If no machine of Ray's has what one client asks for: its task would wait without end.
    """
    if config.device == "cpu":
        return 0.0
    nodes = alive_nodes()
    gpus = [node.get("GPU", 0.0) for node in nodes]
    share = config.backend.client_gpus
    if share is None:
        if config.device == "cuda" and not any(gpus):
            raise ConfigError("device", "cuda", "Ray finds no GPU; use cpu or auto")
        return float(min(1.0, floor(1e4 * sum(gpus) / worker_count(nodes)) / 1e4))
    if share > max(gpus) or share != round(share, 4 if share < 1 else None):  # Ray counts so
        allowed = (
            f"must be at most {max(gpus):g}, the GPUs that Ray finds on one machine, in steps of "
            "0.0001 below 1 and of 1 above; null is an equal share of all"
        )
        raise ConfigError("backend.client_gpus", share, allowed)
    return share
