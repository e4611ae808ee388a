"""The way down as a chain of updates, one a round, of which a client is sent all that it missed."""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.feedback import State, encode_with_state
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.federation.rebuild import WHOLE, split_updates, updated
from fedbw_sweep.seeding import rng_for


class Chain:
    """Updates to the model that clients hold, which the server knows bit by bit.

    With error feedback an update is the encoded difference between the global model and `held`, the
    model of a client that has missed none. So it also carries what earlier ones left unsent
    (DoubleSqueeze: Tang et al. 2019, arXiv:1905.05957; EF21-P: Gruntkowska et al. 2023,
    arXiv:2209.15218). Without, it is the encoded difference between the global models of two
    rounds, and what it lacks is lost.

    There is one before each round but the first, whatever the round before has changed, so that
    sizes are known in advance. Both ends decode it and add it, in float32. A client that missed
    some is sent them all, joined, or the whole of `held`, dense, whichever is fewer bytes; they are
    kept as long as that may be them. Of each client only a number is kept, that of the last update
    it has replied to.

    Attributes
    ----------
    held : ndarray of float32, shape (layout.size,)
        The model that a client ends up with this round.
    version : int
        Updates so far; the initial model is version 0.
    version_of : dict of int to int
        The version of each client that has replied.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.compressor, self.layout = config.downlink.build("downlink"), layout
        self.error_feedback, self.seed = config.downlink.error_feedback, config.seed
        self.initial_is_known = config.initial_model == "known"
        self.held = self.latest = self.initial = np.empty(0, np.float32)
        self.version, self.version_of = 0, dict[int, int]()
        self.updates: deque[bytes] = deque()  # the last ones, with their lengths
        self.made = b""
        self.compressor_state: State = {}

    def prepare(self, server_round: int, vector: FloatVector, exact: bytes) -> None:
        """See `Downlink`.

        Raises
        ------
        DivergenceError
            If the model that clients would hold is not finite.
        """
        if server_round == 1:
            self.held = self.latest = self.initial = vector
        else:
            self._update(server_round, vector)
        self.checksum, self.exact = zlib.crc32(self.held.data), exact
        self.payloads: dict[int, bytes] = {}  # by how many updates they hold

    def _update(self, server_round: int, vector: FloatVector) -> None:
        """Encode what is new, bring `held` up to date with it, and keep it for who misses it."""
        with np.errstate(over="ignore"):
            difference = vector - (self.held if self.error_feedback else self.latest)
        self.latest = vector
        rng = rng_for(self.seed, "encode model", server_round)
        payload, self.compressor_state = encode_with_state(
            *(self.compressor, difference, self.layout, rng, self.compressor_state),
            known=Known(self.initial, self.held),
        )
        self._add(payload)
        self.version += 1
        self.made = LENGTH.pack(len(payload)) + payload
        self._keep(self.made)

    def _add(self, update: bytes | memoryview) -> None:
        """Bring `held` up to date with an update."""
        self.held = updated(self.held, update, self.compressor, self.layout, self.initial)

    def _keep(self, update: bytes) -> None:
        self.updates.append(update)
        while sum(map(len, self.updates)) > 4 * self.layout.size:
            self.updates.popleft()

    def payload_for(self, client: int) -> bytes:
        """See `Downlink`."""
        version = self.version_of.get(client, 0 if self.initial_is_known else -1)
        missed = self.version - version
        count = missed if version >= 0 and missed <= len(self.updates) else WHOLE
        if count not in self.payloads:
            updates = list(self.updates)[len(self.updates) - count :]
            body = updates if count != WHOLE else [self.held.astype("<f4", copy=False).tobytes()]
            header = HEADER.pack(self.checksum, count)
            self.payloads[count] = b"".join([header, *body, self.exact])
        return self.payloads[count]

    def replied(self, client: int) -> None:
        """See `Downlink`."""
        self.version_of[client] = self.version

    def received(self, client: int) -> FloatVector:
        """See `Downlink`."""
        return self.held

    def state(self) -> dict[str, Any]:
        """See `Downlink`: `held` and the models of all clients are made of the updates."""
        return {
            "latest": None if self.error_feedback else self.latest,
            "version": self.version,
            "version_of": dict(self.version_of),
            "compressor": self.compressor_state,
        }

    def load(
        self, state: dict[str, Any], initial: FloatVector, made: bytes
    ) -> Iterator[tuple[FloatVector, list[int]]]:
        """See `Downlink`."""
        self.version, self.version_of = state["version"], dict(state["version_of"])
        self.compressor_state = state["compressor"]
        updates = split_updates(memoryview(made), self.version, self.version)
        holders = defaultdict(list)
        for client, version in self.version_of.items():
            holders[version].append(client)
        self.held = self.initial = initial
        for version in range(self.version + 1):
            if version:
                update = updates[version - 1]
                self._keep(LENGTH.pack(len(update)) + bytes(update))
                self._add(update)
            if version in holders:
                yield self.held, holders[version]
        self.latest = self.held if self.error_feedback else state["latest"]
