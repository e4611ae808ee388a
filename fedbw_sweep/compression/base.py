"""What every compressor shares: the contract, the frame, the account of a payload's bits."""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import FloatVector, Ints, Layout
from fedbw_sweep.errors import DivergenceError, PayloadError

WHOLE, FRAME = "(all)", "frame"
"""Tensor and part of the bytes that are of no tensor in particular."""


class _Tally:
    """Bits of one payload by part, and within a part by tensor of ``layout.filled``."""

    def __init__(self, layout: Layout) -> None:
        self.sizes = layout.sizes
        self.bits: dict[str, NDArray[np.float64]] = {}


_tally: ContextVar[_Tally | None] = ContextVar("_tally", default=None)


def sizes_to_book() -> Ints | None:
    """Return the sizes of ``layout.filled`` while `Compressor.parts` decodes, else None."""
    tally = _tally.get()
    return None if tally is None else tally.sizes


def book(part: str, bits: float, weights: NDArray[Any] | None = None) -> None:
    """Say what bits just read from a payload were; only `Compressor.parts` listens.

    Parameters
    ----------
    part : str
        What they are: values, indices, tables, factors.
    bits : float
        How many.
    weights : ndarray, shape (len(layout.filled),), optional
        In what proportion they are the tensors'; that of their sizes if not given.
    """
    tally = _tally.get()
    if tally is None:
        return
    weights = tally.sizes if weights is None else weights
    total = weights.sum()
    if total > 0:
        tally.bits.setdefault(part, np.zeros(len(tally.sizes)))
        tally.bits[part] += max(0.0, bits) * (weights / total)  # a difference of floats


