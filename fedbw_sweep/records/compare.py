"""How far two records of one run may lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

OF_PREDICTION = {"predicted_bytes", "prediction"}
"""Columns that a run does not measure: an estimate rests on the bench's table of today."""


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may lie apart, relative to the first; by default not at all.

    Attributes
    ----------
    loss, bytes
        Of a run.
    round_loss, round_bytes
        Of one round or message: what one has too much, the next often has too little.
    """

    loss: float = 0.0
    bytes: float = 0.0
    round_loss: float = 0.0
    round_bytes: float = 0.0

    @classmethod
    def of(cls, *, fixed_size: bool, renumbered: bool = False) -> Tolerance:
        """Return what is allowed where two records of a run need not be equal.

        Parameters
        ----------
        fixed_size : bool
            Whether the methods' size is fixed: then the bytes must be equal.
        renumbered : bool
            Whether `numerics` has changed between them by design, not the machine alone.
        """
        if fixed_size:
            return cls(UNLIKE.loss, 0.0, UNLIKE.round_loss, 0.0)
        return RENUMBERED if renumbered else UNLIKE

    @property
    def of_rounds(self) -> Tolerance:
        """What is allowed of single rounds and messages where this is allowed of a run."""
        return Tolerance(self.round_loss, self.round_bytes)

    def differ(self, name: str, old: Any, new: Any) -> bool:
        """Whether two values of a column are further apart."""
        if not (pd.api.types.is_scalar(old) and pd.api.types.is_scalar(new)):
            return bool(old != new)
        if pd.isna(old) or pd.isna(new):
            return not (pd.isna(old) and pd.isna(new))
        if not self.loss or isinstance(old, str) or isinstance(new, str):
            return bool(old != new) and not (self.loss and name == "model_hash")
        if name == "perplexity" and min(old, new) > 0:  # a loss is its logarithm
            old, new = math.log(old), math.log(new)
        of_shapes = name.startswith(("dense_", "frozen_"))
        of_bytes = name.endswith(("bytes", "ratio")) or name == "bits_per_coordinate"
        measured = self.loss if isinstance(old, float) else 0.0  # whole numbers are counts
        allowed = self.bytes if of_bytes else measured
        return bool(abs(new - old) > (0.0 if of_shapes else allowed) * abs(old))


UNLIKE = Tolerance(1e-2, 2e-2, 2e-2, 1e-1)
"""Between unlike machines, where last digits differ: what starts as 1e-7 of a gradient grows with
every step of training, and the bytes of an update follow from its values."""

RENUMBERED = Tolerance(3e-2, 0.2, 0.1, 0.3)
"""Across a change of numbers by design, for methods whose size is not fixed: since `numerics` 3
``lowrank_ecsq`` spends 2% more to 23% fewer bits at one step, for an error up to 11% larger."""
