"""What the bench measures: ours and the peers' alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.layout import FloatVector, Layout


@dataclass(frozen=True)
class Codec:
    """A named way to turn a vector into bytes and back; ours and the peers' alike."""

    name: str
    encode: Callable[[FloatVector, np.random.Generator], bytes]
    decode: Callable[[bytes], FloatVector]
    unbiased: bool = False

    @classmethod
    def of(cls, name: str, compressor: Compressor, layout: Layout) -> Self:
        """Wrap a compressor for one layout."""
        return cls(
            name,
            lambda update, rng: compressor.encode(update, layout, rng),
            lambda payload: compressor.decode(payload, layout),
            compressor.unbiased,
        )
