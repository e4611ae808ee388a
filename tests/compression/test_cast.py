"""Casts: bit patterns worked out by hand, and NumPy's own half precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedbw_sweep.compression.base import Compressor, Known
from fedbw_sweep.compression.cast import BFloat16, Dense, Float8, Float16
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.errors import PayloadError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = arrays(np.float32, st.integers(0, 40), elements=finite)


def layout_of(*sizes: int) -> Layout:
    return Layout(tuple(TensorSpec(f"t{i}", (size,)) for i, size in enumerate(sizes)))


def body(method: Compressor, values: list[float] | FloatVector) -> bytes:
    update = np.array(values, np.float32)
    payload = method.encode(update, layout_of(update.size), np.random.default_rng(0))
    return payload[len(method._frame(layout_of(), Known())) :]


def decoded(method: Compressor, values: FloatVector) -> FloatVector:
    layout = layout_of(values.size)
    return method.decode(method.encode(values, layout, np.random.default_rng(0)), layout)


def test_dense_is_the_bare_floats() -> None:
    assert body(Dense(), [1.0, -2.0]) == bytes.fromhex("0000803f 000000c0")
    assert Dense().expected_bytes(layout_of(14_067_712)) == 56_270_848


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1.0, 0x3C00),
        (-2.0, 0xC000),
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (65504, 0x7BFF),
        (65519.9, 0x7BFF),
        (65520, 0x7BFF),  # would round to infinity
        (-3e38, 0xFBFF),
        (2.0**-14, 0x0400),  # the smallest normal number
        (2.0**-24, 0x0001),
        (2.0**-25, 0x0000),  # half way: to even
        (1.5 * 2.0**-25, 0x0001),
        (1 + 2.0**-11, 0x3C00),
        (1 + 3 * 2.0**-11, 0x3C02),
        (2 - 2.0**-12, 0x4000),  # rounds up into the next exponent
    ],
)
def test_float16_codes(value: float, code: int) -> None:
    assert body(Float16(), [value]) == code.to_bytes(2, "little")


@pytest.mark.slow
@given(vectors)
def test_float16_rounds_as_numpy_does(values: FloatVector) -> None:
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(decoded(Float16(), values), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1.0, 0x3F80),
        (-1.0, 0xBF80),
        (-0.0, 0x8000),
        (1 + 2.0**-8, 0x3F80),
        (1 + 3 * 2.0**-8, 0x3F82),
        (1 + 2.0**-8 + 2.0**-20, 0x3F81),
        (3.4028235e38, 0x7F7F),  # would round to infinity
        (-3.4028235e38, 0xFF7F),
        (2.0**-133, 0x0001),
        (2.0**-134, 0x0000),
    ],
)
def test_bfloat16_codes(value: float, code: int) -> None:
    assert body(BFloat16(), [value]) == code.to_bytes(2, "little")


@given(arrays(np.float32, 9, elements=st.floats(2**-100, 2**100, width=32)))
def test_bfloat16_error_is_half_a_step(values: FloatVector) -> None:
    error = np.abs(decoded(BFloat16(), values).astype(float) - values)
    assert np.all(error <= values.astype(float) * 2.0**-8)
    assert np.all(decoded(BFloat16(), decoded(BFloat16(), values)) == decoded(BFloat16(), values))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (448, 0x7E),
        (-448, 0xFE),
        (1, 0x38),
        (-1.5, 0xBC),
        (0, 0x00),
        (17, 0x58),  # half way from 16 to 18: to even
        (19, 0x5A),
        (2.0**-6, 0x08),  # the smallest normal number
        (2.0**-9, 0x01),
        (2.0**-10, 0x00),
        (3 * 2.0**-10, 0x02),
    ],
)
def test_float8_codes(value: float, code: int) -> None:
    # The largest magnitude is 448, so the scale is 1.
    assert body(Float8(), [448, value]) == bytes.fromhex("0000803f 7e") + bytes([code])


def test_float8_takes_the_nearest_of_all_codes() -> None:
    numbers = np.array(
        [(1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) if c >= 8 else c * 2.0**-9 for c in range(127)]
    )
    values = np.geomspace(1e-4, 448, 2000).astype(np.float32)
    nearest = np.abs(values[:, None] - numbers).min(axis=1)
    np.testing.assert_allclose(np.abs(decoded(Float8(), values) - values), nearest, atol=1e-7)


def test_float8_scales_each_tensor() -> None:
    layout = layout_of(2, 0, 2)
    update = np.array([448e-9, 1e-9, -448e9, 32e9], np.float32)
    payload = Float8().encode(update, layout, np.random.default_rng(0))
    assert len(payload) == 4 + 3 * 4 + 4
    np.testing.assert_allclose(Float8().decode(payload, layout), update, rtol=1e-6)


@pytest.mark.parametrize("bad", ["0000c07f", "0000807f"])
def test_float8_scale_must_be_finite(bad: str) -> None:
    payload = Float8().encode(np.ones(2, np.float32), layout_of(2), np.random.default_rng(0))
    with pytest.raises(PayloadError):
        Float8().decode(payload[:4] + bytes.fromhex(bad) + payload[8:], layout_of(2))


def test_float8_code_of_nan_is_refused() -> None:
    payload = Float8().encode(np.ones(2, np.float32), layout_of(2), np.random.default_rng(0))
    with pytest.raises(PayloadError):
        Float8().decode(payload[:-1] + b"\x7f", layout_of(2))


@pytest.mark.parametrize("method", [Float16(), BFloat16(), Float8()])
def test_long_vectors_are_done_in_tiles(method: Compressor) -> None:
    values = np.random.default_rng(0).standard_normal(200_003).astype(np.float32)
    values[0] = 5.5  # the largest, whichever part is taken
    whole, part = decoded(method, values), decoded(method, np.append(values[:1], values[-999:]))
    np.testing.assert_array_equal(whole[-999:], part[1:])
