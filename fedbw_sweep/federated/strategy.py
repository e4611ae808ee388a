"""The Flower strategy: sample, send, meter, decode in order, aggregate."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from hydra.utils import get_class
from numpy.typing import NDArray

from fedbw_sweep.compression.base import all_finite
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config import RunConfig
from fedbw_sweep.errors import ClientError, ConfigError, DivergenceError
from fedbw_sweep.federated.downlink import downlink
from fedbw_sweep.federated.wire import ARRAYS, CLIENT, CONFIG, FROZEN, ROUND, pack, parts, unpack
from fedbw_sweep.metering import METRICS, Ledger
from fedbw_sweep.seeding import sample_clients

CHUNK = 2**16
MODEL = "model"
NUMPY = "numpy.ndarray"
"""Flower's name for how it serialises arrays."""


@dataclass(frozen=True)
class ClientReport:
    """What a client says of its round: weight, loss in nats per token, wall-clock seconds."""

    client: int
    examples: int
    steps: int
    train_loss: float
    train_seconds: float
    encode_seconds: float

    @classmethod
    def of(cls, client: int, metrics: Mapping[str, Any]) -> Self:
        """Read the report out of a reply's metrics."""
        return cls(
            client,
            examples=metrics["num-examples"],
            steps=metrics["steps"],
            train_loss=metrics["train-loss"],
            train_seconds=metrics["train-seconds"],
            encode_seconds=metrics["encode-seconds"],
        )


class Metered(FedAvg):
    """What every run's strategy shares: encoded updates, weighed in order, and every byte booked.

    Put before a Flower strategy in a class's bases (`metered` does), it hands that strategy the
    mean model of each round as if it were the only reply; what the strategy makes of it, the global
    model of the next round, is its own affair. The mean model is what the global one becomes with
    the mean of the clients' decoded updates, or that of their decoded weights (``upload``), each
    weighted by the number of training sequences (McMahan et al. 2017, arXiv:1602.05629). Arrays
    that are not floating point have no mean: those of the client with the most sequences are taken.

    Flower numbers its nodes at random and lists them in any order, so clients are numbered by the
    sorted node ids, sampled by that number with the run's own generator, and their replies are
    summed in its order, each as soon as those before it are.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.
    frozen : bytes
        The frozen arrays, for the first message to each client; empty if clients have them.

    Attributes
    ----------
    ledger : Ledger
        Every message of the run so far.
    reports : dict of int to list of ClientReport
        Each round's clients, in their order.
    parts : Counter of (tensor, part) to int
        Where the bytes of the last round's updates are; see `Compressor.parts`.
    exact : bytes
        The global model's arrays that are not floating point.
    decode_seconds : dict of int to float
        Seconds of decoding each round's updates, one after the other.
    """

    def __init__(self, config: RunConfig, layout: Layout, frozen: bytes = b"") -> None:
        # Clients are sampled here, and the held-out loss is the server's.
        super().__init__(fraction_train=0.0, fraction_evaluate=0.0, **config.server.parameters)
        self.config, self.layout, self.frozen = config, layout, frozen
        self.compressor = config.compression.build()
        self.downlink = downlink(config, layout)
        self.ledger = Ledger(layout.dense_bytes)
        self.reports: dict[int, list[ClientReport]] = {}
        self.parts: Counter[tuple[str, str]] = Counter()
        self.decode_seconds: defaultdict[int, float] = defaultdict(float)
        self.nodes: list[int] = []  # node ids by client
        self.client_of: dict[int, int] = {}  # clients that will reply by node id, in their order
        self.global_vector = np.empty(0, np.float32)
        self.exact = b""
        self.replied: set[int] = set()  # clients that have, so that they hold the frozen arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the round's clients; address the global model, or what they lack of it, to them.

        What is sent to a client that drops out is booked like any other message, but goes nowhere.
        """
        super().configure_train(server_round, arrays, config, grid)  # it may note the model
        self.global_vector = vector_of(arrays)
        if not self.nodes:
            self.nodes = sorted(grid.get_node_ids())
        if len(self.nodes) != self.config.num_clients:
            there = f"{len(self.nodes)} of {self.config.num_clients}"
            raise ClientError(f"{there} clients are connected")
        sampled, dropped = sample_clients(
            self.config.seed,
            server_round,
            len(self.nodes),
            self.config.clients_per_round,
            self.config.clients.dropout,
        )
        self.downlink.prepare(server_round, self.global_vector, self.exact)

        @cache  # what is the same is stored once
        def record(payload: bytes, tail: bytes) -> ArrayRecord:
            return pack(payload + tail if tail else payload)

        self.client_of, messages = {}, []
        for client, drops_out in zip(sampled.tolist(), dropped, strict=True):
            instruction = ConfigRecord({CLIENT: client, ROUND: server_round})
            frozen = b"" if client in self.replied else self.frozen
            if frozen:
                instruction[FROZEN] = True
            content = RecordDict(
                {ARRAYS: record(self.downlink.payload_for(client), frozen), CONFIG: instruction}
            )
            self.ledger.sent(server_round, client, content, len(frozen))
            if not drops_out:
                self.client_of[self.nodes[client]] = client
                messages.append(Message(content, self.nodes[client], MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, book, decode and average the round's replies; let the strategy take its step.

        Raises
        ------
        ClientError
            If a client failed or did not answer in time.
        MeteringError
            If a client counted other bytes than the server.
        DivergenceError
            If the new global model is not finite.
        """
        total = np.zeros(self.layout.size)
        weight_sum = most = 0
        for client, reply in self._in_order(replies):
            content = self._content(server_round, client, reply)
            self.ledger.received(server_round, client, content)
            self.downlink.replied(client)
            self.replied.add(client)
            report = ClientReport.of(client, content.metric_records[METRICS])
            self.reports.setdefault(server_round, []).append(report)
            arrays = content.array_records[ARRAYS]
            started = time.perf_counter()
            upload, exact = unpack(arrays, self.compressor, self.layout)
            self.decode_seconds[server_round] += time.perf_counter() - started
            if server_round == self.config.rounds:
                self.parts += parts(arrays, self.compressor, self.layout)
            _add(total, upload, report.examples)
            del upload
            weight_sum += report.examples
            if report.examples > most:
                most, self.exact = report.examples, exact
        if not weight_sum:  # all dropped out: the model stays
            return None, None
        total /= weight_sum
        if self.config.upload == "update":
            total += self.global_vector
        with np.errstate(over="ignore", invalid="ignore"):
            model = arrays_of(total.astype(np.float32))
            del total  # the strategy, too, needs memory
            mean = Message(
                RecordDict(
                    {
                        ARRAYS: model,
                        METRICS: MetricRecord({self.weighted_by_key: weight_sum}),
                    }
                ),
                self.nodes[0],
                MessageType.TRAIN,
            )
            stepped, _ = super().aggregate_train(server_round, [mean])
            assert stepped is not None
            vector = vector_of(stepped)
        if not all_finite(vector):
            raise DivergenceError(
                f"round {server_round}: the new global model is not finite; lower lr, or the "
                "server's learning rate"
            )
        return arrays_of(vector), None

    def _in_order(self, replies: Iterable[Message]) -> Iterator[tuple[int, Message | None]]:
        """Yield the round's clients in order with their replies, holding back only early ones."""
        early: dict[int, Message] = {}
        arriving = iter(replies)
        for node, client in self.client_of.items():
            while node not in early and (reply := next(arriving, None)):
                early[reply.metadata.src_node_id] = reply
            yield client, early.pop(node, None)

    def _content(self, server_round: int, client: int, reply: Message | None) -> RecordDict:
        if reply is None:
            waited = self.config.backend.client_timeout_s
            raise ClientError(
                f"round {server_round}, client {client}: no reply within "
                f"backend.client_timeout_s={waited:g} s"
            )
        if reply.has_error():
            raise ClientError(f"round {server_round}, client {client}: {reply.error.reason}")
        return reply.content


