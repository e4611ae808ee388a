"""Flower's apps in this process, without Ray; node ids and reply order as random as Flower's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbw_sweep.config.groups import BackendConfig
from fedbw_sweep.federation.client import client_app
from fedbw_sweep.federation.job import Job, server_app
from fedbw_sweep.federation.runs import Sink
from fedbw_sweep.records.checkpoint import Store

Tamper = Callable[[Message], Message | None]


class LocalGrid(Grid):
    """Calls the ClientApp directly; `tamper` may change, or swallow, a reply."""

    def __init__(self, clients: int, app: ClientApp, rng: random.Random, tamper: Tamper) -> None:
        self.app, self.rng, self.tamper = app, rng, tamper
        self.contexts = {rng.getrandbits(63): None for _ in range(clients)}
        self.contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in self.contexts}

    def set_run(self, run: Any) -> None: ...

    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        nodes = list(self.contexts)
        self.rng.shuffle(nodes)
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def hold(self, nodes: Iterable[int]) -> Iterator[tuple[int, RecordDict]]:
        """See `StatefulGrid`: records are not changed in place, so that a shallow copy will do."""
        held = {node: RecordDict(dict(self.contexts[node].state)) for node in nodes}
        return iter(held.items())

    def give(self, node: int, kept: RecordDict) -> None:
        self.contexts[node].state = kept

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        pending = list(messages)
        self.rng.shuffle(pending)
        replies = [
            self.tamper(self.app(message, self.contexts[message.metadata.dst_node_id]))
            for message in pending
        ]
        return [reply for reply in replies if reply is not None]


class LocalBackend:
    """A backend in this process, without Ray; `order` seeds node ids and the order of replies."""

    def __init__(self, order: int = 0, tamper: Tamper = lambda reply: reply) -> None:
        self.order, self.tamper = order, tamper

    def __call__(self, config: BackendConfig) -> LocalBackend:
        """Stand in for `backend_of`."""
        return self

    def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 1
        clients = job.config.num_clients
        grid = LocalGrid(clients, client_app(job), random.Random(self.order), self.tamper)
        server_app(job, sinks, store)(grid, Context(0, 0, {}, RecordDict(), {}))
