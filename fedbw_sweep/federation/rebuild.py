"""The client's end of the way down: its model, brought up to date by what it received."""

from __future__ import annotations

import zlib

import numpy as np

from fedbw_sweep.compression.base import Compressor, Known, all_finite
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.errors import DivergenceError, PayloadError

WHOLE = -1
"""In place of a number of updates: the model itself follows, dense."""


def rebuild(
    payload: memoryview,
    held: FloatVector | None,
    initial: FloatVector | None,
    compressor: Compressor,
    layout: Layout,
    rounds: int,
) -> FloatVector:
    """Make the client's model of what the server sent, and check that it is the server's.

    Parameters
    ----------
    payload : memoryview
        What was received, without the exact arrays; it may be damaged or hostile.
    held : ndarray of float32, shape (layout.size,), or None
        The model that the client holds, if any. It is not modified.
    initial : ndarray of float32, shape (layout.size,), or None
        The model before the first round; only a method with a context needs it.
    compressor : Compressor
        The server's.
    layout : Layout
        The arrays that travel.
    rounds : int
        Rounds before this one: there have been no more updates.

    Returns
    -------
    ndarray of float32, shape (layout.size,)
        The client's model from now on, writable.

    Raises
    ------
    PayloadError
        If the payload is damaged, holds more updates than there may be, or the outcome is not, bit
        by bit, what the server says.
    """
    if len(payload) < HEADER.size:
        raise PayloadError(f"{len(payload)} bytes hold no header")
    checksum, count = HEADER.unpack_from(payload)
    rest = payload[HEADER.size :]
    if count == WHOLE:
        model = Dense().decode(rest, layout)
    elif held is None:
        raise PayloadError(f"{count} updates to a model that this client does not hold")
    else:
        model = held.copy()
        for update in split_updates(rest, count, rounds):
            model = updated(model, update, compressor, layout, initial)
    if zlib.crc32(model.data) != checksum:
        raise PayloadError("the model rebuilt from the server's updates is not the server's")
    return model


def split_updates(body: memoryview, count: int, rounds: int) -> list[memoryview]:
    """Return the updates that a body holds: so many, and no more than there were rounds before."""
    if not 0 <= count <= rounds:
        raise PayloadError(f"{count} updates, where there have been at most {rounds}")
    updates = []
    for _ in range(count):
        if len(body) < LENGTH.size:
            raise PayloadError(f"fewer than {count} updates")
        [length] = LENGTH.unpack_from(body)
        updates.append(body[LENGTH.size :][:length])
        body = body[LENGTH.size :][length:]
    if len(body):
        raise PayloadError(f"{len(body)} bytes after {count} updates")
    return updates


def updated(
    model: FloatVector,
    update: bytes | memoryview,
    compressor: Compressor,
    layout: Layout,
    initial: FloatVector | None,
) -> FloatVector:
    """Return a model with an encoded update added; both ends do it here, so that they round alike.

    Parameters
    ----------
    model : ndarray of float32, shape (layout.size,)
        The model that the update starts from. It is not modified.
    update : bytes or memoryview
        What the compressor encoded.
    compressor : Compressor
        The server's.
    layout : Layout
        The arrays that travel.
    initial : ndarray of float32, shape (layout.size,), or None
        The model before the first round; only a method with a context needs it.

    Raises
    ------
    DivergenceError
        If the outcome is not finite.
    PayloadError
        If the update is damaged.
    """
    added = compressor.decode(update, layout, Known(initial, model))
    with np.errstate(over="ignore"):
        np.add(model, added, out=added)
    if not all_finite(added):
        raise DivergenceError("the model that clients hold is not finite; lower lr")
    return added
