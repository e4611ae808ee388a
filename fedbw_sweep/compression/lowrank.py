"""Low rank: each matrix as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedbw_sweep.compression.base import Compressor, Known, all_finite, book, floats_from
from fedbw_sweep.compression.cast import unit_for
from fedbw_sweep.compression.exact import orthonormal, product, product_blocks
from fedbw_sweep.compression.feedback import State
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.errors import ConfigError, PayloadError

_RIGHT = "right_factors"


@dataclass(frozen=True)
class LowRank(Compressor):
    """PowerSGD: one step of subspace iteration from the factors of the round before.

    Vogels et al. 2019, arXiv 1905.13727. A matrix ``M`` becomes ``P @ Q.T``, where ``P`` is an
    orthonormal basis of ``M @ Q_before`` and ``Q = M.T @ P``; ``Q_before`` is random in a client's
    first round. Axes after the first are merged. Vectors, and matrices that two factors would not
    shorten, travel as they are. All numbers are float32.

    Parameters
    ----------
    rank : int
        Columns of ``P`` and ``Q``.
    right : ndarray, optional
        ``Q_before`` of all matrices; `encode_with_state` sets it. No configuration key.
    """

    rank: int = 4
    right: FloatVector | None = field(default=None, repr=False, compare=False)
    fixed_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError("rank", self.rank, "an integer of at least 1")

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return self.FRAME_BYTES + 4 * sum(left + right for _, _, left, right in self._cuts(layout))

    def encode_with_state(
        self,
        update: FloatVector,
        layout: Layout,
        rng: np.random.Generator,
        state: State,
        known: Known,
    ) -> tuple[bytes, State]:
        """Compress one update, starting from the right factors in `state`; return the new ones."""
        before = state.get(_RIGHT)
        started = self if before is None else replace(self, right=before.astype(np.float32))
        payload = started.encode(update, layout, rng, known)
        numbers = np.frombuffer(payload, "<f4", offset=self.FRAME_BYTES)
        rights = [
            numbers[start + left :][:right] for _, start, left, right in self._cuts(layout) if right
        ]
        return payload, {_RIGHT: np.concatenate([np.zeros(0, np.float32), *rights])}

    def _cuts(self, layout: Layout) -> Iterator[tuple[int, int, int, int]]:
        """Yield each tensor's rank, and where its numbers start: so many of P, then so many of Q.

        The rank is 0, and there is no Q, where a tensor travels as it is.
        """
        start = 0
        for tensor in layout.floats:
            rows = tensor.shape[0] if tensor.shape else 1
            columns = tensor.size // max(1, rows)
            rank = min(self.rank, rows, columns)
            left, right = rank * rows, rank * columns
            if left + right >= tensor.size:
                rank, left, right = 0, tensor.size, 0
            yield rank, start, left, right
            start += left + right

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        numbers = np.empty(self.expected_bytes(layout) // 4 - 1, np.float32)
        needed = sum(right for _, _, _, right in self._cuts(layout))
        if self.right is not None and self.right.shape != (needed,):
            raise ValueError(f"right factors of shape {self.right.shape}, not ({needed},)")
        limit = np.finfo(np.float32).max
        used = 0
        tensors = layout.split(update)
        for (_, tensor), (rank, start, left, right) in zip(
            tensors, self._cuts(layout), strict=True
        ):
            if not rank:
                numbers[start : start + left] = tensor.ravel()
                continue
            matrix = tensor.reshape(len(tensor), -1)
            unit = unit_for(matrix)
            matrix = matrix * unit
            if self.right is None:
                before = rng.standard_normal(right, np.float32)
            else:
                before = self.right[used : used + right]
                used += right
            before = (before * unit_for(before)).reshape(-1, rank)
            basis = orthonormal(product(matrix, before.T))
            factor = product(matrix.T, basis.T).astype(np.float64) / unit
            numbers[start : start + left] = basis.ravel()
            numbers[start + left :][:right] = np.clip(factor, -limit, limit).ravel()
        return numbers.astype("<f4", copy=False).tobytes()

    @np.errstate(over="ignore", invalid="ignore")
    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        numbers = floats_from(body, self.expected_bytes(layout) // 4 - 1, "<f4", part=None)
        if not all_finite(numbers):
            raise PayloadError("a number is NaN or infinite")
        counts = np.array([(left, right) for _, _, left, right in self._cuts(layout) if left])
        counts = counts.reshape(-1, 2)
        for part, own in (("factors", counts[:, 1] > 0), ("values", counts[:, 1] == 0)):
            weights = counts.sum(axis=1) * own
            book(part, 32 * weights.sum(), weights)
        update = np.empty(layout.size, np.float32)
        limit = np.finfo(np.float32).max
        for (_, tensor), (rank, start, left, right) in zip(
            layout.split(update), self._cuts(layout), strict=True
        ):
            basis = numbers[start : start + left]
            if not rank:
                tensor[...] = basis.reshape(tensor.shape)
                continue
            factor = numbers[start + left :][:right].reshape(-1, rank)
            matrix = tensor.reshape(-1, len(factor))
            for at, block in product_blocks(basis.reshape(-1, rank), factor, 1):
                block += 0.0  # a zero may have either sign, by how a BLAS adds
                np.clip(block, -limit, limit, out=matrix[at])
        return update
