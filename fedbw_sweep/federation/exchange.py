"""What a round exchanges: instructions and the model down, encoded updates up; all of it booked."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedbw_sweep.compression.base import NOTHING_KNOWN, Known
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ClientError
from fedbw_sweep.federation.books import Books, Recoder, books_key
from fedbw_sweep.federation.downlink import downlink
from fedbw_sweep.federation.ledger import METRICS, ClientReport
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
from fedbw_sweep.sampling import Cohort


class Exchange:
    """Packs and counts what goes down, counts and unpacks what comes up.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.
    frozen : bytes
        The frozen arrays, for the first message to each client; empty if clients have them.
    initial : ndarray of float32, shape (layout.size,)
        The model before the first round.
    may_end : callable
        Whether a run may end with a round, so that the parts of its uplink are counted.
    methods : sequence of CompressionConfig
        Those of the job's runs; what another than the config's sends is counted as well.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        frozen: bytes,
        initial: FloatVector,
        may_end: Callable[[int], bool],
        methods: Sequence[CompressionConfig] = (),
    ) -> None:
        self.config, self.layout, self.frozen, self.initial = config, layout, frozen, initial
        self.may_end = may_end
        self.compressor = config.compression.build()
        self.downlink = downlink(config, layout)
        own = books_key(config.compression)
        self.own = Books(layout)
        self.recoders = {
            key: Recoder(method.build(), layout, config.seed)
            for method in methods
            if (key := books_key(method)) != own
        }
        others = {key: recoder.books for key, recoder in self.recoders.items()}
        self.books = {own: self.own, **others}  # by method; see `books_key`
        self.reports: defaultdict[int, list[ClientReport]] = defaultdict(list)  # by round
        self.replied: set[int] = set()  # clients that hold the frozen arrays

    def instruct(
        self, number: int, cohort: Cohort, nodes: list[int], vector: FloatVector, exact: bytes
    ) -> list[Message]:
        """Make a round's messages and book what each client is sent.

        What goes to a client that drops out is booked, and goes nowhere.

        Parameters
        ----------
        number : int
            The round.
        cohort : Cohort
            Its clients.
        nodes : list of int
            Each client's node id.
        vector : ndarray of float32, shape (layout.size,)
            The global model.
        exact : bytes
            Its arrays that are not floating point.
        """
        for books in self.books.values():
            books.parts = Counter()
        self.downlink.prepare(number, vector, exact)

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
            self.own.ledger.sent(number, client, content, len(frozen))
            for recoder in self.recoders.values():
                recoder.books.ledger.book(number, client, "downlink", content, len(frozen))
            if not drops_out:
                messages.append(Message(content, nodes[client], MessageType.TRAIN))
        return messages

    def receive(
        self, number: int, client: int, reply: Message | None
    ) -> tuple[FloatVector, bytes, ClientReport]:
        """Check, book and decode one reply: the upload, its exact arrays and the client's report.

        Raises
        ------
        ClientError
            If there is no reply, or it is an error.
        MeteringError
            If the client counted other bytes than the server.
        PayloadError
            If the payload is damaged.
        """
        where = f"round {number}, client {client}"
        if reply is None:
            waited = self.config.backend.client_timeout_s
            raise ClientError(f"{where}: no reply within backend.client_timeout_s={waited:g} s")
        if reply.has_error():
            raise ClientError(f"{where}: {reply.error.reason}")
        self.own.ledger.received(number, client, reply.content)
        self.downlink.replied(client)
        self.replied.add(client)
        report = ClientReport.of(client, reply.content.metric_records[METRICS])
        self.reports[number].append(report)
        self.own.encode_seconds[number] += report.encode_seconds
        arrays = reply.content.array_records[ARRAYS]
        started = time.perf_counter()
        known = NOTHING_KNOWN
        if self.compressor.uses:
            known = Known(self.initial, self.downlink.received(client))
        upload, exact = unpack(arrays, self.compressor, self.layout, known)
        self.own.decode_seconds[number] += time.perf_counter() - started
        if count_parts := self.may_end(number):
            self.own.parts += parts(arrays, self.compressor, self.layout, known)
        for recoder in self.recoders.values():
            recoder.book(number, client, reply, upload, exact, count_parts)
        return upload, exact, report

    def state(self) -> dict[str, Any]:
        """Return what clients are known to hold, and the parts of the round's uplink."""
        return {
            "downlink": self.downlink.state(),
            "replied": sorted(self.replied),
            "parts": {
                key: [[*part, count] for part, count in books.parts.items()]
                for key, books in self.books.items()
            },
        }

    def load(
        self, state: dict[str, Any], initial: FloatVector, made: bytes
    ) -> Iterator[tuple[FloatVector, list[int]]]:
        """Go on where `state` was taken; see `Downlink.load`."""
        self.replied = set(state["replied"])
        for key, books in self.books.items():
            counted = state["parts"][key]
            books.parts = Counter({(tensor, part): count for tensor, part, count in counted})
        return self.downlink.load(state["downlink"], initial, made)


def in_order(
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
