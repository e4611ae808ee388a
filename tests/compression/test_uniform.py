"""Uniform quantisation and QSGD: payloads worked out by hand, error bounds, unbiasedness."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.uniform import QSGD, Uniform, pack, packed_bytes, unpack
from fedbw_sweep.errors import ConfigError, PayloadError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def layout_of(size: int) -> Layout:
    return Layout((TensorSpec("w", (size,)),))


def round_trip(method: Compressor, values: FloatVector, seed: int = 0) -> FloatVector:
    layout = layout_of(values.size)
    return method.decode(method.encode(values, layout, np.random.default_rng(seed)), layout)


def gaussian(size: int) -> FloatVector:
    return np.random.default_rng(3).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "size", "expected"),
    [
        (Uniform(8), 1000, 4 + 8 * 2 + 1000),
        (Uniform(4), 1000, 4 + 8 * 2 + 500),
        (Uniform(2), 1000, 4 + 8 * 2 + 250),
        (Uniform(2), 3, 4 + 2 + 1),
        (Uniform(4), 3, 4 + 2 + 2),
        (Uniform(8), 0, 4),
        (Uniform(4, block=32), 64, 4 + 4 + 32),
    ],
)
def test_size(method: Uniform, size: int, expected: int) -> None:
    payload = method.encode(gaussian(size), layout_of(size), np.random.default_rng(0))
    assert len(payload) == expected == method.expected_bytes(layout_of(size))


@pytest.mark.parametrize(
    ("bits", "values", "body"),
    [
        # bfloat16 1.0 is 3f80, -1.0 is bf80; codes i and i + n share a byte.
        (4, [-8, 4, 1, 7], "803f 18 74"),
        (4, [8, -4, -1, -7], "80bf 18 74"),
        (2, [-2, 1, 0, -1, -2], "803f 22 0d"),  # from the low bits up: 10 00 10, then 01 11
        (8, [-128, 127, 0, 1], "803f 80 7f 00 01"),
        (8, [0, 0], "8000 00 00"),
    ],
)
def test_payload(bits: int, values: list[float], body: str) -> None:
    method, update = Uniform(bits, block=8), np.array(values, np.float32)
    payload = method.encode(update, layout_of(update.size), np.random.default_rng(0))
    assert payload[4:].hex() == bytes.fromhex(body).hex()
    np.testing.assert_array_equal(method.decode(payload, layout_of(update.size)), update)


@pytest.mark.slow
@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2**60), 2**60, width=32)),
    st.sampled_from([8, 4, 2]),
    st.sampled_from([1, 3, 16]),
)
def test_error_is_at_most_a_step(values: FloatVector, bits: int, block: int) -> None:
    decoded = round_trip(Uniform(bits, block), values).astype(float)
    for start in range(0, values.size, block):
        part = values[start : start + block].astype(float)
        step = np.abs(part).max() / 2 ** (bits - 1) * (1 + 2**-7) + 1e-37
        assert np.all(np.abs(part - decoded[start : start + block]) <= step)


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.15), (2, 0.4)])
def test_less_error_than_symmetric_levels(bits: int, gain: float) -> None:
    values = gaussian(128 * 500)
    blocks = values.reshape(-1, 128)
    step = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    symmetric = np.square(np.rint(blocks / step) * step - blocks).sum()
    error = np.square(round_trip(Uniform(bits), values) - values).sum()
    assert error < (1 - gain) * symmetric


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("other", [-1.0, 1.0, -0.999, 0.5])
@pytest.mark.parametrize("scale", [1e-44, 1.0, 3.4028234e38])
def test_nothing_wraps_around(bits: int, rounding: str, other: float, scale: float) -> None:
    # The extremes of a block lie at the ends of the levels: one too far would change its sign.
    values = np.float32(scale) * np.array([1, other, -0.25, 0.25], np.float32)
    decoded = round_trip(Uniform(bits, rounding=rounding), values)
    step = scale / 2 ** (bits - 1) if rounding == "nearest" else scale / (2 ** (bits - 1) - 1)
    saturated = 0.021 * scale if scale > 1 else 0
    assert np.abs(decoded - values.astype(float)).max() <= 1.01 * step + saturated + 1.2e-38


def test_zeros_stay_zero_beside_others() -> None:
    values = gaussian(1000)
    values[::3] = 0
    for bits in (8, 4, 2):
        assert not round_trip(Uniform(bits), values)[::3].any()


def test_long_vectors_are_done_in_tiles() -> None:
    values = gaussian(600_000)
    blocks = range(0, values.size, 96)
    decoded = round_trip(Uniform(4, block=96), values)
    for start in list(blocks)[::700]:
        part = values[start : start + 96]
        np.testing.assert_array_equal(
            decoded[start : start + 96], round_trip(Uniform(4, block=96), part)
        )


def check_unbiased(method: Compressor, values: FloatVector, draws: int) -> None:
    """The squared error of the mean of many draws is their variance over their number."""
    decoded = np.stack([round_trip(method, values, seed) for seed in range(draws)]).astype(float)
    expected = decoded.var(axis=0, ddof=1).sum() / draws
    assert np.square(decoded.mean(axis=0) - values).sum() < 1.5 * expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [Uniform(b, rounding="stochastic") for b in (8, 4, 2)] + [QSGD(), QSGD(1), QSGD(3, 7)]
)
def test_unbiased(method: Compressor) -> None:
    check_unbiased(method, gaussian(200), 400)


def test_nearest_is_biased() -> None:
    with pytest.raises(AssertionError):
        check_unbiased(Uniform(2), gaussian(200), 400)


@pytest.mark.parametrize("method", [Uniform(4, rounding="stochastic"), QSGD()])
def test_draws_depend_on_the_generator_alone(method: Compressor) -> None:
    values = gaussian(500)
    assert np.array_equal(round_trip(method, values, 1), round_trip(method, values, 1))
    assert not np.array_equal(round_trip(method, values, 1), round_trip(method, values, 2))


def test_qsgd_of_exact_levels() -> None:
    values = np.array([3, -4, 0, 0, 0, 5], np.float32)
    # Norms 5, 0 and 5 over 5 levels: steps of 1, and every coordinate is on a level.
    np.testing.assert_array_equal(round_trip(QSGD(5, 2), values), values)


def test_qsgd_error_bound() -> None:
    values = gaussian(512 * 40)
    for levels in (4, 16, 64):
        error = np.square(round_trip(QSGD(levels), values) - values).sum()
        # Lemma 3.1: at most min(n / s**2, sqrt(n) / s) of the energy; 2**-7 for the rounded norm.
        bound = min(512 / levels**2, sqrt(512) / levels) * (1 + 2**-6)
        assert error <= bound * np.square(values).sum()


def test_qsgd_costs_its_entropy() -> None:
    values = gaussian(512 * 100)
    payload = QSGD().encode(values, layout_of(values.size), np.random.default_rng(0))
    step = np.repeat(np.sqrt(np.square(values.reshape(-1, 512)).sum(axis=1)) / 16, 512)
    counts = np.unique(np.rint(round_trip(QSGD(), values) / step), return_counts=True)[1]
    entropy = -(counts * np.log2(counts / values.size)).sum() / 8
    assert len(payload) < 1.01 * (entropy + 2 * 100)


@given(arrays(np.uint8, st.integers(0, 50)), st.integers(1, 8))
def test_pack(codes: NDArray[np.uint8], bits: int) -> None:
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(codes.size, bits)
    assert len(packed) <= -(-codes.size * bits // 8) + 2
    np.testing.assert_array_equal(
        unpack(packed, codes.size, bits), codes & np.uint8((1 << bits) - 1)
    )


@pytest.mark.parametrize("bad", ["c07f", "807f", "80ff"])
@pytest.mark.parametrize("method", [Uniform(8), QSGD()])
def test_scales_must_be_finite(method: Compressor, bad: str) -> None:
    payload = method.encode(gaussian(100), layout_of(100), np.random.default_rng(0))
    with pytest.raises(PayloadError):
        method.decode(payload[:4] + bytes.fromhex(bad) + payload[6:], layout_of(100))


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (Uniform, "bits", 3),
        (Uniform, "bits", "8"),
        (Uniform, "bits", 8.0),
        (Uniform, "block", 0),
        (Uniform, "block", True),
        (Uniform, "block", 1 << 40),
        (Uniform, "rounding", "up"),
        (QSGD, "levels", 0),
        (QSGD, "levels", 2.5),
        (QSGD, "levels", 1 << 20),
        (QSGD, "bucket", 0),
        (QSGD, "bucket", None),
    ],
)
def test_bad_parameters(method: type, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        method(**{key: value})
    assert (error.value.key, error.value.value) == (key, value)
