"""Flower's Grid on Ray: workers that stay warm, one copy of the model a round, replies in order."""

from __future__ import annotations

import faulthandler
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from ray.exceptions import RayError, RayTaskError

from fedbw_sweep.backends.ray.cluster import (
    Reference,
    alive_nodes,
    client_gpus,
    connect,
    submit,
    worker_count,
)
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ClientError

RETRIES = 3
"""How often a message is given to another worker after its own was killed."""
IN_FLIGHT_PER_WORKER = 4
"""Messages handed to Ray at once, per worker: enough that none waits for the server, few enough
that replies waiting for an earlier one stay few."""


WORKER_FAILED = 2
"""Error code of the reply of a client whose worker process could not be kept alive."""


GRACE_S = 10.0
"""How long after its time limit a client that does not even react to signals is killed."""


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
    """

    def __init__(
        self,
        num_clients: int,
        client_app: ClientApp,
        client_gpus: float = 0.0,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, num_clients
        self.nodes = range(num_clients)
        self.app = ray.put(client_app)
        self.states: dict[int, Reference] = {}
        self.client_gpus = client_gpus
        nodes = alive_nodes()
        self.window = IN_FLIGHT_PER_WORKER * worker_count(nodes)
        self.keep_states = len(nodes) > 1

    @classmethod
    def of(cls, config: RunConfig, client_app: ClientApp) -> Self:
        """Make a run's grid, on the Ray that ``backend`` names; it is started where need be."""
        connect(config)
        return cls(config.num_clients, client_app, client_gpus(config))

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
        reply, state = submit(_answer, arguments, gpus=self.client_gpus, returns=2)
        return _Asked(message, arguments, reply, state, time.monotonic())

    def _reply(self, asked: _Asked) -> Message:
        """Wait for a reply; ask again where the worker, not the client, failed."""
        failures = 0
        while True:
            try:
                answered: Message = ray.get(asked.reply)  # type: ignore[assignment]
                # With its machine a state would be lost: what this machine holds is not.
                state = ray.put(ray.get(asked.state)) if self.keep_states else asked.state
                self.states[asked.message.metadata.dst_node_id] = state
                return answered
            except RayTaskError as error:
                reason = str(error.cause)
                break
            except RayError as error:
                failures += 1
                timeout = asked.arguments[3]
                if timeout is not None and time.monotonic() - asked.at > timeout + GRACE_S:
                    reason = _too_late(timeout)
                    break
                if failures > RETRIES:
                    reason = (
                        f"its worker process failed {failures} times; where memory is short, fewer "
                        f"backend.workers need less. The last time: {error}"
                    )
                    break
                asked = self._ask(asked.message, asked.arguments)
        return Message(Error(WORKER_FAILED, reason), reply_to=asked.message)

    def hold(self, nodes: Iterable[int]) -> Iterator[tuple[int, RecordDict]]:
        """See `StatefulGrid`."""
        held = {node: self.states[node] for node in nodes if node in self.states}
        read = ((node, ray.get(state)) for node, state in held.items())
        return ((node, kept) for node, kept in read if kept is not None)

    def give(self, node: int, kept: RecordDict) -> None:
        """See `StatefulGrid`."""
        for name, record in kept.array_records.items():
            kept[name] = _by_reference(record)
        self.states[node] = ray.put(kept)

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
