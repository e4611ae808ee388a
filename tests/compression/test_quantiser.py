"""The dead-zone quantiser against theory and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.quantiser import (
    BITS,
    CLASSES,
    ERROR,
    SHIFT,
    SLOPE,
    THRESHOLD,
    dequantise,
    quantise,
    quantise_to_rate,
    rate_differences,
)


@pytest.mark.parametrize("scale_class", [6, 7, 8, 10, 12])
def test_the_design_is_the_best_quantiser_of_a_laplacian(scale_class: int) -> None:
    rms = 2 ** (scale_class / 2 - 4)
    draws = np.random.default_rng(0).laplace(scale=rms / np.sqrt(2), size=400_000)
    values = draws.astype(np.float32)

    def price(threshold: float, shift: float) -> tuple[float, float, float]:
        levels = quantise(values, np.float32(threshold))
        error = float(np.mean((values - dequantise(levels, np.float32(shift))) ** 2))
        counts = np.unique(levels, return_counts=True)[1]
        bits = float(np.sum(counts * np.log2(values.size / counts))) / values.size
        return error + SLOPE * bits, bits, error

    best, bits, error = price(THRESHOLD[scale_class], SHIFT[scale_class])
    assert bits == pytest.approx(BITS[scale_class], rel=0.01)
    assert error == pytest.approx(ERROR[scale_class], rel=0.01)
    for delta in (-0.08, 0.08):
        assert price(THRESHOLD[scale_class] + delta, SHIFT[scale_class] + delta)[0] > best
        assert price(THRESHOLD[scale_class], SHIFT[scale_class] + delta)[0] > best


def test_shifts_are_the_means_of_the_bins() -> None:
    # Within a bin of width 1, the mean of an exponential distribution of this scale.
    scale = 2 ** (np.arange(CLASSES) / 2 - 4.5)
    mean = scale - 1 / np.expm1(1 / scale)
    np.testing.assert_allclose(SHIFT, THRESHOLD + mean - 1, atol=6e-6)


def test_a_magnitude_costs_what_its_frequency_and_a_sign_do() -> None:
    levels = np.array([0] * 8 + [1, -1, 1, -1] + [2, -2] + [3, -3])
    # Of 16: a half, a quarter, an eighth and an eighth.
    found = rate_differences(np.tile(levels, 10_000), np.full(160_000, 5, np.uint8))[5]
    assert found[:3] == pytest.approx([(2 + 1) - 1, 1, 0], abs=1e-3)


@given(
    st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=50),
    st.lists(st.floats(0, 3), min_size=13, max_size=13),
    st.floats(-0.5, 0),
    st.floats(0.01, 0.15),
)
def test_levels_are_chosen_where_error_and_bits_cost_least(
    values: list[float], extra_bits: list[float], shift: float, price: float
) -> None:
    # The larger a magnitude the less it may save to be one smaller, or two smaller may be better.
    extra_bits = sorted(extra_bits, reverse=True)
    bits = np.append(0, np.cumsum(extra_bits))
    magnitudes = np.arange(len(bits))
    at = magnitudes + shift * (magnitudes > 0)

    def cost(value: float, level: int) -> float:
        return float((abs(value) - at[abs(level)]) ** 2 + price * bits[abs(level)])

    table = np.tile(np.append(extra_bits, [0] * 51).astype(np.float32), (CLASSES, 1))
    of = np.zeros(len(values), np.uint8)
    chosen = quantise_to_rate(np.array(values, np.float32), of, np.float32(shift), table, price)
    for value, level in zip(values, chosen.tolist(), strict=True):
        assert level == 0 or (level > 0) == (value > 0)
        within = [k for k in (0, int(abs(value)), int(abs(value)) + 1) if k < len(bits)]
        assert cost(value, level) <= min(cost(value, k) for k in within) + 1e-4


def test_magnitudes_too_large_to_be_counted_are_rounded_to_the_nearest() -> None:
    values = (300 * np.random.default_rng(4).normal(size=50_000)).astype(np.float32)
    of = np.full(values.size, CLASSES - 1, np.uint8)
    levels = quantise(values, np.float32(0.5))
    chosen = quantise_to_rate(values, of, np.float32(0), rate_differences(levels, of), SLOPE)
    large = np.abs(values) > 65
    assert np.abs(values - chosen)[large].max() <= 0.5


def test_the_design_approaches_uniform_quantisation() -> None:
    assert THRESHOLD[-1] == pytest.approx(0.5, abs=1e-3)
    assert SHIFT[-1] == pytest.approx(0, abs=1e-3)
    assert ERROR[24] == pytest.approx(1 / 12, rel=1e-3)
    assert len(THRESHOLD) == CLASSES
    assert np.all(np.diff(BITS) > 0)
