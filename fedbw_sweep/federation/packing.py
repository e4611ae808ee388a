"""A model or an update as ONE byte string in one Flower object, and back."""

from __future__ import annotations

from collections import Counter

import numpy as np
from flwr.app import Array, ArrayRecord

from fedbw_sweep.compression.base import NOTHING_KNOWN, Compressor, Known
from fedbw_sweep.compression.feedback import State
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.errors import PayloadError

ARRAYS, CONFIG = "arrays", "config"


CLIENT, ROUND, FROZEN = "client", "round", "frozen"


MODEL, COMPRESSOR = "model", "compressor"
"""What a client's state holds: the model that updates are added to, and what its method keeps."""


ENCODED = "fedbw.encoded"
"""Serialisation type of a payload: Flower refuses to average what it does not know."""


def pack(payload: bytes) -> ArrayRecord:
    """Wrap a payload for a message."""
    return ArrayRecord({"payload": Array("uint8", (len(payload),), ENCODED, payload)})


def unpack(
    arrays: ArrayRecord, compressor: Compressor, layout: Layout, known: Known = NOTHING_KNOWN
) -> tuple[FloatVector, bytes]:
    """Decode a payload: the compressed vector, then the arrays sent as they are.

    Returns
    -------
    vector : ndarray of float32, shape (layout.size,)
    exact : bytes, length layout.exact_bytes

    Raises
    ------
    PayloadError
        If the payload is not one made for this layout and compressor.
    """
    payload, exact = split(arrays, layout.exact_bytes)
    return compressor.decode(payload, layout, known), bytes(exact)


def parts(
    arrays: ArrayRecord, compressor: Compressor, layout: Layout, known: Known = NOTHING_KNOWN
) -> Counter[tuple[str, str]]:
    """Say where a payload's bytes are: `Compressor.parts`, and ``exact`` arrays sent as they are.

    Raises
    ------
    PayloadError
        As `unpack`.
    """
    exact = {(tensor.name, "exact"): tensor.nbytes for tensor in layout.exact}
    payload, _ = split(arrays, layout.exact_bytes)
    return compressor.parts(payload, layout, known) + Counter(exact)


def split(arrays: ArrayRecord, count: int) -> tuple[memoryview, memoryview]:
    """Return a payload without its last `count` bytes, which are sent as they are, and these.

    Raises
    ------
    PayloadError
        If the payload is shorter.
    """
    payload = memoryview(arrays["payload"].data)
    split = len(payload) - count
    if split < 0:
        raise PayloadError(f"payload of {len(payload)} bytes lacks {count} bytes of arrays")
    return payload[:split], payload[split:]


def pack_state(state: State) -> ArrayRecord:
    """Wrap what a compressor keeps for a client's context, without a copy when read back."""
    return ArrayRecord(
        {
            name: Array(str(array.dtype), array.shape, ENCODED, array.tobytes())
            for name, array in state.items()
        }
    )


def unpack_state(arrays: ArrayRecord) -> State:
    """Read what `pack_state` wrapped; the arrays are read-only."""
    return {
        name: np.frombuffer(array.data, array.dtype).reshape(array.shape)
        for name, array in arrays.items()
    }
