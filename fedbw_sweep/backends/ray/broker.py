"""Who asks Ray for the clients' tasks: the command itself, or a broker that outlives it.

On a cluster that a command joins, workers can then be warm for the next command.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from threading import Event, Thread, Timer
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

RETRIES = 3
"""How often a message is given to another worker after its own was killed."""


WARM_S = 600.0
"""How long workers, and who keeps them, stay on a cluster that nobody asks for anything."""


WATCH_S = 5.0
"""How often a worker makes sure that the command it works for is there."""


Reference = Any
"""A ray.ObjectRef."""


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
    # max_calls=0: a worker that used a GPU stays warm too. max_retries=0: `_reply` asks again,
    # since Ray would also repeat what was killed for its time.
    return ray.remote(num_cpus=1, max_retries=0, max_calls=0)(function)


class Broker:
    """Asks Ray for tasks in a command's stead, so that the workers are not the command's own.

    With a command Ray ends the workers of its tasks, but not of those that an actor has asked for
    which outlives it. All commands that name the same actor share its workers, and it takes no
    core. It is on the command's machine, so that it is lost with no other, and can tell whether the
    command is still there. If it is lost, its tasks fail as those of lost workers do, and are given
    to a new one.

    Parameters
    ----------
    name : str
        Of the actor: says which code its workers run, in whatever has a part in that.
    """

    def __init__(self, name: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        self.options = {
            "name": f"{name}@{node}",
            "namespace": "fedbw_sweep",
            "lifetime": "detached",
            "get_if_exists": True,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        self.actor = _actor.options(**self.options).remote()

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any], **options: Any) -> Any:
        """See `submit`."""
        # In a list: Ray does not give the broker what the references in it refer to.
        asked = os.getpid(), function, [*arguments], options
        for tries in range(RETRIES):
            with suppress(RayActorError):
                return ray.get(self.actor.submit.remote(*asked))
            time.sleep(tries)  # its name is not free at once
            self.actor = _actor.options(**self.options).remote()
        return ray.get(self.actor.submit.remote(*asked))


class _Broker:
    """On the cluster: the actor. It holds no reference that it has given away."""

    def __init__(self) -> None:
        self.itself = ray.get_runtime_context().current_actor
        self.stay()

    def submit(
        self, pid: int, function: Callable[..., Any], arguments: list[Any], options: dict[str, Any]
    ) -> Any:
        """Ask for a task on behalf of a command."""
        self.stay()
        watched = pid if psutil.pid_exists(pid) else None  # other containers have other numbers
        return submit(_keep_warm, [self.itself, watched, function, *arguments], **options)

    def sees(self, pid: int) -> bool:
        """Tell whether a command is still there."""
        self.stay()
        return psutil.pid_exists(pid)

    def stay(self) -> None:
        """End only WARM_S from now."""
        _put_off(lambda: ray.kill(self.itself))


_actor: Any = ray.remote(num_cpus=0)(_Broker)


_pins: list[Reference] = []


_end = Timer(WARM_S, _pins.clear)


def _put_off(end: Callable[[], None]) -> None:
    """Do this WARM_S after the last time that this process was told so."""
    global _end
    _end.cancel()
    _end = Timer(WARM_S, end)
    _end.daemon = True
    _end.start()


def _keep_warm(broker: Any, pid: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: call a function, and do not end with the command that asked for it."""
    with _while_there(broker, pid):
        returned = function(*arguments)
    # Once its job is over Ray tells an idle worker to end, five times a second. It does so only if
    # it owns nothing that may still be asked for.
    if not _pins:
        _pins.append(ray.put(None))
    _put_off(_pins.clear)
    return returned


@contextmanager
def _while_there(broker: Any, pid: int | None) -> Iterator[None]:
    """End this process, and with it the block, should the command with this number have ended."""
    done = Event()

    def watch() -> None:
        while not done.is_set():
            with suppress(RayError):  # without its broker Ray ends this process
                if not ray.get(broker.sees.remote(pid)) and not done.is_set():
                    os._exit(1)
            done.wait(WATCH_S)

    if pid is not None:
        Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
