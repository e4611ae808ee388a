"""What every compressor shares: the array layout both ends derive, the contract, the frame."""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.errors import DivergenceError, PayloadError

FloatVector = NDArray[np.float32]


@dataclass(frozen=True)
class TensorSpec:
    """One named array of a model: its shape and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """Names, shapes and order of the arrays that travel. Both ends derive it; it is never sent.

    The floating-point arrays are one flat float32 vector, in the order of `tensors`: that is what
    compressors see. Arrays of any other dtype (integer or boolean buffers) are `exact`: they travel
    as they are, after the compressed vector.

    Parameters
    ----------
    tensors : tuple of TensorSpec
        Every array, in the model's own order. Floating-point arrays must be float32.
    """

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def floats(self) -> tuple[TensorSpec, ...]:
        """The float32 arrays, in vector order."""
        return tuple(t for t in self.tensors if t.dtype == "float32")

    @cached_property
    def exact(self) -> tuple[TensorSpec, ...]:
        """The arrays that are never compressed lossily."""
        return tuple(t for t in self.tensors if t.dtype != "float32")

    @cached_property
    def size(self) -> int:
        """Number of coordinates of the float32 vector."""
        return sum(t.size for t in self.floats)

    @cached_property
    def exact_bytes(self) -> int:
        """Bytes of the arrays that are not floating point."""
        return sum(t.nbytes for t in self.exact)

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything sent dense: the reference of every compression ratio."""
        return 4 * self.size + self.exact_bytes

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of names, shapes and dtypes in order: equal exactly when both ends agree."""
        text = ";".join(f"{t.name}:{t.dtype}:{t.shape}" for t in self.tensors)
        return zlib.crc32(text.encode())

    def split(self, vector: FloatVector) -> Iterator[tuple[TensorSpec, FloatVector]]:
        """Yield each float32 array of `vector` as a view in its own shape."""
        start = 0
        for tensor in self.floats:
            yield tensor, vector[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size


def all_finite(vector: FloatVector) -> bool:
    """Whether no element is NaN or infinite; reads the vector once, and allocates nothing.

    Finite squares that add up to something finite prove it. Only a sum beyond float32 proves
    nothing, and has the extremes looked at.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(vector, vector)):
            return True
    return bool(np.isfinite(vector.min()) and np.isfinite(vector.max()))


class Compressor(ABC):
    """A method that turns an update into bytes and back.

    A subclass is a frozen dataclass whose fields are its parameters, validated in ``__post_init__``
    with `ConfigError`. It implements `_encode` and `_decode` on the body alone; this class adds and
    checks the frame and the promises that hold for every method:

    - Pure: the same update, layout and generator state give the same bytes.
    - Complete: the payload holds everything `decode` needs besides the layout.
    - Hostile-safe: `decode` returns a finite float32 vector of ``layout.size`` coordinates or
      raises `PayloadError`, and allocates no more than the layout implies.

    The frame is four bytes, a CRC-32 of the layout and of the method with its parameters, so that a
    payload is never decoded as something it is not.
    """

    FRAME_BYTES: ClassVar[int] = 4
    fixed_size: ClassVar[bool] = False
    """Whether the payload's size depends on the layout alone, so that it is known in advance."""

    def encode(self, update: FloatVector, layout: Layout, rng: np.random.Generator) -> bytes:
        """Compress one update.

        Parameters
        ----------
        update : ndarray of float32, shape (layout.size,)
            Trained minus received weights.
        layout : Layout
            The arrays the vector is made of.
        rng : numpy.random.Generator
            The only source of randomness.

        Returns
        -------
        bytes
            The payload, packed: its length is what is sent.

        Raises
        ------
        DivergenceError
            If the update holds NaN or infinity.
        """
        if update.shape != (layout.size,) or update.dtype != np.float32:
            raise ValueError(
                f"expected float32 of shape ({layout.size},), got {update.dtype} {update.shape}"
            )
        if not all_finite(update):
            raise DivergenceError("the update holds NaN or infinity: training diverged; lower lr")
        body = self._encode(update, layout, rng)
        return b"".join((self._frame(layout), *(body if isinstance(body, tuple) else (body,))))

    def decode(self, payload: bytes | memoryview, layout: Layout) -> FloatVector:
        """Reconstruct the update from a payload that may be damaged or hostile.

        Parameters
        ----------
        payload : bytes or memoryview
            What `encode` returned.
        layout : Layout
            The layout the payload must have been made for.

        Returns
        -------
        ndarray of float32, shape (layout.size,)
            The decoded update: finite, writable, owned by the caller.

        Raises
        ------
        PayloadError
            If the payload is not one that `encode` makes for this layout and these parameters.
        """
        frame = self._frame(layout)
        if payload[: len(frame)] != frame:
            raise PayloadError(f"payload was not made by {self!r} for this layout")
        update = self._decode(memoryview(payload)[len(frame) :], layout)
        if update.shape != (layout.size,) or update.dtype != np.float32:
            raise AssertionError(f"{self!r} decoded to {update.dtype} {update.shape}")
        if not all_finite(update):
            raise PayloadError("payload decodes to NaN or infinity")
        return update

    def expected_bytes(self, layout: Layout) -> int | None:
        """Payload size in bytes before encoding.

        Exact when `fixed_size`; otherwise an estimate, or None where the size depends on nothing
        that is known in advance.
        """
        return None

    @abstractmethod
    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator
    ) -> bytes | tuple[memoryview, ...]:
        """Pack a finite update, in one piece or several; the caller joins them to the frame."""

    @abstractmethod
    def _decode(self, body: memoryview, layout: Layout) -> FloatVector:
        """Unpack a body that may be hostile; NaN and infinity are refused by the caller."""

    def _frame(self, layout: Layout) -> bytes:
        return struct.pack("<I", zlib.crc32(repr(self).encode(), layout.fingerprint))


def floats_from(body: memoryview, count: int, dtype: str) -> NDArray[np.floating]:
    """Read exactly `count` little-endian floats; any other length is a `PayloadError`."""
    expected = count * np.dtype(dtype).itemsize
    if len(body) != expected:
        raise PayloadError(f"expected {expected} bytes of {dtype}, got {len(body)}")
    return np.frombuffer(body, dtype)
