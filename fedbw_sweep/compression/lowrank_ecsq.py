"""The flagship: a quantised low-rank part of each matrix, then entropy-coded residuals.

Local updates of matrices are close to low rank. What a component costs and what it saves are both
known before it is coded, so each matrix takes the rank at which error plus price of bits is least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.tables import MAX_INTEGER
from fedbw_sweep.compression.contexts import Contexts, refine
from fedbw_sweep.compression.dither import dithered_cost
from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.factors import (
    MAX_COARSENESS,
    MAX_GAIN,
    OVERSAMPLING,
    Factors,
    Spectrum,
    dead_zone_cost,
    divide,
    levels_of,
    most_rank,
)
from fedbw_sweep.compression.layout import FloatVector, Ints, Layout, TensorSpec
from fedbw_sweep.compression.quantiser import SLOPE
from fedbw_sweep.compression.rotation import Moved, Rotation
from fedbw_sweep.errors import ConfigError, PayloadError


def is_matrix(tensor: TensorSpec) -> bool:
    """Whether an array has at least two rows and columns."""
    return len(tensor.shape) > 1 and tensor.size > tensor.shape[-1] > 1


def _matrices(vector: FloatVector, layout: Layout) -> Iterator[FloatVector]:
    """Yield a view of each array of at least two rows and columns, its longer side across."""
    for tensor, array in layout.split(vector):
        if is_matrix(tensor):
            matrix = array.reshape(-1, tensor.shape[-1])
            yield matrix if len(matrix) <= tensor.shape[-1] else matrix.T


def _moved(known: Known, layout: Layout) -> list[Moved] | None:
    """Return what each matrix has moved from the initial model, if both are known."""
    if known.initial is None or known.received is None:
        return None
    pairs = (_matrices(vector, layout) for vector in (known.received, known.initial))
    return [Moved(*pair) for pair in zip(*pairs, strict=True)]


def _leading(known: Known, layout: Layout) -> list[int]:
    """Return how many leading directions each matrix has."""
    moved = _moved(known, layout)
    if moved is None:
        return [0] * sum(map(is_matrix, layout.filled))
    return [each.directions for each in moved]


def _turn(vector: FloatVector, known: Known, layout: Layout, back: bool = False) -> None:
    """Change the coordinates of each matrix of a vector, in place."""
    for matrix, moved in zip(_matrices(vector, layout), _moved(known, layout) or (), strict=False):
        if moved.directions:
            Rotation(moved).turn(matrix, back)


def _product(part: Factors, matrix: FloatVector) -> Iterator[tuple[FloatVector, FloatVector]]:
    """Yield blocks of a matrix as it lies in memory, each with what its factors add to it."""
    across = not matrix.flags.c_contiguous
    whole = matrix.T if across else matrix
    for at, block in part.product(across):
        yield whole[at], block


@dataclass(frozen=True)
class LowRankECSQ(ECSQ):
    """Low-rank matrices plus residuals, in one quantisation step, entropy coded.

    Each matrix is split by a randomised SVD (Halko et al. 2011, arXiv 0909.4061); see
    `choose_rank` for its rank and `ECSQ` for the rest. Low-rank updates are PowerSGD's (Vogels et
    al. 2019, arXiv 1905.13727); here the factors are quantised and what they miss is sent too,
    where it is worth its bits.

    Parameters
    ----------
    step : float
        Width of the quantiser's bins, in units of the update's root mean square.
    target_bits : float, optional
        Choose the finest step whose payload is at most so many bits a coordinate.
    target_nmse : float, optional
        Choose the coarsest step with ``|x - x'|**2 <= target_nmse * |x|**2``. With either target
        `step` is not used, and the factors descend, entry by entry, to where error and bits cost
        least; encoding takes 20 to 100 times as long.
    norm_correction, embedding_step, dither
        See `ECSQ`.
    max_rank : int
        Most components that a matrix is given; more take longer to find.
    context : {"none", "received"}
        Whether an update is coded in the directions in which the received model has moved from the
        initial one (see `compression.rotation`); as without where nothing has moved. On the way
        down, it is the model that the update is added to. It takes 0.3 us a coordinate, at both
        ends.
    """

    step: float = 2.0
    max_rank: int = 64
    context: str = "none"

    _price: ClassVar[float] = SLOPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.max_rank) is not int or self.max_rank < 1:
            raise ConfigError("max_rank", self.max_rank, "a whole number of at least 1")
        if self.context not in ("none", "received"):
            raise ConfigError("context", self.context, "none or received")

    @property
    def uses(self) -> tuple[str, ...]:
        """With a context, both models."""
        return ("initial", "received") if self.context == "received" else ()

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        if self.uses:
            update = update.copy()
            _turn(update, known, layout)
        return super()._encode(update, layout, rng, known)

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        update = super()._decode(body, layout, known)
        if len(body):
            _turn(update, known, layout, back=True)
        return update

    def _prepare(
        self, unit: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> Any:
        matrices = list(_matrices(unit, layout))
        rows, cols = np.array([(0, 0), *(matrix.shape for matrix in matrices)]).max(axis=0)
        sketch = rng.integers(-127, 128, (cols, min(rows, self.max_rank + OVERSAMPLING)), np.int8)
        spectra = (Spectrum(matrix, sketch, self.max_rank) for matrix in matrices)
        # For one step, a matrix at a time is held in float64.
        return list(spectra) if self._to_target else spectra, _leading(known, layout)

    def _put(
        self,
        encoder: Encoder,
        values: FloatVector,
        scale: float,
        prepared: Any,
        layout: Layout,
        price: float | None,
    ) -> None:
        matrices = list(_matrices(values, layout))
        cost = dithered_cost if self.dither else dead_zone_cost
        spectra, leading = prepared
        parts = [
            spectrum.quantise(scale, price is not None, cost, first)
            for spectrum, first in zip(spectra, leading, strict=True)
        ]
        ranks = np.array([len(part.gain) for part in parts])
        encoder.integers(ranks)
        used = [part for part in parts if len(part.gain)]
        if used and price is not None:
            coded = [spectrum.matrix for spectrum, n in zip(spectra, ranks, strict=True) if n]
            refine(used, coded, scale, price)
        encoder.integers(np.array([part.coarseness for part in used]))
        encoder.integers(np.array([part.gain[0] for part in used]))
        encoder.integers(np.concatenate([-np.diff(part.gain) for part in used] or [ranks[:0]]))
        contexts = Contexts(used)
        for chunk in contexts.chunks():
            levels = levels_of(used, chunk)
            encoder.integers(np.abs(levels), contexts.of(chunk))
            encoder.bits(levels[levels != 0] < 0, 1)
            contexts.learn(levels)
        for matrix, part in zip(matrices, parts, strict=True):
            for view, block in _product(part, matrix):
                view -= block

    def _get(self, decoder: Decoder, layout: Layout, known: Known) -> FloatVector:
        own = np.array([is_matrix(tensor) for tensor in layout.filled])
        shapes = [
            tuple(sorted((tensor.size // tensor.shape[-1], tensor.shape[-1])))
            for tensor in layout.filled
            if is_matrix(tensor)
        ]

        def each(counts: NDArray[Any] | int) -> Ints:
            """Return the counts of matrices as those of all arrays that are not empty."""
            of_all = np.zeros(len(own), np.int64)
            of_all[own] = counts
            return of_all

        ranks = decoder.integers(len(shapes), self.max_rank, None, "factors", each(1))
        if any(rank > most_rank(shape) for rank, shape in zip(ranks, shapes, strict=True)):
            raise PayloadError("a rank exceeds its matrix")
        some = ranks > 0
        shapes = [shape for shape, rank in zip(shapes, ranks, strict=True) if rank]
        own[own] = ranks > 0
        ranks = ranks[ranks > 0]
        coarseness = decoder.integers(len(ranks), MAX_COARSENESS, None, "factors", each(1))
        gain = np.empty(int(ranks.sum()), np.int64)
        first = np.cumsum(ranks) - ranks
        later = np.ones(len(gain), bool)
        later[first] = False
        gain[first] = decoder.integers(len(ranks), MAX_GAIN, None, "factors", each(1))
        gain[later] = -decoder.integers(
            len(gain) - len(ranks), MAX_GAIN, None, "factors", each(ranks - 1)
        )
        gains = [np.cumsum(g) for g in np.split(gain, first[1:])] if len(ranks) else []
        leading = compress(_leading(known, layout), some)
        used = [
            Factors(shape, int(c), g, first)
            for shape, c, g, first in zip(shapes, coarseness, gains, leading, strict=True)
        ]
        if any(part.gain[-1] < 0 for part in used):
            raise PayloadError("a singular value is out of range")
        contexts = Contexts(used)
        sides = np.array([sum(shape) for shape in shapes])
        for chunk in contexts.chunks():
            of_entries = contexts.of(chunk)
            width = np.minimum(np.maximum(ranks - chunk.start, 0), chunk.stop - chunk.start)
            counts = each(sides * width)
            coded = decoder.coded(
                len(of_entries), MAX_INTEGER, of_entries, "factors", counts, signed=True
            )
            levels = coded.take(len(of_entries))
            contexts.learn(levels)
            divide(levels, [part.levels[:, chunk] for part in used])
            del coded, levels, of_entries
        del contexts
        values = np.zeros(layout.size, np.float32)
        matrices = compress(_matrices(values, layout), some)
        for matrix, part in zip(matrices, used, strict=True):
            for view, block in _product(part, matrix):
                view += block
        return values