OF_THE_MEAN = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)
"""Flower's strategies that are a function of the mean; its others compare replies one by one."""


def metered(config: RunConfig, layout: Layout, frozen: bytes = b"") -> Metered:
    """Make the run's strategy: `Metered` before the class that ``server`` names.

    Raises
    ------
    ConfigError
        If the class is not there, is no strategy of the mean, or refuses its parameters.
    """
    try:
        strategy = get_class(config.server.target)
    except ImportError as error:
        raise ConfigError("server._target_", config.server.target, str(error)) from None
    flowers_own = strategy.__module__.startswith("flwr.")
    if not issubclass(strategy, FedAvg) or (flowers_own and strategy not in OF_THE_MEAN):
        allowed = ", ".join(cls.__name__ for cls in OF_THE_MEAN)
        raise ConfigError(
            "server._target_",
            config.server.target,
            "must be a Flower strategy that makes its step of the clients' mean: "
            f"{allowed} of flwr.serverapp.strategy, or a FedAvg of your own",
        )
    try:
        built: Metered = type("Strategy", (Metered, strategy), {})(config, layout, frozen)
    except TypeError as error:
        raise ConfigError("server", config.server.name, str(error)) from None
    return built


class _Vector(Array):
    """A vector as it is: what a strategy holds between rounds goes nowhere, so why serialise it."""

    def __init__(self, vector: FloatVector) -> None:
        super().__init__(str(vector.dtype), vector.shape, NUMPY, b"")
        self.vector = vector

    def numpy(self) -> FloatVector:
        """Return a copy, as Flower does: a strategy may work in it."""
        return self.vector.copy()


def arrays_of(vector: FloatVector) -> ArrayRecord:
    """Hold a global model as Flower's strategies do between rounds: as plain numbers."""
    arrays = ArrayRecord()
    arrays[MODEL] = _Vector(vector)  # given to ArrayRecord itself, it would become an Array again
    return arrays


def vector_of(arrays: ArrayRecord) -> FloatVector:
    """Return what `arrays_of` holds, or what a strategy made of it, in float32."""
    array = arrays[MODEL]
    vector = array.vector if isinstance(array, _Vector) else array.numpy()
    return vector.astype(np.float32, copy=False)


def _add(total: NDArray[np.float64], update: FloatVector, weight: int) -> None:
    """``total += weight * update`` in float64, in pieces that stay in a core's cache."""
    for start in range(0, total.size, CHUNK):
        piece = slice(start, start + CHUNK)
        total[piece] += update[piece] * np.float64(weight)
