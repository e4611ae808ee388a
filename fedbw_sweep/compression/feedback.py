"""Error feedback round any compressor, and the state that compressors keep between rounds."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import NOTHING_KNOWN, Compressor, Known, all_finite
from fedbw_sweep.compression.layout import FloatVector, Layout

State = dict[str, NDArray[np.generic]]
"""What one client keeps from round to round; empty before its first."""

RESIDUAL = "residual"


@runtime_checkable
class StatefulCompressor(Protocol):
    """A compressor that encodes better with what it kept from the round before.

    Its payload is decoded without the state, as every other.
    """

    def encode_with_state(
        self,
        update: FloatVector,
        layout: Layout,
        rng: np.random.Generator,
        state: State,
        known: Known,
    ) -> tuple[bytes, State]:
        """Compress one update; return the payload and the state for the next round."""


def encode_with_state(
    compressor: Compressor,
    update: FloatVector,
    layout: Layout,
    rng: np.random.Generator,
    state: State,
    known: Known = NOTHING_KNOWN,
) -> tuple[bytes, State]:
    """Compress one update, keeping the compressor's own state where it has one.

    Parameters
    ----------
    compressor : Compressor
        Any method.
    update : ndarray of float32, shape (layout.size,)
        Trained minus received weights.
    layout : Layout
        The arrays the vector is made of.
    rng : numpy.random.Generator
        The only source of randomness.
    state : dict of str to ndarray
        What the last call for this client returned; empty at first. It is not modified.
    known : Known, optional
        What the decoder will hold too.

    Returns
    -------
    payload : bytes
        What is sent.
    state : dict of str to ndarray
        The state for the next round.

    Raises
    ------
    DivergenceError
        If the update holds NaN or infinity.
    """
    if isinstance(compressor, StatefulCompressor):
        return compressor.encode_with_state(update, layout, rng, state, known)
    return compressor.encode(update, layout, rng, known), {}


def encode_with_feedback(
    compressor: Compressor,
    update: FloatVector,
    layout: Layout,
    rng: np.random.Generator,
    state: State,
    known: Known = NOTHING_KNOWN,
    *,
    decay: float = 1.0,
) -> tuple[bytes, State]:
    """Compress an update plus what earlier rounds left unsent, and keep what is unsent now.

    ``update + old residual == decoded + new residual`` to float rounding, so nothing is lost, only
    delayed (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847). Sums beyond the float32
    range saturate. With a `decay` below 1 the old residual counts for that much (SparseLoCo: Sarfi
    et al. 2025, arXiv 2508.15706). The other arguments, returns and errors are those of
    `encode_with_state`; the residual is kept under ``"residual"``.
    """
    corrected = update
    residual = state.get(RESIDUAL)
    if residual is not None:
        if residual.shape != update.shape:
            raise ValueError(f"residual of shape {residual.shape}, update of {update.shape}")
        counted = residual if decay == 1 else np.multiply(residual, decay, dtype=np.float32)
        corrected = _saturating(np.add, update, counted)
    payload, kept = encode_with_state(compressor, corrected, layout, rng, state, known)
    decoded = compressor.decode(payload, layout, known)
    return payload, {**kept, RESIDUAL: _saturating(np.subtract, corrected, decoded, out=decoded)}


def _saturating(
    operation: np.ufunc,
    left: FloatVector,
    right: NDArray[np.generic],
    out: FloatVector | None = None,
) -> FloatVector:
    """Add or subtract; a finite `left` gives a finite result."""
    with np.errstate(over="ignore"):
        result: FloatVector = operation(left, right, out=out, dtype=np.float32)
    if not all_finite(result) and all_finite(left):
        limit = np.finfo(np.float32).max
        np.clip(result, -limit, limit, out=result)
    return result
