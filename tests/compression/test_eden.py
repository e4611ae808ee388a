"""EDEN: the transform, the quantiser against published levels, the error against theory."""

from __future__ import annotations

from itertools import pairwise
from math import pi
from statistics import NormalDist

import numpy as np
import pytest

from fedbw_sweep.compression.eden import Eden, hadamard
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lloyd_max import LEVELS
from fedbw_sweep.errors import ConfigError, PayloadError

LLOYD_MAX = {1: 1 - 2 / pi, 2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.1e-5}
"""Least mean squared error of a quantiser of a unit Gaussian (Max 1960)."""


def layout_of(size: int) -> Layout:
    return Layout((TensorSpec("w", (size,)),))


def estimate(bits: float, values: FloatVector, seed: int) -> FloatVector:
    layout = layout_of(values.size)
    return Eden(bits).decode(Eden(bits).encode(values, layout, np.random.default_rng(seed)), layout)


def heavy_tailed(size: int) -> FloatVector:
    """Return values that are far from Gaussian before the rotation."""
    rng = np.random.default_rng(2)
    return (rng.standard_normal(size) * np.exp(rng.standard_normal(size))).astype(np.float32)


def test_hadamard_is_the_kronecker_power() -> None:
    matrix = np.array([[1]])
    for _ in range(4):
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    values = np.random.default_rng(0).integers(-9, 9, (16, 3)).astype(np.float32)
    np.testing.assert_array_equal(hadamard(values.copy()), matrix @ values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_level_is_the_mean_of_what_is_nearest_to_it(bits: int) -> None:
    # Lloyd's condition, which has one solution for a Gaussian.
    gauss, levels = NormalDist(), [*(-x for x in reversed(LEVELS[bits])), *LEVELS[bits]]
    assert len(levels) == 1 << bits
    edges = [(a + b) / 2 for a, b in pairwise(levels)]
    below = [0.0, *map(gauss.cdf, edges), 1.0]
    density = [0.0, *map(gauss.pdf, edges), 0.0]
    for i, level in enumerate(levels):
        mean = (density[i] - density[i + 1]) / (below[i + 1] - below[i])
        assert level == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("bits", "size", "expected"),
    [
        (1, 4096, 4 + 4 + 4 + 512),
        (2, 8192, 4 + 4 + 8 + 2048),
        (3, 4096, 4 + 4 + 4 + 1536),
        (0.5, 4096, 4 + 4 + 4 + 256),
        (0.1, 4096, 4 + 4 + 4 + 52),  # 410 of 4096 rows
        (1, 300, 4 + 4 + 8 + 64),  # two columns of 256 rows
        (1, 0, 8),
    ],
)
def test_size(bits: float, size: int, expected: int) -> None:
    payload = Eden(bits).encode(heavy_tailed(size), layout_of(size), np.random.default_rng(0))
    assert len(payload) == expected == Eden(bits).expected_bytes(layout_of(size))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_error_is_that_of_the_best_quantiser(bits: int) -> None:
    values = heavy_tailed(1 << 16)
    error = np.square(estimate(bits, values, 0) - values).sum() / np.square(values).sum()
    # The scale that removes the bias turns an error D into D / (1 - D).
    assert error == pytest.approx(LLOYD_MAX[bits] / (1 - LLOYD_MAX[bits]), rel=0.03)


def few_coordinates(size: int) -> FloatVector:
    values = np.zeros(size, np.float32)
    values[:3] = [1, 0.5, -0.1]
    return values


@pytest.mark.slow
@pytest.mark.parametrize("values", [heavy_tailed(300), few_coordinates(256)])
@pytest.mark.parametrize(("bits", "draws"), [(0.25, 300), (1, 300), (2, 200), (4, 100)])
def test_unbiased(bits: float, draws: int, values: FloatVector) -> None:
    decoded = np.stack([estimate(bits, values, seed) for seed in range(draws)]).astype(float)
    expected = decoded.var(axis=0, ddof=1).sum() / draws
    assert np.square(decoded.mean(axis=0) - values).sum() < 1.5 * expected


def test_below_one_bit_the_error_grows_as_the_bits_fall() -> None:
    values = heavy_tailed(1 << 16)
    for bits in (0.5, 0.25, 0.1):
        error = np.square(estimate(bits, values, 0) - values).sum() / np.square(values).sum()
        # A part p of the rows, rescaled: pi / (2 p) - 1.
        assert error == pytest.approx(pi / 2 / bits - 1, rel=0.03)


def test_draws_depend_on_the_generator_alone() -> None:
    values = heavy_tailed(500)
    assert np.array_equal(estimate(1, values, 1), estimate(1, values, 1))
    assert not np.array_equal(estimate(1, values, 1), estimate(1, values, 2))


def test_scale_must_be_finite() -> None:
    payload = Eden().encode(heavy_tailed(64), layout_of(64), np.random.default_rng(0))
    for bad in ("0000c07f", "0000807f"):
        with pytest.raises(PayloadError, match="scale"):
            Eden().decode(payload[:8] + bytes.fromhex(bad) + payload[12:], layout_of(64))


@pytest.mark.parametrize("bits", [0, -1, 1.5, 9, True, "1", float("nan")])
def test_bad_parameter(bits: float) -> None:
    with pytest.raises(ConfigError, match="bits"):
        Eden(bits)
