"""The arrays that travel: names, shapes and order, which both ends derive."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatVector = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TensorSpec:
    """One named array of a model.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : str
        NumPy's name.
    tokens : bool
        Whether it has a row for each token: an embedding, or the head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    tokens: bool = False

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
    def filled(self) -> tuple[TensorSpec, ...]:
        """The float32 arrays that have elements."""
        return tuple(t for t in self.floats if t.size)

    @cached_property
    def sizes(self) -> Ints:
        """Number of elements of each of `filled`."""
        return np.array([t.size for t in self.filled], np.int64)

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

    def count(self, mask: NDArray[Any]) -> Ints:
        """Return how many coordinates of each of `filled` are not zero in `mask`."""
        parts = np.split(mask, np.cumsum(self.sizes)[:-1]) if self.size else []
        return np.array([np.count_nonzero(part) for part in parts], np.int64)
