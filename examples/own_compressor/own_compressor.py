"""Every n-th coordinate, in turn: the simplest sparsifier that a round's draw decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedbw_sweep.compression.base import Compressor, Known, book, floats_from
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.errors import ConfigError, PayloadError


@dataclass(frozen=True)
class EveryNth(Compressor):
    """Send every n-th coordinate as float32, from a place that is drawn anew for each update.

    Parameters
    ----------
    n : int
        How far apart the coordinates are, from 1 to 255; one in n is sent.
    """

    n: int = 10
    fixed_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= 255:
            raise ConfigError("n", self.n, "a whole number from 1 to 255")

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact: the frame, the first place, a float for each step."""
        return self.FRAME_BYTES + 1 + 4 * -(-layout.size // self.n)

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        start = int(rng.integers(self.n))
        count = -(-layout.size // self.n)
        sent = np.zeros(count, "<f4")  # the last one may lie beyond the end
        values = update[start :: self.n]
        sent[: len(values)] = values
        return bytes([start]) + sent.tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        values = floats_from(body[1:], -(-layout.size // self.n), "<f4")
        start = body[0] if len(body) else self.n
        if start >= self.n:
            raise PayloadError(f"{start} is no place to start from")
        book("indices", 8)
        update = np.zeros(layout.size, np.float32)
        places = update[start :: self.n]
        places[:] = values[: len(places)]
        return update