def all_finite(vector: FloatVector) -> bool:
    """Whether no element is NaN or infinite; reads the vector once, and allocates nothing.

    Finite squares that add up to something finite prove it. Only a sum beyond float32 proves
    nothing, and has the extremes looked at.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(vector, vector)):
            return True
    return bool(np.isfinite(vector.min()) and np.isfinite(vector.max()))


def _check_vector(vector: FloatVector, layout: Layout) -> None:
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise ValueError(
            f"expected float32 of shape ({layout.size},), got {vector.dtype} {vector.shape}"
        )


@dataclass(frozen=True)
class Known:
    """What both ends hold of one message besides its payload; absent where they hold nothing.

    Parameters
    ----------
    initial : ndarray of float32, shape (layout.size,), optional
        The model before the first round.
    received : ndarray of float32, shape (layout.size,), optional
        The model that the client received, which the update starts from.
    """

    initial: FloatVector | None = None
    received: FloatVector | None = None


NOTHING_KNOWN = Known()


@dataclass(frozen=True)
class Compressor(ABC):
    """A method that turns an update into bytes and back.

    A subclass is a frozen dataclass whose fields are its parameters, validated in ``__post_init__``
    with `ConfigError`. It implements `_encode` and `_decode` on the body alone; this class adds and
    checks the frame and the promises that hold for every method:

    - Pure: the same update, layout and generator state give the same bytes.
    - Complete: the payload holds everything `decode` needs besides the layout and what is known.
    - Hostile-safe: `decode` returns a finite float32 vector of ``layout.size`` coordinates or
      raises `PayloadError`, within the memory and time that docs/compression.md states.

    The frame is four bytes, a CRC-32 of the layout, of the method with the parameters that differ
    from their defaults, and of what is used of `Known`, so that a payload is never decoded as
    something it is not.
    """

    FRAME_BYTES: ClassVar[int] = 4
    fixed_size: ClassVar[bool] = False
    """Whether the payload's size depends on the layout alone, so that it is known in advance."""

    codes_weights: ClassVar[bool] = False
    """Whether a model's weights may be encoded as they are, and not only differences: the error is
    small beside each weight, or each block's largest."""

    lossless: ClassVar[bool] = False
    """Whether every update is decoded to the very same bits, so that only its bytes differ from
    those of other such methods."""

    @property
    def uses(self) -> tuple[str, ...]:
        """The fields of `Known` that the method uses; it is given no others."""
        return ()

    @property
    def unbiased(self) -> bool:
        """Whether the expected decoded update is the update, up to rounding."""
        return False

    @property
    def expands(self) -> bool:
        """Whether the error of a dense update is larger than the update.

        Error feedback would then add ever more than it makes up for.
        """
        return False

    def encode(
        self,
        update: FloatVector,
        layout: Layout,
        rng: np.random.Generator,
        known: Known = NOTHING_KNOWN,
    ) -> bytes:
        """Compress one update.

        Parameters
        ----------
        update : ndarray of float32, shape (layout.size,)
            Trained minus received weights.
        layout : Layout
            The arrays the vector is made of.
        rng : numpy.random.Generator
            The only source of randomness.
        known : Known, optional
            What the decoder will hold too.

        Returns
        -------
        bytes
            The payload, packed: its length is what is sent.

        Raises
        ------
        DivergenceError
            If the update holds NaN or infinity.
        """
        _check_vector(update, layout)
        if not all_finite(update):
            raise DivergenceError("the update holds NaN or infinity: training diverged; lower lr")
        used = self._used(known, layout)
        body = self._encode(update, layout, rng, used)
        return b"".join(
            (self._frame(layout, used), *(body if isinstance(body, tuple) else (body,)))
        )

    def decode(
        self, payload: bytes | memoryview, layout: Layout, known: Known = NOTHING_KNOWN
    ) -> FloatVector:
        """Reconstruct the update from a payload that may be damaged or hostile.

        Parameters
        ----------
        payload : bytes or memoryview
            What `encode` returned.
        layout : Layout
            The layout the payload must have been made for.
        known : Known, optional
            What the encoder held too.

        Returns
        -------
        ndarray of float32, shape (layout.size,)
            The decoded update: finite, writable, owned by the caller.

        Raises
        ------
        PayloadError
            If the payload is not one that `encode` makes for this layout, these parameters and what
            the method uses of `known`.
        """
        used = self._used(known, layout)
        frame = self._frame(layout, used)
        if payload[: len(frame)] != frame:
            using = f", or from another model ({', '.join(self.uses)})" if self.uses else ""
            raise PayloadError(f"payload was not made by {self!r} for this layout{using}")
        if len(payload) > 8 * layout.size + 1024 * len(layout.floats) + (1 << 16):
            raise PayloadError(f"{len(payload)} bytes are more than any method needs")
        update = self._decode(memoryview(payload)[len(frame) :], layout, used)
        if update.shape != (layout.size,) or update.dtype != np.float32:
            raise AssertionError(f"{self!r} decoded to {update.dtype} {update.shape}")
        if not all_finite(update):
            raise PayloadError("payload decodes to NaN or infinity")
        return update

    def parts(
        self, payload: bytes | memoryview, layout: Layout, known: Known = NOTHING_KNOWN
    ) -> Counter[tuple[str, str]]:
        """Say where the bytes of a payload are, by decoding it.

        Exact are the total, what each tensor has in fixed-size fields of its own, and the bits that
        each stretch of an entropy-coded stream takes (the last one, where the coder starts, up to a
        byte more than it should). A stretch that several tensors share is
        divided by its symbols' ideal code lengths, tables by the number of symbols coded with them,
        and scales of blocks, or numbers that are no tensor's own, by size. Bits become bytes by
        rounding running sums: each entry is within a byte of its share, and all add up.

        Parameters
        ----------
        payload : bytes or memoryview
            What `encode` returned.
        layout : Layout
            The layout it was made for.
        known : Known, optional
            As in `decode`.

        Returns
        -------
        Counter of (tensor, part) to int
            Bytes, where there are any; ``len(payload)`` in all. Parts are ``values``, ``indices``
            (positions of what is sent), ``tables`` (scales, probabilities and what chooses them),
            ``factors`` (of low rank), and, of the tensor ``(all)``, ``frame``: all the rest, which
            is the frame, seeds, steps, and what fills the entropy coder's last byte.

        Raises
        ------
        PayloadError
            As `decode`.
        """
        tally = _Tally(layout)
        token = _tally.set(tally)
        try:
            self.decode(payload, layout, known)
        finally:
            _tally.reset(token)
        keys = [(WHOLE, FRAME), *((t.name, part) for part in tally.bits for t in layout.filled)]
        bits = np.concatenate([[0.0], *tally.bits.values()])
        bits[0] = 8 * len(payload) - bits.sum()
        ends = np.rint(np.cumsum(bits) / 8).astype(np.int64)
        sizes = np.diff(ends, prepend=0).tolist()
        return Counter({key: size for key, size in zip(keys, sizes, strict=True) if size})

    def expected_bytes(self, layout: Layout) -> int | None:
        """Payload size in bytes before encoding.

        Exact when `fixed_size`; otherwise an estimate, or None where the size depends on nothing
        that is known in advance.
        """
        return None

    @abstractmethod
    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes | tuple[memoryview, ...]:
        """Pack a finite update, in one piece or several; the caller joins them to the frame."""

    @abstractmethod
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        """Unpack a body that may be hostile; NaN and infinity are refused by the caller."""

    def _frame(self, layout: Layout, used: Known) -> bytes:
        method = f"{type(self).__qualname__}{self._changed_parameters()}"
        checksum = zlib.crc32(method.encode(), layout.fingerprint)
        for name in self.uses:
            if (vector := getattr(used, name)) is not None:
                checksum = zlib.crc32(
                    vector.astype("<f4", copy=False), zlib.crc32(name.encode(), checksum)
                )
        return struct.pack("<I", checksum)

    def _used(self, known: Known, layout: Layout) -> Known:
        """Leave what the method uses."""
        used = Known(**{name: getattr(known, name) for name in self.uses})
        for vector in (used.initial, used.received):
            if vector is not None:
                _check_vector(vector, layout)
        return used

    def _changed_parameters(self) -> dict[str, Any]:
        """Return the parameters that differ from their defaults.

        A parameter that a later version adds, at its default, changes no payload.
        """
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.compare}
        return {name: value for name, (value, default) in values.items() if value != default}


@runtime_checkable
class ScaledCompressor(Protocol):
    """A compressor that can be told how large an update counts as, whatever its size.

    Its payload is decoded as every other.
    """

    def encode_in_units(
        self,
        update: FloatVector,
        layout: Layout,
        rng: np.random.Generator,
        unit: float,
        known: Known = NOTHING_KNOWN,
    ) -> bytes:
        """Compress an update as `Compressor.encode` does, as precisely as one of that rms.

        Parameters
        ----------
        unit : float
            The root mean square that the method's error is to be relative to, above 0.
        """


def floats_from(
    body: memoryview,
    count: int,
    dtype: str,
    part: str | None = "values",
    weights: NDArray[Any] | None = None,
) -> NDArray[np.floating]:
    """Read exactly `count` little-endian floats; any other length is a `PayloadError`.

    What they are, and whose, is as in `book`; None if the caller books them.
    """
    expected = count * np.dtype(dtype).itemsize
    if len(body) != expected:
        raise PayloadError(f"expected {expected} bytes of {dtype}, got {len(body)}")
    if part is not None:
        book(part, 8 * expected, weights)
    return np.frombuffer(body, dtype)
