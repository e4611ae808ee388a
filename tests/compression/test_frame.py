"""What a frame tells apart: methods, parameters, layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedbw_sweep.compression.base import Compressor, FloatVector, Layout, TensorSpec, floats_from
from fedbw_sweep.errors import PayloadError

LAYOUT = Layout((TensorSpec("w", (2, 3)),))
UPDATE = np.arange(6, dtype=np.float32)


@dataclass(frozen=True)
class Scaled(Compressor):
    """Sends every coordinate times a number."""

    scale: float = 1.0

    def _encode(self, update: FloatVector, layout: Layout, rng: np.random.Generator) -> bytes:
        return (update * np.float32(self.scale)).astype("<f4").tobytes()

    def _decode(self, body: memoryview, layout: Layout) -> FloatVector:
        return floats_from(body, layout.size, "<f4") / np.float32(self.scale)


def later_version() -> type[Scaled]:
    """Return the class as a later version may have it: of the same name, with one field more."""

    @dataclass(frozen=True)
    class Later(Scaled):
        offset: float = 0.0

    Later.__qualname__ = Scaled.__qualname__
    return Later


def frame(compressor: Compressor) -> bytes:
    return compressor.encode(UPDATE, LAYOUT, np.random.default_rng(0))[: Compressor.FRAME_BYTES]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_parameter_that_is_added_later_changes_no_payload(scale: float) -> None:
    before, after = Scaled(scale), later_version()(scale)
    assert repr(before) != repr(after)
    assert frame(before) == frame(after)
    payload = before.encode(UPDATE, LAYOUT, np.random.default_rng(0))
    np.testing.assert_array_equal(after.decode(payload, LAYOUT), UPDATE)
    with pytest.raises(PayloadError, match="not made by"):
        replace(after, offset=1.0).decode(payload, LAYOUT)  # type: ignore[call-arg]


def test_frames_tell_methods_and_parameters_apart() -> None:
    @dataclass(frozen=True)
    class Other(Scaled):
        pass

    different = [Scaled(), Scaled(2.0), Scaled(3.0), Other(), Other(2.0)]
    assert len({frame(compressor) for compressor in different}) == len(different)
