"""One bit per coordinate: payloads worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedbw_sweep.compression.layout import Layout, TensorSpec
from fedbw_sweep.compression.sign import Sign
from fedbw_sweep.errors import ConfigError, PayloadError

LAYOUT = Layout((TensorSpec("w", (2, 3)), TensorSpec("none", (0, 3)), TensorSpec("b", (2,))))
UPDATE = np.array([1, -2, 3, -4, 5, -6, 0, -0.5], np.float32)


@pytest.mark.parametrize(
    ("scale", "body", "decoded"),
    [
        # Means 3.5 and 0.25 as bfloat16, then a bit for each negative coordinate.
        ("tensor", "6040 803e 55", [3.5, -3.5, 3.5, -3.5, 3.5, -3.5, 0.25, -0.25]),
        # Rows have means 2 and 5; a vector is one row.
        ("row", "0040 a040 803e 55", [2, -2, 2, -5, 5, -5, 0.25, -0.25]),
    ],
)
def test_payload(scale: str, body: str, decoded: list[float]) -> None:
    method = Sign(scale)
    payload = method.encode(UPDATE, LAYOUT, np.random.default_rng(0))
    assert payload[4:].hex() == bytes.fromhex(body).hex()
    assert len(payload) == method.expected_bytes(LAYOUT)
    np.testing.assert_array_equal(method.decode(payload, LAYOUT), np.array(decoded, np.float32))


def test_a_tensor_of_zeros_beside_another_stays_zero() -> None:
    update = UPDATE.copy()
    update[:6] = 0
    payload = Sign().encode(update, LAYOUT, np.random.default_rng(0))
    np.testing.assert_array_equal(
        Sign().decode(payload, LAYOUT), np.array([0] * 6 + [0.25, -0.25], np.float32)
    )


def test_one_bit_and_a_little() -> None:
    layout = Layout((TensorSpec("w", (1000, 1000)),))
    assert Sign("tensor").expected_bytes(layout) == 4 + 2 + 125_000
    assert Sign("row").expected_bytes(layout) == 4 + 2000 + 125_000


def test_scale_must_be_finite() -> None:
    payload = Sign().encode(UPDATE, LAYOUT, np.random.default_rng(0))
    with pytest.raises(PayloadError):
        Sign().decode(payload[:4] + b"\xc0\x7f" + payload[6:], LAYOUT)


def test_bad_parameter() -> None:
    with pytest.raises(ConfigError, match="tensor or row"):
        Sign("column")
