"""The way down as one update per client: from the model that it holds to the global one."""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from math import sqrt
from tempfile import TemporaryFile
from typing import Any
from weakref import finalize

import numpy as np

from fedbw_sweep.compression.base import Compressor, Known, ScaledCompressor
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.federation.rebuild import WHOLE, updated
from fedbw_sweep.seeding import rng_for

INITIAL, NONE = 0, -1
"""The version that is the model before the first round, and that of clients without a model."""

CACHE_BYTES = 256_000_000
"""Bytes of models that are at hand; all others are rebuilt when they are needed."""

ENTRY = struct.Struct("<iQ")
"""The version that another starts from, and the bytes of what it adds."""


class Versions:
    """Models that clients hold or may come to hold, each kept as what it is made of.

    Each but the initial one is an update to another, or whole. The updates lie in a temporary file:
    together they weigh no more than what was sent.

    Parameters
    ----------
    compressor : Compressor
        What the updates were encoded with.
    layout : Layout
        The arrays that travel.

    Attributes
    ----------
    initial : ndarray of float32, shape (layout.size,)
        Version 0; empty until it is set.
    """

    def __init__(self, compressor: Compressor, layout: Layout) -> None:
        self.compressor, self.layout = compressor, layout
        self.initial: FloatVector = np.empty(0, np.float32)
        self.parents, self._places = [NONE], [(0, 0)]
        self._file = TemporaryFile()  # noqa: SIM115
        finalize(self, self._file.close)
        self._at_hand = OrderedDict[int, FloatVector]()

    def add(self, parent: int, body: bytes) -> int:
        """Keep another version; return its number.

        Parameters
        ----------
        parent : int
            The version that it starts from; -1 if it is whole.
        body : bytes
            The update to that, encoded, or the whole model.
        """
        self._places.append((self._file.seek(0, 2), len(body)))
        self._file.write(body)
        self.parents.append(parent)
        return len(self.parents) - 1

    def body(self, version: int) -> bytes:
        """Return what a version adds to the one that it starts from."""
        start, length = self._places[version]
        self._file.seek(start)
        return self._file.read(length)

    def model(self, version: int) -> FloatVector:
        """Return a model, which must not be changed: rebuilt as its clients did, if need be."""
        missing = []
        while version not in (INITIAL, NONE) and version not in self._at_hand:
            missing.append(version)
            version = self.parents[version]
        model = self.initial
        if version in self._at_hand:
            self._at_hand.move_to_end(version)
            model = self._at_hand[version]
        for each in reversed(missing):
            model = self._next(each, model)
        if missing:
            self._at_hand[missing[0]] = model
            while len(self._at_hand) > max(1, CACHE_BYTES // max(1, 4 * self.layout.size)):
                self._at_hand.popitem(last=False)
        return model

    def _next(self, version: int, model: FloatVector) -> FloatVector:
        if self.parents[version] == NONE:
            return Dense().decode(self.body(version), self.layout)
        return updated(model, self.body(version), self.compressor, self.layout, self.initial)


class Merged:
    """One update for each client: what the global model has that the client's model has not.

    What one update leaves unsent is in the client's next, as with error feedback. A quantiser's
    step is in units of how far the last round has moved the global model, however much a client has
    missed; the server knows each client's model bit by bit. Clients with one model are sent one
    payload. The whole model is sent where it is fewer bytes.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.

    Attributes
    ----------
    version_of : dict of int to int
        The version of each client that has replied.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.compressor, self.layout = config.downlink.build("downlink"), layout
        self.seed = config.seed
        self.first = INITIAL if config.initial_model == "known" else NONE
        self.version_of = dict[int, int]()
        self.latest = np.empty(0, np.float32)
        self.moved = 0.0  # rms of what the last round has changed
        self.versions = Versions(self.compressor, layout)
        self.made = b""

    def prepare(self, server_round: int, vector: FloatVector, exact: bytes) -> None:
        """See `Downlink`."""
        if server_round == 1:
            self.versions.initial = self.latest = vector
        with np.errstate(over="ignore"):
            change = vector - self.latest
        energy = float(np.einsum("i,i->", change, change, dtype=np.float64))
        self.moved = sqrt(energy / max(1, self.layout.size)) or self.moved
        self.latest, self.exact, self.round = vector, exact, server_round
        self.made = b""
        self.sent: dict[int, tuple[int, bytes]] = {}  # by version: the next one, and the payload
        self.whole: int | None = None

    def payload_for(self, client: int) -> bytes:
        """See `Downlink`.

        Raises
        ------
        DivergenceError
            If the model that the client would hold is not finite.
        """
        version = self.version_of.get(client, self.first)
        if version not in self.sent:
            self.sent[version] = self._payload(version)
        return self.sent[version][1]

    def _payload(self, version: int) -> tuple[int, bytes]:
        """Return the version that a client gets to, and what brings it there."""
        if self.round == 1 and version == INITIAL:
            return version, self._packed(version, 0)
        if version != NONE:
            update = self._update_to(version)
            if LENGTH.size + len(update) <= 4 * self.layout.size:
                added = self._add(version, update)
                return added, self._packed(added, 1, LENGTH.pack(len(update)), update)
        model = self.latest.astype("<f4", copy=False).tobytes()
        if self.whole is None:
            self.whole = self._add(NONE, model)
        return self.whole, self._packed(self.whole, WHOLE, model)

    def _update_to(self, version: int) -> bytes:
        """Encode what the global model has more than a version."""
        held = self.versions.model(version)
        with np.errstate(over="ignore"):
            difference = self.latest - held
        known = Known(self.versions.initial, held)
        rng = rng_for(self.seed, "encode model", self.round, version)
        if isinstance(self.compressor, ScaledCompressor) and self.moved:
            return self.compressor.encode_in_units(difference, self.layout, rng, self.moved, known)
        return self.compressor.encode(difference, self.layout, rng, known)

    def _add(self, parent: int, body: bytes) -> int:
        self.made += ENTRY.pack(parent, len(body)) + body
        return self.versions.add(parent, body)

    def _packed(self, version: int, count: int, *body: bytes) -> bytes:
        header = HEADER.pack(zlib.crc32(self.versions.model(version).data), count)
        return b"".join([header, *body, self.exact])

    def replied(self, client: int) -> None:
        """See `Downlink`."""
        self.version_of[client] = self.sent[self.version_of.get(client, self.first)][0]

    def received(self, client: int) -> FloatVector:
        """See `Downlink`."""
        return self.versions.model(self.version_of[client])

    def state(self) -> dict[str, Any]:
        """See `Downlink`: the models of all clients are made of the updates."""
        return {
            "latest": self.latest,
            "moved": self.moved,
            "version_of": dict(self.version_of),
        }

    def load(
        self, state: dict[str, Any], initial: FloatVector, made: bytes
    ) -> Iterator[tuple[FloatVector, list[int]]]:
        """See `Downlink`."""
        self.latest, self.moved = state["latest"], state["moved"]
        self.version_of = dict(state["version_of"])
        self.versions.initial = initial
        at = 0
        while at < len(made):
            if len(made) - at < ENTRY.size:
                raise PayloadError("an update without its length")
            parent, length = ENTRY.unpack_from(made, at)
            at += ENTRY.size
            if not NONE <= parent < len(self.versions.parents) or length > len(made) - at:
                raise PayloadError("an update to no known model, or one that is cut")
            self.versions.add(parent, made[at : at + length])
            at += length
        holders = defaultdict(list)
        for client, version in self.version_of.items():
            holders[version].append(client)
        for version, clients in sorted(holders.items()):
            yield self.versions.model(version), clients
