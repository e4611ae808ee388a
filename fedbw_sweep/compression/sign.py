"""One bit for each coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.cast import from_bfloat16, to_bfloat16
from fedbw_sweep.compression.layout import FloatVector, Ints, Layout
from fedbw_sweep.compression.tiles import tiles
from fedbw_sweep.errors import ConfigError


@dataclass(frozen=True)
class Sign(Compressor):
    """The sign of each coordinate, times the mean magnitude of its tensor or row.

    Bernstein et al. 2018, arXiv 1802.04434; the scale, without which error feedback does not
    converge, is that of Karimireddy et al. 2019, arXiv 1901.09847. It travels as a bfloat16. Zeros
    count as positive; a tensor or row of nothing but zeros stays zero.

    Parameters
    ----------
    scale : str
        What shares a scale: ``"tensor"``, or ``"row"`` (the coordinates of one index of a matrix's
        first axis; a vector is one row).
    """

    scale: str = "tensor"
    fixed_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale not in ("tensor", "row"):
            raise ConfigError("scale", self.scale, "tensor or row")

    def expected_bytes(self, layout: Layout) -> int:
        """Payload size in bytes, exact."""
        return self.FRAME_BYTES + 2 * self._groups(layout).size + -(-layout.size // 8)

    def _groups(self, layout: Layout) -> Ints:
        """Return the number of coordinates that share each scale, in vector order."""
        scales = self._scales(layout)
        return np.repeat(layout.sizes // scales, scales)

    def _scales(self, layout: Layout) -> Ints:
        """Return the number of scales of each tensor that is not empty."""
        by_row = self.scale == "row"
        shapes = [t.shape for t in layout.filled]
        return np.array([s[0] if by_row and len(s) > 1 else 1 for s in shapes], np.int64)

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        groups = self._groups(layout)
        scales = np.zeros(0, np.float32)
        if update.size:
            starts = np.cumsum(groups) - groups
            sums = np.add.reduceat(np.abs(update), starts, dtype=np.float64)
            scales = (sums / groups).astype(np.float32)
        return to_bfloat16(scales).astype("<u2").tobytes() + np.packbits(update < 0).tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        counts = self._scales(layout)
        ends, count = np.cumsum(counts), int(counts.sum())
        codes = floats_from(body[: 2 * count], count, "<u2", "tables", counts)
        packed = floats_from(body[2 * count :], -(-layout.size // 8), "u1").view(np.uint8)
        update = np.empty(layout.size, np.float32)
        arrays = np.split(update, np.cumsum(layout.sizes)[:-1]) if layout.size else []
        for array, end, own in zip(arrays, ends, counts, strict=True):
            scales = from_bfloat16(codes[end - own : end].astype(np.uint16))
            array.reshape(own, -1)[:] = scales[:, None]
        bits = update.view(np.uint32)
        for tile in tiles(layout.size):
            octets = packed[tile.start // 8 : -(-tile.stop // 8)]
            negative = np.unpackbits(octets, count=tile.stop - tile.start)
            bits[tile] ^= negative.astype(np.uint32) << 31
        return update
