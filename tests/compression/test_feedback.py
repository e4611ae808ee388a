"""Error feedback: residuals worked out by hand, and what it buys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.compression.feedback import (
    RESIDUAL,
    State,
    encode_with_feedback,
    encode_with_state,
)
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lowrank import LowRank
from fedbw_sweep.compression.sign import Sign
from fedbw_sweep.errors import DivergenceError

LAYOUT = Layout((TensorSpec("w", (4,)),))


@dataclass(frozen=True)
class Largest(Compressor):
    """Keeps the coordinate of largest magnitude: four bytes of place, four of value."""

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        place = int(np.argmax(np.abs(update)))
        return place.to_bytes(4, "little") + update[place : place + 1].tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        update = np.zeros(layout.size, np.float32)
        update[int.from_bytes(body[:4], "little")] = floats_from(body[4:], 1, "<f4")[0]
        return update


def vector(*values: float) -> FloatVector:
    return np.array(values, np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_three_rounds_by_hand() -> None:
    update, state = vector(4, 3, 2, 0), State()
    for sent, residual in [
        (vector(4, 0, 0, 0), vector(0, 3, 2, 0)),
        (vector(0, 6, 0, 0), vector(4, 0, 4, 0)),
        (vector(8, 0, 0, 0), vector(0, 3, 6, 0)),
    ]:
        payload, state = encode_with_feedback(Largest(), update, LAYOUT, rng(), state)
        np.testing.assert_array_equal(Largest().decode(payload, LAYOUT), sent)
        np.testing.assert_array_equal(state[RESIDUAL], residual)


def test_three_rounds_that_forget_half_by_hand() -> None:
    update, state = vector(4, 3, 2, 0), State()
    for sent, residual in [
        (vector(4, 0, 0, 0), vector(0, 3, 2, 0)),
        (vector(0, 4.5, 0, 0), vector(4, 0, 3, 0)),
        (vector(6, 0, 0, 0), vector(0, 3, 3.5, 0)),
    ]:
        payload, state = encode_with_feedback(Largest(), update, LAYOUT, rng(), state, decay=0.5)
        np.testing.assert_array_equal(Largest().decode(payload, LAYOUT), sent)
        np.testing.assert_array_equal(state[RESIDUAL], residual)


def test_first_round_sends_what_plain_encoding_does() -> None:
    update = vector(1, -2, 3, -4)
    payload, _ = encode_with_feedback(Sign(), update, LAYOUT, rng(), {})
    assert payload == Sign().encode(update, LAYOUT, rng())


def test_nothing_is_left_where_nothing_is_lost() -> None:
    _, state = encode_with_feedback(Dense(), vector(1, -2, 3, 4e-39), LAYOUT, rng(), {})
    np.testing.assert_array_equal(state[RESIDUAL], vector(0, 0, 0, 0))


def test_mean_of_what_is_sent_converges() -> None:
    update, state, rounds = vector(1, 0.5, -0.1, 0.01), State(), 400
    total = np.zeros(4)
    for _ in range(rounds):
        payload, state = encode_with_feedback(Sign(), update, LAYOUT, rng(), state)
        total += Sign().decode(payload, LAYOUT)
    np.testing.assert_allclose(total / rounds, update, atol=0.02)
    plain = Sign().decode(Sign().encode(update, LAYOUT, rng()), LAYOUT)
    assert np.abs(plain - update).max() > 0.3


def test_sums_beyond_float32_saturate() -> None:
    largest = float(np.finfo(np.float32).max)
    state: State = {RESIDUAL: vector(largest, -largest, 0, 0)}
    update = vector(largest, -largest, 1, 0)
    payload, state = encode_with_feedback(Dense(), update, LAYOUT, rng(), state)
    np.testing.assert_array_equal(Dense().decode(payload, LAYOUT), vector(largest, -largest, 1, 0))
    np.testing.assert_array_equal(state[RESIDUAL], vector(0, 0, 0, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_divergence_is_not_hidden(bad: float) -> None:
    state: State = {RESIDUAL: vector(1, 1, 1, 1)}
    with pytest.raises(DivergenceError):
        encode_with_feedback(Sign(), vector(bad, 0, 0, 0), LAYOUT, rng(), state)


def test_residual_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="residual"):
        encode_with_feedback(Sign(), vector(1, 2, 3, 4), LAYOUT, rng(), {RESIDUAL: vector(1)})


def test_state_of_the_compressor_travels_beside_the_residual() -> None:
    layout = Layout((TensorSpec("w", (30, 20)),))
    update = np.random.default_rng(1).standard_normal(600).astype(np.float32)
    _, state = encode_with_feedback(LowRank(2), update, layout, rng(), {})
    assert {key: value.shape for key, value in state.items()} == {
        RESIDUAL: (600,),
        "right_factors": (40,),
    }
    _, state = encode_with_state(LowRank(2), update, layout, rng(), state)
    assert set(state) == {"right_factors"}
    assert encode_with_state(Sign(), update, layout, rng(), {})[1] == {}
