"""The low-rank part: its rank, its bits, the descent of its factors."""

from __future__ import annotations

import numpy as np
import pytest

from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.exact import Multiplier
from fedbw_sweep.compression.factors import Factors, choose_rank
from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.compression.quantiser import (
    CLASSES,
    SHIFT,
    SLOPE,
    rate_differences,
)

from .test_ecsq import layout_of, low_rank, measure


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 192), (192, 256), (4, 64, 192)])
def test_low_rank_matrices_cost_their_factors(shape: tuple[int, ...]) -> None:
    update = low_rank(256 * 192 // shape[-1], shape[-1], rank=3, noise=0)
    layout = layout_of(shape)
    bits, nmse = measure(LowRankECSQ(target_nmse=1e-3), update, layout)
    assert nmse <= 1e-3
    # 3 * (256 + 192) coefficients of some 5 + 2 bits, where each coordinate would take as much.
    assert bits * update.size < 3 * (256 + 192) * 8
    assert measure(ECSQ(target_nmse=1e-3), update, layout)[0] > 4.5


@pytest.mark.slow
@pytest.mark.parametrize("nmse", [0.3, 0.03, 3e-4])
def test_the_low_rank_part_never_costs_more_than_it_saves(nmse: float) -> None:
    layout = layout_of((256, 192), (192,))
    for noise in (0.1, 1.0, 100.0):
        update = np.append(low_rank(256, 192, rank=3, noise=noise), np.ones(192, np.float32))
        plain = measure(ECSQ(target_nmse=nmse), update, layout)[0]
        assert measure(LowRankECSQ(target_nmse=nmse), update, layout)[0] < 1.02 * plain + 0.01


def test_the_rank_is_where_components_stop_paying() -> None:
    noise = np.full(40, 300.0)  # 200 x 200 at rms 2: singular values of noise alone are near 2 * 14
    assert choose_rank(noise[:0], 4.0 * 40_000, (200, 200), False)[0] == 0
    strong = np.array([4000.0, 2000.0, 1000.0])
    weak = np.full(5, 20.0)
    energy = float((strong**2).sum() + 4 * 40_000)
    rank, coarseness = choose_rank(np.append(strong, weak), energy, (200, 200), False)
    assert rank == 3
    assert 2 ** (coarseness / 2) == pytest.approx(2.8 * 2, rel=0.3)


def product(part: Factors) -> FloatVector:
    return np.concatenate([block for _, block in part.product(across=False)])


def test_the_product_and_its_transpose_are_the_same_to_the_bit() -> None:
    part = Factors((70, 2000), 3, np.array([9, 6, 2]))
    part.levels[:] = np.random.default_rng(8).integers(-40, 41, part.levels.shape)
    across = [block for _, block in part.product(across=True)]
    assert len(across) > 1
    np.testing.assert_array_equal(np.concatenate(across).T, product(part))
    # 2**(coarseness/2) * sum of left * right / 2**(gain/2), with the shifts of their classes.
    left, right = (
        rows + np.sign(rows) * SHIFT[classes].astype(float)
        for rows, classes in zip(part.parts, part.classes, strict=True)
    )
    expected = 2**1.5 * (left / 2 ** (part.gain / 2)) @ right.T
    np.testing.assert_allclose(product(part), expected, atol=1e-6 * np.abs(expected).max())


def test_a_descent_finds_the_factors_of_an_exact_product() -> None:
    rng = np.random.default_rng(5)
    part = Factors((60, 90), 0, np.array([16, 15, 14]))
    part.levels[:] = rng.integers(-9, 10, part.levels.shape)
    exact, matrix = part.levels.copy(), Multiplier(product(part))
    free = np.zeros((CLASSES, 64), np.float32)  # every level costs the same
    contexts = np.zeros(part.levels.shape, np.intp)
    part.levels[:60] += rng.integers(-2, 3, (60, 3))
    for _ in range(6):
        part.descend(0, matrix, 1.0, contexts[:60], free, SLOPE)
    assert np.array_equal(part.levels, exact)


def test_a_descent_never_costs_more() -> None:
    matrix = 2 * low_rank(60, 90, rank=5, noise=0.7).reshape(60, 90)
    part = Factors((60, 90), 0, np.array([14, 13, 12, 11, 10, 9, 8]))
    part.levels[:60] = np.random.default_rng(6).integers(-3, 4, (60, 7))
    rounded = Multiplier(matrix)
    part.fit(1, rounded, 1.0)
    contexts = np.broadcast_to(np.arange(7), part.levels.shape)
    extra_bits = rate_differences(part.levels.ravel(), contexts.ravel())

    def cost() -> float:
        bits = np.take_along_axis(
            np.cumsum(np.insert(extra_bits, 0, 0, axis=1), axis=1)[:7].T,
            np.abs(part.levels),
            axis=0,
        )
        return float(np.square(matrix - product(part)).sum() + SLOPE * bits.sum())

    costs = [cost()]
    for _ in range(5):
        for side, rows in ((0, slice(60)), (1, slice(60, None))):
            part.descend(side, rounded, 1.0, contexts[rows], extra_bits, SLOPE)
            costs.append(cost())
    assert np.all(np.diff(costs) < 1e-5 * costs[0])  # as float32 rounds
    assert costs[-1] < 0.5 * costs[0]
