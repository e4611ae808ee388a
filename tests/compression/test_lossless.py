"""Lossless: the same bits back, at the cost of their entropy."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lossless import Lossless
from tests.compression.test_sizes import FRAME, LENGTH, only, size, stream, table

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def payload_of(update: FloatVector, *sizes: int) -> bytes:
    layout = Layout(tuple(TensorSpec(f"t{i}", (size,)) for i, size in enumerate(sizes)))
    payload = Lossless().encode(update, layout, np.random.default_rng(0))
    decoded = Lossless().decode(payload, layout)
    np.testing.assert_array_equal(decoded.view(np.uint32), update.view(np.uint32))
    return payload


@pytest.mark.slow
@given(arrays(np.float32, st.integers(0, 50), elements=finite))
def test_same_bits(update: FloatVector) -> None:
    payload_of(update, 0, update.size // 2, 0, update.size - update.size // 2)


def test_same_bits_where_exponents_are_common_and_rare() -> None:
    rng = np.random.default_rng(0)
    update = (rng.standard_normal(30_000) * 10.0 ** rng.integers(-40, 30, 30_000)).astype("f4")
    update[:20_000] = rng.standard_normal(20_000)
    payload_of(update, 10_000, 20_000)


@pytest.mark.slow
def test_nearly_nothing_for_constants() -> None:
    assert len(payload_of(np.zeros(1_000_000, np.float32), 1_000_000)) < 40
    assert len(payload_of(np.full(1_000_000, -0.1, np.float32), 1_000_000)) < 320


def test_random_mantissas_cost_their_bits() -> None:
    # Uniform in [1, 2): the exponent is constant and 23 bits are random.
    update = (1 + np.random.default_rng(0).integers(0, 1 << 23, 200_000) / 2**23).astype("f4")
    bits = 8 * len(payload_of(update, update.size)) / update.size
    assert 23 <= bits < 23 * 1.001


def test_difference_of_weights_is_cheaper_than_a_random_float() -> None:
    rng = np.random.default_rng(0)
    before = (0.02 * rng.standard_normal(200_000)).astype(np.float32)
    update = (before + 1e-3 * rng.standard_normal(200_000)).astype(np.float32) - before
    fresh = (1e-3 * rng.standard_normal(200_000)).astype(np.float32)
    # Weights near 0.02 are multiples of 2**-29, so of the 23 bits that updates near 1e-3 have, some
    # three are zero.
    assert len(payload_of(update, 200_000)) < 0.885 * len(payload_of(fresh, 200_000))


def test_a_scale_per_tensor_costs_little() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    update = values * np.repeat(np.float32(2.0) ** -np.arange(10).astype(np.float32), 10_000)
    together = len(payload_of(update, 100_000))
    apart = len(payload_of(update, *[10_000] * 10))
    assert apart < together - 100_000 // 8  # at least a bit less each


# Sizes worked out on paper, as in test_sizes.py


@pytest.mark.parametrize("tensors", range(1, 9))
def test_exponents(tensors: int) -> None:
    # Half of the 16 numbers of each tensor are 0, whose exponent is 0, and half are 2**-126, whose
    # exponent is 1; three octets of the rest are 0 everywhere, and end the stream with zeros. A
    # table is 5.63 bits. The last exponents are 1 0 1 0 1 0 1 0, from the last.
    bits = tensors * (5.63 + 16)
    expected = FRAME + stream(bits - 1, 0b10101010 / 256, 0b10101011 / 256)
    assert size(Lossless(), [0, 2.0**-126] * 8 * tensors, *[(16,)] * tensors) == expected


def test_mantissas() -> None:
    # 1 + k * 2**-23 for k below 256: one exponent, 127; the low octet is each number once, 8 bits.
    # The table of the first: a length of 7 (5.27), 3, 6 bits below the leading one, and changes of
    # -23, 126 times 0, and 23. At slope 2, 0 costs log2(5/3) = 0.74. A share of 2**-23.74 is one
    # in 2**24, and with the one that each has the others cost 23 bits.
    of_exponent = LENGTH + 7 / 2 + 3 + 6 + 126 * log2(5 / 3) + 2 * 23
    assert table(only(127)) == pytest.approx(of_exponent, abs=0.01)
    # That of the octets: a length of 8 (5.77), 3, 7 bits of 255, and 256 changes of 0.
    of_octets = LENGTH + 8 / 2 + 3 + 7 + 256 * log2(17 / 15)
    bits = of_exponent + of_octets + 256 * 8
    # The last octet is 255, the last 256th.
    update = 1 + np.arange(256) * 2.0**-23
    assert size(Lossless(), update.astype(np.float32)) == FRAME + stream(bits - 8, 255 / 256)


def test_lossless_zeros() -> None:
    assert size(Lossless(), [0] * 1000) == FRAME
