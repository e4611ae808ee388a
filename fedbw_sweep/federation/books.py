"""What is counted of the uploads of a job's runs: of those that travel, and as others encode them.

Runs whose methods are lossless train the same. Their updates travel once, and what another of their
methods would have sent is counted by encoding the decoded update again.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import numpy as np
from flwr.app import Message, RecordDict

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.errors import MeteringError
from fedbw_sweep.federation.ledger import METRICS, Ledger
from fedbw_sweep.federation.packing import ARRAYS, pack, parts
from fedbw_sweep.seeding import rng_for


class Books:
    """The messages of runs with one method, the parts of their payloads, and the time they take.

    Attributes
    ----------
    ledger : Ledger
    parts : Counter
        Bytes of the round's uplink by tensor and part, where they are counted.
    encode_seconds, decode_seconds : dict of int to float
        Wall-clock seconds of each round, summed over clients.
    """

    def __init__(self, layout: Layout) -> None:
        self.ledger = Ledger(layout.dense_bytes)
        self.parts: Counter[tuple[str, str]] = Counter()
        self.encode_seconds: defaultdict[int, float] = defaultdict(float)
        self.decode_seconds: defaultdict[int, float] = defaultdict(float)


class Recoder:
    """Counts what a method would have sent of updates that arrived by another one.

    Parameters
    ----------
    compressor : Compressor
        The method, which is lossless.
    layout : Layout
        The arrays that travel.
    seed : int
        The run's.
    """

    def __init__(self, compressor: Compressor, layout: Layout, seed: int) -> None:
        self.compressor, self.layout, self.seed = compressor, layout, seed
        self.books = Books(layout)

    def book(
        self,
        number: int,
        client: int,
        reply: Message,
        upload: FloatVector,
        exact: bytes,
        count_parts: bool,
    ) -> None:
        """Count one reply.

        Parameters
        ----------
        number, client : int
            The round and the client.
        reply : Message
            As it arrived.
        upload : ndarray of float32, shape (layout.size,)
            Decoded from it.
        exact : bytes
            Its arrays that are not floating point.
        count_parts : bool
            Whether the parts of its payload are counted too.

        Raises
        ------
        MeteringError
            If the method is not lossless after all.
        """
        began = time.perf_counter()
        rng = rng_for(self.seed, "encode", client, number)
        payload = self.compressor.encode(upload, self.layout, rng)
        encoded = time.perf_counter()
        decoded = self.compressor.decode(payload, self.layout)
        if not np.array_equal(decoded.view(np.uint32), upload.view(np.uint32)):
            raise MeteringError(f"{type(self.compressor).__name__} is not lossless")
        self.books.encode_seconds[number] += encoded - began
        self.books.decode_seconds[number] += time.perf_counter() - encoded
        arrays = pack(payload + exact)
        content = RecordDict({ARRAYS: arrays, METRICS: reply.content.metric_records[METRICS]})
        self.books.ledger.book(number, client, "uplink", content)
        if count_parts:
            self.books.parts += parts(arrays, self.compressor, self.layout)


def books_key(compression: CompressionConfig) -> str:
    """Name the books of the runs with a method."""
    return compression.model_dump_json(by_alias=True)
