"""Count sketch: it adds up, and finds what stands out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.sketch import CountSketch, _median
from fedbw_sweep.errors import ConfigError, PayloadError

SIZE = 100_000
LAYOUT = Layout((TensorSpec("w", (SIZE,)),))
SPIKES = [3, 500, 20_000, 77_777, 99_999]


def update(seed: int, *, spikes: float) -> FloatVector:
    values = (0.01 * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)
    values[SPIKES] += np.float32(spikes)
    return values


def encode(method: CountSketch, values: FloatVector) -> bytes:
    return method.encode(values, LAYOUT, np.random.default_rng(0))


def test_size() -> None:
    # 10% of 100,000 counters in 5 rows of 2,000.
    assert len(encode(CountSketch(), update(1, spikes=0))) == 4 + 4 * 10_000
    assert CountSketch(rows=3).expected_bytes(LAYOUT) == 4 + 4 * 3 * 3334


def test_what_stands_out_is_found() -> None:
    values = update(1, spikes=5)
    decoded = CountSketch().decode(encode(CountSketch(), values), LAYOUT)
    np.testing.assert_array_equal(np.flatnonzero(decoded), SPIKES)
    # The noise in a counter is |x| / sqrt(2000), about 0.26; a median of five has half of it.
    np.testing.assert_allclose(decoded[SPIKES], 5, atol=0.8)


def test_what_does_not_stand_out_is_zero() -> None:
    assert not CountSketch().decode(encode(CountSketch(), update(1, spikes=0)), LAYOUT).any()


def test_sketches_add_up() -> None:
    one, two = update(1, spikes=3), update(2, spikes=-8)
    bodies = [np.frombuffer(encode(CountSketch(), v)[4:], "<f4") for v in (one, two)]
    total = encode(CountSketch(), one + two)
    np.testing.assert_allclose(bodies[0] + bodies[1], np.frombuffer(total[4:], "<f4"), atol=1e-4)
    decoded = CountSketch().decode(total[:4] + (bodies[0] + bodies[1]).tobytes(), LAYOUT)
    np.testing.assert_array_equal(np.flatnonzero(decoded), SPIKES)


def test_other_seeds_put_coordinates_elsewhere() -> None:
    values = update(1, spikes=5)
    assert encode(CountSketch(seed=1), values)[4:] != encode(CountSketch(), values)[4:]


def test_the_generator_is_not_used() -> None:
    values = update(1, spikes=5)
    other = CountSketch().encode(values, LAYOUT, np.random.default_rng(9))
    assert encode(CountSketch(), values) == other


@given(
    st.sampled_from([1, 3, 5, 7]).flatmap(
        lambda rows: arrays(np.float32, (rows, 4), elements=st.floats(-9, 9, width=32))
    )
)
def test_median(values: FloatVector) -> None:
    expected = np.median(values, axis=0)
    np.testing.assert_array_equal(_median(values), expected)


def test_counters_must_be_finite() -> None:
    payload = encode(CountSketch(), update(1, spikes=0))
    with pytest.raises(PayloadError):
        CountSketch().decode(payload[:4] + b"\x00\x00\xc0\x7f" + payload[8:], LAYOUT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counters", 0),
        ("counters", 1.5),
        ("counters", True),
        ("counters", float("nan")),
        ("significance", -1),
        ("significance", float("inf")),
        ("significance", "3"),
        ("rows", 4),
        ("rows", 0),
        ("rows", 3.0),
        ("seed", -1),
        ("seed", None),
    ],
)
def test_bad_parameters(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        CountSketch(**{key: value})  # type: ignore[arg-type]
    assert error.value.key == key
