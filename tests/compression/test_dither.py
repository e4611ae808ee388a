"""Subtractive dither: its noise, its error, what it costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.dither import Noise, fold, unfold
from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.errors import ConfigError

from .test_ecsq import BOTH, layout_of, low_rank, measure


def test_the_noise_is_uniform_and_in_one_order() -> None:
    noise = Noise(3).take(100_000)
    assert np.abs(noise).max() < 0.5
    assert (noise * 2**24 % 2 == 1).all()
    counts = np.histogram(noise, 50, (-0.5, 0.5))[0]
    assert np.square(counts - 2000).sum() / 2000 < 100  # chi-squared with 49 degrees of freedom
    parts = Noise(3)
    np.testing.assert_array_equal([*parts.take(7), *parts.take(40_000)], noise[:40_007])


@given(st.lists(st.integers(-(2**29), 2**29), min_size=1), st.integers(0, 99))
def test_levels_are_unfolded_to_the_values_they_stand_for(levels: list[int], seed: int) -> None:
    whole, noise = np.array(levels, np.int32), Noise(seed).take(len(levels))
    folded = fold(whole, noise)
    assert folded.min() >= 0
    np.testing.assert_array_equal(unfold(folded, noise), whole.astype(np.float32) - noise)


def test_what_the_noise_points_to_comes_first() -> None:
    noise = np.float32([0.4, -0.4])
    order = [[fold(np.full(2, level, np.int32), noise)[side] for level in (0, 1, -1, 2, -2)]
             for side in (0, 1)]  # fmt: skip
    assert order == [[0, 1, 2, 3, 4], [0, 2, 1, 4, 3]]


def heavy_tailed(size: int) -> FloatVector:
    rng = np.random.default_rng(2)
    return (rng.standard_normal(size) * np.exp(2 * rng.standard_normal(size))).astype(np.float32)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("step", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["heavy-tailed", "low rank", "constant"])
def test_the_error_is_that_of_the_step_whatever_the_update(
    method: type[ECSQ], step: float, kind: str
) -> None:
    update = {
        "heavy-tailed": heavy_tailed(60_000),
        "low rank": low_rank(300, 200, rank=3, noise=0.1),
        "constant": np.full(60_000, -0.3, np.float32),
    }[kind]
    nmse = measure(method(step, dither=True), update, layout_of((300, 200)))[1]
    assert nmse == pytest.approx(step**2 / 12, rel=0.02)


@pytest.mark.parametrize("method", BOTH)
def test_the_mean_of_many_is_the_update(method: type[ECSQ]) -> None:
    layout, count = layout_of((12, 30), (5,)), 400
    update = np.append(low_rank(12, 30, rank=2, noise=0.2), np.float32([1e-3, 0.1, -2, 9, 0]))
    codec = method(2.0, dither=True)
    decoded = [
        codec.decode(codec.encode(update, layout, np.random.default_rng(seed)), layout)
        for seed in range(count)
    ]
    rms = np.sqrt(np.square(update).mean())
    deviation = 2.0 * rms / np.sqrt(12 * count)
    assert (np.abs(np.mean(decoded, axis=0) - update) < 5 * deviation).all()
    plain = method(2.0)
    biased = plain.decode(plain.encode(update, layout, np.random.default_rng(0)), layout)
    assert np.abs(biased - update).max() > 5 * deviation


def information(step: float) -> float:
    """Return the bits between a unit Gaussian and itself plus noise uniform over a step."""
    grid = np.linspace(-12, 12, 48_001)
    width = grid[1] - grid[0]
    gauss = np.exp(-np.square(grid) / 2) / np.sqrt(2 * np.pi)
    below = np.cumsum(gauss) * width
    density = np.interp(grid + step / 2, grid, below) - np.interp(grid - step / 2, grid, below)
    density = np.maximum(density / step, 1e-300)
    return float(-(density * np.log2(density)).sum() * width - np.log2(step))


@pytest.mark.parametrize("step", [0.25, 1.0, 2.0, 4.0])
def test_it_costs_the_information_that_arrives(step: float) -> None:
    # The entropy of a dithered level, given the noise, is that (Zamir and Feder 1992).
    update = np.random.default_rng(1).normal(size=400_000).astype(np.float32)
    bits, _ = measure(ECSQ(step, dither=True), update, layout_of((400_000,)))
    assert bits == pytest.approx(information(step), rel=0.015)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("target", [{"target_nmse": 0.02}, {"target_bits": 2.0}])
def test_targets_are_met_with_dither(method: type[ECSQ], target: dict[str, float]) -> None:
    update, layout = low_rank(200, 300, rank=4, noise=0.3), layout_of((200, 300))
    bits, nmse = measure(method(**target, dither=True), update, layout)
    found, wanted = (nmse, 0.02) if "target_nmse" in target else (bits, 2.0)
    assert 0.97 * wanted < found <= wanted


@pytest.mark.slow
def test_the_low_rank_part_saves_bits_with_dither() -> None:
    update, layout = low_rank(256, 192, rank=3, noise=0.05), layout_of((256, 192))
    plain = measure(ECSQ(0.5, dither=True), update, layout)[0]
    assert measure(LowRankECSQ(0.5, dither=True), update, layout)[0] < 0.6 * plain


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match="dither=True: false when norm_correction is true"):
        ECSQ(dither=True, norm_correction=True)
    with pytest.raises(ConfigError, match="dither=1: true or false"):
        ECSQ(dither=1)  # type: ignore[arg-type]
    assert ECSQ(3.5, dither=True).expands
    assert not ECSQ(3.4, dither=True).expands
    assert not ECSQ(3.5).expands
