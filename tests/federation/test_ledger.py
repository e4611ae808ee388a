from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedbw_sweep.errors import MeteringError
from fedbw_sweep.federation.ledger import (
    METRICS,
    RECEIVED_MESSAGE,
    RECEIVED_PAYLOAD,
    SENT_MESSAGE,
    SENT_PAYLOAD,
    Ledger,
    Size,
    size_of,
)
from fedbw_sweep.federation.packing import pack


def instruction(payload: bytes) -> RecordDict:
    return RecordDict({"arrays": pack(payload), "config": ConfigRecord({"round": 1})})


def reply(payload: bytes, **changes: int) -> RecordDict:
    counts = {
        RECEIVED_PAYLOAD: 100,
        RECEIVED_MESSAGE: 100 + len("payload") + len("round") + 8,
        SENT_PAYLOAD: len(payload),
        SENT_MESSAGE: 0,
    }
    names = sum(len(name) for name in counts)
    counts[SENT_MESSAGE] = len(payload) + len("payload") + names + 4 * 8
    return RecordDict({"arrays": pack(payload), METRICS: MetricRecord({**counts, **changes})})


def test_sizes_by_hand() -> None:
    assert size_of(instruction(b"x" * 100)) == Size(100, 100 + 7 + 5 + 8)


def test_both_ends_agree() -> None:
    ledger = Ledger(dense_bytes=400)
    ledger.sent(1, 6, instruction(b"x" * 100))
    ledger.received(1, 6, reply(b"y" * 30))
    assert [(e.direction, e.client, e.payload_bytes, e.dense_bytes) for e in ledger.entries] == [
        ("downlink", 6, 100, 400),
        ("uplink", 6, 30, 400),
    ]


@pytest.mark.parametrize("count", [RECEIVED_PAYLOAD, RECEIVED_MESSAGE, SENT_PAYLOAD, SENT_MESSAGE])
def test_any_of_the_four_counts_can_fail(count: str) -> None:
    ledger = Ledger(dense_bytes=400)
    ledger.sent(1, 6, instruction(b"x" * 100))
    with pytest.raises(MeteringError, match=f"round 1, client 6: {count} is 7 by the client"):
        ledger.received(1, 6, reply(b"y" * 30, **{count: 7}))


def test_an_encoded_payload_cannot_be_averaged_by_mistake() -> None:
    array = pack(b"\x00" * 8)["payload"]
    assert array.data == b"\x00" * 8
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        array.numpy()


def test_flower_counts_what_we_pack() -> None:
    import numpy as np

    dense = ArrayRecord({"w": Array(np.zeros(1000, np.float32))})
    assert dense.count_bytes() == 4000 + 128 + 1  # npy's header; ours has none
    assert pack(b"\x00" * 4000).count_bytes() == 4000 + len("payload")
