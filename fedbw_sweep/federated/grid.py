"""Flower's Grid on Ray: workers that stay warm, one copy of the model a round, replies in order."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from threading import Event, Thread, Timer
from types import FrameType
from typing import Any, NamedTuple, NoReturn

# Before Flower and Ray are imported: no telemetry, no notices.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of a task only its reply is looked at
# One process that spills and one that restores, each of 45 MB, and not four each.
os.environ.setdefault("RAY_max_io_workers", "1")
# What is no longer held is freed at once, not up to a second later: its memory, which every process
# has touched, is the next message's.
os.environ.setdefault("RAY_free_objects_batch_size", "1")

import numpy as np
import psutil
import ray
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # not exported, see tests/test_flower.py
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedbw_sweep.errors import ClientError

IN_FLIGHT_PER_WORKER = 4
"""Messages handed to Ray at once, per worker: enough that none waits for the server, few enough
that replies waiting for an earlier one stay few."""
RETRIES = 3
"""How often a message is given to another worker after its own was killed."""
WORKER_FAILED = 2
"""Error code of the reply of a client whose worker process could not be kept alive."""
GRACE_S = 10.0
"""How long after its time limit a client that does not even react to signals is killed."""
WARM_S = 600.0
"""How long workers, and who keeps them, stay on a cluster that nobody asks for anything."""
WATCH_S = 5.0
"""How often a worker makes sure that the command it works for is there."""

Reference = Any
"""A ray.ObjectRef."""
Stored = dict[int, tuple[ArrayRecord, Reference]]
"""What a round's messages share, by identity; kept alive, so that no other takes its identity."""


class _Asked(NamedTuple):
    """A message under way: what its task was given and will return, and when that was."""

    message: Message
    arguments: tuple[Any, ...]
    reply: Reference
    state: Reference
    at: float


class RayGrid(Grid):
    """Every client is a Ray task; its state stays in Ray's object store between its rounds.

    Only `get_node_ids` and `send_and_receive` are used by a strategy. Node ids are the clients'
    numbers. What a message shares with the others of its round (the model) is stored once and read
    by every worker where it lies. Ray spills what does not fit into memory to disk, and gives a
    message whose worker was killed to another.

    Parameters
    ----------
    num_clients : int
        Clients that exist. Nothing is made for those that are never sampled.
    client_app : ClientApp
        Answers the messages.
    client_gpus : float
        GPUs each client takes while it works.
    through : Broker, optional
        Who asks Ray for the clients' tasks; by default this process.
    """

    def __init__(
        self,
        num_clients: int,
        client_app: ClientApp,
        client_gpus: float = 0.0,
        through: Broker | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, num_clients
        self.nodes = range(num_clients)
        self.app = ray.put(client_app)
        self.states: dict[int, Reference] = {}
        self.client_gpus = client_gpus
        self.submit = through.submit if through else submit
        self.window = IN_FLIGHT_PER_WORKER * worker_count()
        one_node = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
        self.keep_states = not one_node or through is not None

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' numbers."""
        return self.nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the reply to each message, in the order of the messages, as soon as it is there.

        Parameters
        ----------
        messages : iterable of Message
            Taken one by one, a bounded number ahead of the replies.
        timeout : float, optional
            Seconds a client may take from the moment it starts.
        """
        stored: Stored = {}
        in_flight: deque[_Asked] = deque()
        for message in messages:
            if len(in_flight) == self.window:
                yield self._reply(in_flight.popleft())
            in_flight.append(self._ask(message, self._arguments(message, stored, timeout)))
        # After an error the few under way end in vain. To cancel one as it ends would abort this
        # process: ray-project/ray#54798.
        while in_flight:
            yield self._reply(in_flight.popleft())

    def _arguments(
        self, message: Message, stored: Stored, timeout: float | None
    ) -> tuple[Any, ...]:
        """Take a message apart into what the task is given, arrays as references."""
        arrays: dict[str, Reference] = {}
        rest = RecordDict()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                if id(record) not in stored:
                    stored[id(record)] = record, ray.put(_by_reference(record))
                _, arrays[name] = stored[id(record)]
            else:
                rest[name] = record
        about = message.metadata
        shell = Message(rest, about.dst_node_id, about.message_type, group_id=about.group_id)
        state = self.states.get(about.dst_node_id)
        return self.app, shell, state, timeout, list(arrays), *arrays.values()

    def _ask(self, message: Message, arguments: tuple[Any, ...]) -> _Asked:
        reply, state = self.submit(_answer, arguments, gpus=self.client_gpus, returns=2)
        return _Asked(message, arguments, reply, state, time.monotonic())

    def _reply(self, asked: _Asked) -> Message:
        """Wait for a reply; ask again where the worker, not the client, failed."""
        for _ in range(RETRIES + 1):
            try:
                answered: Message = ray.get(asked.reply)  # type: ignore[assignment]
                # With its machine or a broker a state would be lost: the server's own is not.
                state = ray.put(ray.get(asked.state)) if self.keep_states else asked.state
                self.states[asked.message.metadata.dst_node_id] = state
                return answered
            except RayTaskError as error:
                reason = str(error.cause)
                break
            except RayError as error:
                timeout = asked.arguments[3]
                if timeout is not None and time.monotonic() - asked.at > timeout + GRACE_S:
                    reason = _too_late(timeout)
                    break
                reason = (
                    f"its worker process failed {RETRIES + 1} times; where memory is short, fewer "
                    f"backend.workers need less. The last time: {error}"
                )
                asked = self._ask(asked.message, asked.arguments)
        return Message(Error(WORKER_FAILED, reason), reply_to=asked.message)

    def set_run(self, run: Any) -> None:
        """Do nothing: a grid is made for one run."""

    @property
    def run(self) -> NoReturn:
        """Not used by strategies."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not used by strategies, which make a `Message` themselves."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> NoReturn:
        """Not used by strategies; see `send_and_receive`."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> NoReturn:
        """Not used by strategies; see `send_and_receive`."""
        raise NotImplementedError


def worker_count() -> int:
    """Clients that Ray can train at the same time."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _answer(
    app: ClientApp,
    message: Message,
    state: RecordDict | None,
    timeout: float | None,
    names: list[str],
    *arrays: ArrayRecord,
) -> tuple[Message, RecordDict | None]:
    """In a worker: let the client answer; return the reply and the client's new state."""
    for name, record in zip(names, arrays, strict=True):
        message.content[name] = record
    context = Context(0, message.metadata.dst_node_id, {}, state or RecordDict(), {})
    with _time_limit(timeout):
        reply = app(message, context)
    if reply.has_content():
        for name, record in reply.content.array_records.items():
            reply.content[name] = _by_reference(record)
    for name, record in context.state.array_records.items():
        context.state[name] = _by_reference(record)
    return reply, context.state if context.state else None


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


def _by_reference(record: ArrayRecord) -> ArrayRecord:
    """Let Ray keep the arrays' bytes beside the record, where they are read without a copy."""
    shared = ArrayRecord()
    for name, array in record.items():
        shared[name] = Array(array.dtype, array.shape, array.stype, b"")
        shared[name].data = np.frombuffer(array.data, np.uint8)  # type: ignore[assignment]
    return shared


def _too_late(seconds: float) -> str:
    return f"no reply within backend.client_timeout_s={seconds:g} s"


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `ClientError` in the block when its time is over, or end the process if that fails."""
    if seconds is None:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        where = f" (it was in {frame.f_code.co_filename}:{frame.f_lineno})" if frame else ""
        raise ClientError(_too_late(seconds) + where)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
