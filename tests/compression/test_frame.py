"""What a frame tells apart: methods, parameters, layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.feedback import RESIDUAL, encode_with_feedback
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.errors import PayloadError

LAYOUT = Layout((TensorSpec("w", (2, 3)),))
UPDATE = np.arange(6, dtype=np.float32)


@dataclass(frozen=True)
class Scaled(Compressor):
    """Sends every coordinate times a number."""

    scale: float = 1.0

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        return (update * np.float32(self.scale)).astype("<f4").tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
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


@dataclass(frozen=True)
class Trained(Compressor):
    """Sends the sums of the update and the received model, as integers of one byte."""

    uses: ClassVar[tuple[str, ...]] = ("received",)

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        assert known.initial is None
        before = 0 if known.received is None else known.received
        return np.rint(update + before).astype(np.int8).tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        before = 0 if known.received is None else known.received
        return floats_from(body, layout.size, "i1").astype(np.float32) - before


RECEIVED = np.full(6, 0.25, np.float32)
KNOWN = Known(initial=np.full(6, 7, np.float32), received=RECEIVED)


def test_a_method_is_given_what_it_uses_and_both_ends_must_hold_the_same() -> None:
    payload = Trained().encode(UPDATE, LAYOUT, np.random.default_rng(0), KNOWN)
    assert len(payload) == Compressor.FRAME_BYTES + 6
    # What the method does not use may differ.
    decoded = Trained().decode(payload, LAYOUT, Known(received=RECEIVED))
    np.testing.assert_array_equal(decoded, UPDATE - RECEIVED)  # 0.25 more rounds down
    assert Trained().parts(payload, LAYOUT, KNOWN).total() == len(payload)
    other = np.array([0.25] * 5 + [0.5], np.float32)
    for known in (Known(), Known(initial=RECEIVED), Known(received=other)):
        with pytest.raises(PayloadError, match=r"another model \(received\)"):
            Trained().decode(payload, LAYOUT, known)


def test_what_is_known_is_in_no_other_frame() -> None:
    rng = np.random.default_rng
    assert Scaled().encode(UPDATE, LAYOUT, rng(0), KNOWN) == Scaled().encode(UPDATE, LAYOUT, rng(0))


def test_error_feedback_passes_on_what_is_known() -> None:
    payload, state = encode_with_feedback(
        Trained(), UPDATE, LAYOUT, np.random.default_rng(0), {}, KNOWN
    )
    np.testing.assert_array_equal(Trained().decode(payload, LAYOUT, KNOWN), UPDATE - RECEIVED)
    np.testing.assert_array_equal(state[RESIDUAL], RECEIVED)


@pytest.mark.parametrize("wrong", [np.zeros(5, np.float32), np.zeros(6)])
def test_a_model_of_another_shape_or_type_is_refused(wrong: FloatVector) -> None:
    with pytest.raises(ValueError, match=r"expected float32 of shape \(6,\)"):
        Trained().encode(UPDATE, LAYOUT, np.random.default_rng(0), Known(received=wrong))
