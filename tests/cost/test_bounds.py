from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.cost.bounds import (
    LLOYD_MAX_NMSE,
    gaussian_rate,
    log2_choose,
    reverse_water_filling,
    spectral_rate,
    unbiased_gaussian_rate,
)


@pytest.mark.parametrize(("nmse", "bits"), [(1, 0), (0.25, 1), (2**-16, 8), (2, 0), (0, math.inf)])
def test_gaussian_rate_by_hand(nmse: float, bits: float) -> None:
    assert gaussian_rate(nmse) == bits


def test_unbiasedness_costs_rate() -> None:
    assert unbiased_gaussian_rate(1 / 3) == pytest.approx(1)  # 4^-1 / (1 - 4^-1)
    assert unbiased_gaussian_rate(1 / 15) == pytest.approx(2)
    assert unbiased_gaussian_rate(0.1) > gaussian_rate(0.1)


@given(st.floats(1e-6, 0.999))
def test_one_variance_is_the_gaussian_rate(nmse: float) -> None:
    sizes = np.array([10, 1000, 7])
    assert reverse_water_filling(3 * sizes, sizes, nmse) == pytest.approx(gaussian_rate(nmse))


def test_reverse_water_filling_by_hand() -> None:
    # Variances 4 and 1, one coordinate each; distortion 2 in all is level 1: log2(4 / 1) / 2 = 1
    # bit for the first, none for the second.
    assert reverse_water_filling([4, 1], [1, 1], 2 / 5) == pytest.approx(0.5)
    # Below the smaller variance both pay: level 1/2 gives 1.5 and 0.5 bits.
    assert reverse_water_filling([4, 1], [1, 1], 1 / 5) == pytest.approx(1.0)
    assert reverse_water_filling([4, 0], [1, 3], 1 / 4) == pytest.approx(1 / 4)
    assert reverse_water_filling([0, 0], [1, 3], 0.5) == 0


@pytest.mark.slow
def test_lloyd_max_agrees_with_its_own_iteration() -> None:
    normal = NormalDist()
    cdf, pdf = np.vectorize(normal.cdf), np.vectorize(normal.pdf)
    for bits, nmse in LLOYD_MAX_NMSE.items():
        levels = np.vectorize(normal.inv_cdf)((np.arange(2**bits) + 0.5) / 2**bits)
        for _ in range(1500):
            edges = np.concatenate([[-9.0], (levels[1:] + levels[:-1]) / 2, [9.0]])
            mass = np.diff(cdf(edges))
            levels = -np.diff(pdf(edges)) / mass
        assert 1 - mass @ levels**2 == pytest.approx(nmse, rel=2e-3)


@given(st.integers(1, 60), st.data())
def test_log2_choose_is_the_binomial(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    assert log2_choose(size, count) == pytest.approx(math.log2(math.comb(size, count)), abs=1e-9)


def test_the_spectral_rate_by_hand() -> None:
    # One component of energy 4 in a 2 x 2 matrix: two coordinates of variance 2 on either side. At
    # level 1/32 each takes log2(64) / 2 = 3 bits, and four coordinates err by 4/32 of 4.
    assert spectral_rate([((2, 2), [2.0])], 1 / 32) == pytest.approx(4 * 3 / 4)
    # A second one of energy 1, with one coordinate on either side, takes log2(32) / 2 bits each.
    two = spectral_rate([((2, 2), [2.0, 1.0])], (4 / 32 + 2 / 32) / 5)
    assert two == pytest.approx((4 * 3 + 2 * 2.5) / 4)
    # Far smaller, it is left out.
    error = (4 / 32 + 1e-4) / (4 + 1e-4)
    assert spectral_rate([((2, 2), [2.0, 0.01])], error) == pytest.approx(4 * 3 / 4)
    assert spectral_rate([((2, 2), [0.0])], 0.5) == 0
    assert spectral_rate([((2, 2), [1.0])], 1) == 0
    assert spectral_rate([((2, 2), [1.0])], 0) == math.inf


def test_a_matrix_of_independent_coordinates_needs_about_the_gaussian_rate() -> None:
    matrix = np.random.default_rng(0).standard_normal((100, 300))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert spectral_rate([(matrix.shape, values)], 0.001) == pytest.approx(
        gaussian_rate(0.001), rel=0.08
    )
