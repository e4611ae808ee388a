"""The Flower strategy: sample, send, meter, decode in order, aggregate."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedbw_sweep.compression.base import FloatVector, Layout
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.config import RunConfig
from fedbw_sweep.errors import ClientError, DivergenceError
from fedbw_sweep.federated.wire import ARRAYS, CLIENT, CONFIG, ROUND, pack, unpack
from fedbw_sweep.metering import METRICS, Ledger
from fedbw_sweep.seeding import rng_for


class MeteredFedAvg(FedAvg):
    """Federated averaging of encoded updates (McMahan et al. 2017, arXiv:1602.05629), metered.

    The global model is what the clients receive plus the mean of their decoded updates, weighted by
    the number of training sequences. Flower numbers its nodes at random and lists them in any
    order, so clients are numbered by the sorted node ids, sampled by that number with the run's own
    generator, and their replies are sorted by it before any sum.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.
    ledger : Ledger
        Where every message is booked.
    """

    def __init__(self, config: RunConfig, layout: Layout, ledger: Ledger) -> None:
        super().__init__(fraction_evaluate=0.0)  # the held-out loss is the server's
        self.config, self.layout, self.ledger = config, layout, ledger
        self.compressor = config.compression.build()
        self.model = Dense()
        self.global_vector: FloatVector
        self.client_of: dict[int, int] = {}
        self.client_metrics: dict[int, list[dict[str, float]]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the round's clients and address the global model to each."""
        content = RecordDict({ARRAYS: arrays})
        self.global_vector, self.global_exact = unpack(content, self.model, self.layout)
        nodes = sorted(grid.get_node_ids())
        rng = rng_for(self.config.seed, "sample", server_round)
        sampled = rng.choice(len(nodes), self.config.clients_per_round, replace=False)
        self.client_of = {nodes[client]: int(client) for client in sorted(sampled)}
        messages = []
        for node, client in self.client_of.items():
            instruction = ConfigRecord({CLIENT: client, ROUND: server_round})
            content = RecordDict({ARRAYS: arrays, CONFIG: instruction})
            self.ledger.sent(server_round, client, content)
            messages.append(Message(content, node, MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, book, decode and average the round's replies.

        Raises
        ------
        ClientError
            If a client failed or did not answer in time.
        MeteringError
            If a client counted other bytes than the server.
        DivergenceError
            If the new global model is not finite.
        """
        by_client = {self.client_of[reply.metadata.src_node_id]: reply for reply in replies}
        total = np.zeros(self.layout.size)
        exact_total = [np.zeros(t.shape) for t in self.layout.exact]
        weight_sum = 0
        for client in self.client_of.values():
            content = self._content(server_round, client, by_client.pop(client, None))
            self.ledger.received(server_round, client, content)
            metrics = dict(content.metric_records[METRICS])
            self.client_metrics.setdefault(server_round, []).append({**metrics, CLIENT: client})  # type: ignore[dict-item]
            weight = int(metrics["num-examples"])  # type: ignore[arg-type]
            update, exact = unpack(content, self.compressor, self.layout)
            total += weight * update.astype(np.float64)
            weight_sum += weight
            for sums, array in zip(exact_total, self._exact_arrays(exact), strict=True):
                sums += weight * array
        vector = (self.global_vector + total / weight_sum).astype(np.float32)
        if not np.isfinite(vector).all():
            raise DivergenceError(
                f"round {server_round}: the averaged model is not finite; lower lr"
            )
        exact = b"".join(
            np.rint(sums / weight_sum).astype(t.dtype).tobytes()
            for sums, t in zip(exact_total, self.layout.exact, strict=True)
        )
        return self.encode_model(vector, exact), None

    def encode_model(self, vector: FloatVector, exact: bytes) -> ArrayRecord:
        """Encode the global model for the way down."""
        return pack(self.model.encode(vector, self.layout, rng_for(self.config.seed)) + exact)

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

    def _exact_arrays(self, exact: bytes) -> Iterable[np.ndarray]:
        start = 0
        for tensor in self.layout.exact:
            flat = np.frombuffer(exact, tensor.dtype, tensor.size, start)
            yield flat.reshape(tensor.shape)
            start += tensor.nbytes
