"""The way down: the server's model, or what of it a client lacks, as one payload, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.federation.chain import Chain
from fedbw_sweep.federation.merged import Merged
from fedbw_sweep.seeding import rng_for


class Downlink(Protocol):
    """The server's end: what each client is sent, and what it is known to hold."""

    def prepare(self, server_round: int, vector: FloatVector, exact: bytes) -> None:
        """Encode a round's global model, once for all clients."""

    def payload_for(self, client: int) -> bytes:
        """Return what a client is sent this round; the same object where it is the same."""

    def replied(self, client: int) -> None:
        """Note that a client has what it was sent this round."""

    def received(self, client: int) -> FloatVector:
        """Return the model that a client has trained from, once `replied` was called."""

    @property
    def made(self) -> bytes:
        """What this round has added to the updates that clients' models are made of."""

    def state(self) -> dict[str, Any]:
        """Return all that the next round depends on, but for those updates."""

    def load(
        self, state: dict[str, Any], initial: FloatVector, made: bytes
    ) -> Iterator[tuple[FloatVector, list[int]]]:
        """Go on from what `state` returned; yield each model that clients hold, and which do.

        Nothing else may be called before the iterator is at its end.

        Parameters
        ----------
        state : dict
        initial : ndarray of float32, shape (layout.size,)
            The global model before the first round.
        made : bytes
            `made` of all rounds so far, joined.

        Raises
        ------
        PayloadError
            If the updates are damaged.
        """


def downlink(config: RunConfig, layout: Layout) -> Downlink:
    """Make the server's end of the way down that ``downlink`` names."""
    if config.downlink.codes_weights:
        return Weights(config, layout)
    return (Chain if config.downlink.catch_up == "chain" else Merged)(config, layout)


class Weights:
    """The model itself, the same payload for every client, whatever it has missed."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.compressor, self.layout = config.downlink.build("downlink"), layout
        self.seed = config.seed

    def prepare(self, server_round: int, vector: FloatVector, exact: bytes) -> None:
        """See `Downlink`."""
        rng = rng_for(self.seed, "encode model", server_round)
        self.payload = self.compressor.encode(vector, self.layout, rng) + exact
        self._decoded = np.empty(0, np.float32)

    def payload_for(self, client: int) -> bytes:
        """See `Downlink`."""
        return self.payload

    def replied(self, client: int) -> None:
        """See `Downlink`."""

    def received(self, client: int) -> FloatVector:
        """See `Downlink`."""
        if not self._decoded.size:
            encoded = memoryview(self.payload)[: len(self.payload) - self.layout.exact_bytes]
            self._decoded = self.compressor.decode(encoded, self.layout)
        return self._decoded

    @property
    def made(self) -> bytes:
        """See `Downlink`: clients keep no model."""
        return b""

    def state(self) -> dict[str, Any]:
        """See `Downlink`: nothing is kept."""
        return {}

    def load(
        self, state: dict[str, Any], initial: FloatVector, made: bytes
    ) -> Iterator[tuple[FloatVector, list[int]]]:
        """See `Downlink`."""
        return iter(())
