"""How far two records of one run may lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

LOSS_TOLERANCE, BYTES_TOLERANCE = 1e-2, 2e-2
"""How far a run's losses and bytes may lie apart, relative to the first, where last digits may
differ: on another processor or device, or where `numerics` has changed by design. What starts as
1e-7 of a gradient grows with every step of training. Bytes follow from an update's values, but for
methods of fixed size, whose bytes must be equal."""

ROUND_LOSS_TOLERANCE, ROUND_BYTES_TOLERANCE = 2e-2, 1e-1
"""The same for one round or message: what one has too much, the next often has too little."""

OF_LOSS = {"loss", "initial_loss", "train_loss", "bits_per_byte"}
OF_PREDICTION = {"predicted_bytes", "prediction"}
"""Columns that a run does not measure: an estimate rests on the bench's table of today."""


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may lie apart, relative to the first; by default not at all."""

    loss: float = 0.0
    bytes: float = 0.0

    @classmethod
    def of(cls, *, fixed_size: bool) -> Tolerance:
        """Return what is allowed between unlike machines, by whether the methods' size is fixed."""
        return cls(LOSS_TOLERANCE, 0.0 if fixed_size else BYTES_TOLERANCE)

    @property
    def of_rounds(self) -> Tolerance:
        """What is allowed of single rounds and messages where this is allowed of a run."""
        return Tolerance(
            ROUND_LOSS_TOLERANCE if self.loss else 0.0, ROUND_BYTES_TOLERANCE if self.bytes else 0.0
        )

    def differ(self, name: str, old: Any, new: Any) -> bool:
        """Whether two values of a column are further apart."""
        if not (pd.api.types.is_scalar(old) and pd.api.types.is_scalar(new)):
            return bool(old != new)
        if pd.isna(old) or pd.isna(new):
            return not (pd.isna(old) and pd.isna(new))
        if not self.loss or isinstance(old, str) or isinstance(new, str):
            return bool(old != new) and not (self.loss and name == "model_hash")
        if (
            name == "perplexity" and min(old, new) > 0
        ):  # the exponential of a loss, so that its logarithm is one
            old, new, name = math.log(old), math.log(new), "loss"
        of_shapes = name.startswith(("dense_", "frozen_"))
        of_bytes = name.endswith(("bytes", "ratio")) or name == "bits_per_coordinate"
        allowed = self.loss if name in OF_LOSS else self.bytes if of_bytes else 0.0
        return bool(abs(new - old) > (0.0 if of_shapes else allowed) * abs(old))
