"""Message -> byte counts, at both ends, and the ledger in which they must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from flwr.app import Context, Message, RecordDict

from fedbw_sweep.errors import MeteringError

RECEIVED_PAYLOAD, RECEIVED_MESSAGE = "received-payload-bytes", "received-message-bytes"


SENT_PAYLOAD, SENT_MESSAGE = "sent-payload-bytes", "sent-message-bytes"


METRICS = "metrics"


ClientAppCallable = Callable[[Message, Context], Message]
"""What a client mod calls: the next mod, or the ClientApp itself."""


@dataclass(frozen=True)
class Size:
    """Bytes of one message.

    Attributes
    ----------
    payload : int
        The encoded model or update alone.
    message : int
        All that Flower counts: payload, keys, configuration and metrics (``count_bytes()``).
    """

    payload: int
    message: int


def size_of(content: RecordDict) -> Size:
    """Count one message's content."""
    payload = sum(len(a.data) for arrays in content.array_records.values() for a in arrays.values())
    return Size(payload, sum(record.count_bytes() for record in content.values()))


def metering_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Client mod: count what arrives and what leaves, and report both in the reply's metrics.

    The four counts are integers of 8 bytes whatever their value, so that they can be reserved
    first, counted with the rest, and filled in.
    """
    received = size_of(message.content)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    metrics = reply.content.metric_records[METRICS]
    metrics[RECEIVED_PAYLOAD], metrics[RECEIVED_MESSAGE] = received.payload, received.message
    metrics[SENT_PAYLOAD] = metrics[SENT_MESSAGE] = 0
    sent = size_of(reply.content)
    metrics[SENT_PAYLOAD], metrics[SENT_MESSAGE] = sent.payload, sent.message
    return reply


@dataclass(frozen=True)
class Entry:
    """One message in the ledger; the columns of ``messages.parquet``."""

    round: int
    client: int
    direction: str
    payload_bytes: int
    message_bytes: int
    dense_bytes: int
    frozen_bytes: int


class Ledger:
    """The server's book of every message, checked against what each client counted.

    Parameters
    ----------
    dense_bytes : int
        Bytes of the model sent dense: what each message is compared with.
    """

    def __init__(self, dense_bytes: int) -> None:
        self.dense_bytes = dense_bytes
        self.entries: list[Entry] = []
        self._last_sent: dict[int, Size] = {}  # by client

    def sent(
        self, server_round: int, client: int, content: RecordDict, frozen_bytes: int = 0
    ) -> None:
        """Book a message from the server to a client, `frozen_bytes` of it frozen arrays."""
        self._last_sent[client] = self.book(server_round, client, "downlink", content, frozen_bytes)

    def received(self, server_round: int, client: int, content: RecordDict) -> None:
        """Book a client's reply and compare both directions with the client's own counts.

        Raises
        ------
        MeteringError
            If any of the four counts differs.
        """
        size = self.book(server_round, client, "uplink", content)
        down = self._last_sent[client]
        metrics = content.metric_records[METRICS]
        book = {
            RECEIVED_PAYLOAD: down.payload,
            RECEIVED_MESSAGE: down.message,
            SENT_PAYLOAD: size.payload,
            SENT_MESSAGE: size.message,
        }
        for count, expected in book.items():
            if metrics[count] != expected:
                raise MeteringError(
                    f"round {server_round}, client {client}: {count} is {metrics[count]} "
                    f"by the client's count and {expected} by the server's"
                )

    def book(
        self,
        server_round: int,
        client: int,
        direction: str,
        content: RecordDict,
        frozen_bytes: int = 0,
    ) -> Size:
        """Book a message in one direction, ``uplink`` or ``downlink``; return its size."""
        size, dense = size_of(content), self.dense_bytes + frozen_bytes
        self.entries.append(
            Entry(server_round, client, direction, size.payload, size.message, dense, frozen_bytes)
        )
        return size

    def rows(self) -> Iterable[dict[str, int | str]]:
        """Yield each entry as a row of ``messages.parquet``."""
        return (asdict(entry) for entry in self.entries)


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
