"""Federated averaging, round by round (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedbw_sweep.compression.base import all_finite
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ClientError, DivergenceError
from fedbw_sweep.federation.average import WeightedMean
from fedbw_sweep.federation.downlink import downlink
from fedbw_sweep.federation.ledger import METRICS, ClientReport, Ledger
from fedbw_sweep.federation.optimizers import ServerStep
from fedbw_sweep.federation.packing import (
    ARRAYS,
    CLIENT,
    CONFIG,
    FROZEN,
    ROUND,
    pack,
    parts,
    unpack,
)
from fedbw_sweep.records.schema import End
from fedbw_sweep.sampling import Cohort, Numbers

Evaluate = Callable[[int, "Server"], End | None]
"""Evaluates and records the global model after a round; it may end the run, saying how."""


class Server:
    """Samples clients, sends them the model, averages what they reply, and steps.

    Flower numbers its nodes at random and lists them in any order, so clients are numbered by the
    sorted node ids, and their replies are summed in the order of these numbers, each as soon as
    those before it are.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.
    vector : ndarray of float32, shape (layout.size,)
        The initial model.
    exact : bytes
        Its arrays that are not floating point.
    frozen : bytes
        The frozen arrays, for the first message to each client; empty if clients have them.
    sizes : ndarray of int64, shape (num_clients,)
        Training sequences of each client.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        vector: FloatVector,
        exact: bytes,
        frozen: bytes,
        sizes: Numbers,
    ) -> None:
        self.config, self.layout = config, layout
        self.vector, self.exact, self.frozen = vector, exact, frozen
        self.sampler = config.sampler(sizes)
        self.compressor = config.compression.build()
        self.downlink = downlink(config, layout)
        self.server_step = ServerStep(config.server)
        self.ledger = Ledger(layout.dense_bytes)
        self.reports: defaultdict[int, list[ClientReport]] = defaultdict(list)  # by round
        self.parts: Counter[tuple[str, str]] = Counter()  # bytes of the last round's uplink
        self.decode_seconds: defaultdict[int, float] = defaultdict(float)  # by round
        self.replied: set[int] = set()  # clients that hold the frozen arrays
        self.finished = -1  # the last round that is over; 0 is the initial model's evaluation

    def run(self, grid: Grid, evaluate: Evaluate) -> End:
        """Do the rounds that are left, each evaluated after its step; say how the run ended.

        Raises
        ------
        ClientError
            If a client failed or did not answer in time.
        MeteringError
            If a client counted other bytes than the server.
        DivergenceError
            If a model is not finite.
        """
        nodes = sorted(grid.get_node_ids())
        if len(nodes) != self.config.num_clients:
            raise ClientError(f"{len(nodes)} of {self.config.num_clients} clients are connected")
        for number in range(self.finished + 1, self.config.rounds + 1):
            if number:
                self._train(number, grid, nodes)
            self.finished = number
            if end := evaluate(number, self):
                return end
        return End("rounds")

    def _train(self, number: int, grid: Grid, nodes: list[int]) -> None:
        cohort = self.sampler.cohort(number)
        messages = self._send(number, cohort, nodes)
        replies = grid.send_and_receive(messages, timeout=self.config.backend.client_timeout_s)
        mean = WeightedMean(self.layout.size)
        for client, reply in _in_order(replies, cohort.replying.tolist(), nodes):
            upload, exact, report = self._receive(number, client, reply)
            weight = cohort.weight(client, report.examples)
            mean.add(upload, exact, weight, report.examples)
        if not mean.weight:  # all dropped out: the model stays
            return
        self.vector = self.server_step(self.vector, mean.take(), self.config.upload)
        self.exact = mean.exact
        if not all_finite(self.vector):
            raise DivergenceError(
                f"round {number}: the new global model is not finite; lower lr, or server.lr"
            )

    def _send(self, number: int, cohort: Cohort, nodes: list[int]) -> list[Message]:
        """Book what each client is sent; what goes to one that drops out goes nowhere."""
        self.downlink.prepare(number, self.vector, self.exact)

        @cache  # what is the same is stored once
        def record(payload: bytes, tail: bytes) -> ArrayRecord:
            return pack(payload + tail if tail else payload)

        messages = []
        for client, drops_out in zip(cohort.clients.tolist(), cohort.dropped, strict=True):
            instruction = ConfigRecord({CLIENT: client, ROUND: number})
            frozen = b"" if client in self.replied else self.frozen
            if frozen:
                instruction[FROZEN] = True
            arrays = record(self.downlink.payload_for(client), frozen)
            content = RecordDict({ARRAYS: arrays, CONFIG: instruction})
            self.ledger.sent(number, client, content, len(frozen))
            if not drops_out:
                messages.append(Message(content, nodes[client], MessageType.TRAIN))
        return messages

    def _receive(
        self, number: int, client: int, reply: Message | None
    ) -> tuple[FloatVector, bytes, ClientReport]:
        """Check, book and decode one reply."""
        where = f"round {number}, client {client}"
        if reply is None:
            waited = self.config.backend.client_timeout_s
            raise ClientError(f"{where}: no reply within backend.client_timeout_s={waited:g} s")
        if reply.has_error():
            raise ClientError(f"{where}: {reply.error.reason}")
        self.ledger.received(number, client, reply.content)
        self.downlink.replied(client)
        self.replied.add(client)
        report = ClientReport.of(client, reply.content.metric_records[METRICS])
        self.reports[number].append(report)
        arrays = reply.content.array_records[ARRAYS]
        started = time.perf_counter()
        upload, exact = unpack(arrays, self.compressor, self.layout)
        self.decode_seconds[number] += time.perf_counter() - started
        if number == self.config.rounds:
            self.parts += parts(arrays, self.compressor, self.layout)
        return upload, exact, report

    def state(self) -> dict[str, Any]:
        """Return all that the next round depends on; what clients keep is the grid's."""
        return {
            "round": self.finished,
            "vector": self.vector,
            "exact": self.exact,
            "optimizer": self.server_step.state(),
            "downlink": self.downlink.state(),
            "replied": sorted(self.replied),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on after the round that `state` was taken in."""
        self.finished, self.vector, self.exact = state["round"], state["vector"], state["exact"]
        self.server_step.load(state["optimizer"])
        self.downlink.load(state["downlink"])
        self.replied = set(state["replied"])


def _in_order(
    replies: Iterable[Message], clients: list[int], nodes: list[int]
) -> Iterator[tuple[int, Message | None]]:
    """Yield clients in order with their replies, holding back only early ones."""
    early: dict[int, Message] = {}
    arriving = iter(replies)
    for client in clients:
        node = nodes[client]
        while node not in early and (reply := next(arriving, None)):
            early[reply.metadata.src_node_id] = reply
        yield client, early.pop(node, None)
