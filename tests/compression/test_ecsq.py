"""One-step quantisers: the design against theory, the low-rank part, targets, hostile payloads."""

from __future__ import annotations

from math import e, log2, pi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.base import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.ecsq import (
    BITS,
    CLASSES,
    ECSQ,
    ERROR,
    SHIFT,
    SLOPE,
    THRESHOLD,
    choose,
    dequantise,
    quantise,
    rises,
)
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ, _choose_rank, _Factors
from fedbw_sweep.errors import ConfigError, PayloadError

BOTH = [ECSQ, LowRankECSQ]


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))


def measure(method: ECSQ, update: FloatVector, layout: Layout) -> tuple[float, float]:
    """Bits a coordinate and NMSE of one round trip."""
    payload = method.encode(update, layout, np.random.default_rng(0))
    error = update.astype(np.float64) - method.decode(payload, layout)
    return 8 * len(payload) / update.size, float(
        (error**2).sum() / (update.astype(float) ** 2).sum()
    )


def low_rank(rows: int, cols: int, rank: int, noise: float) -> FloatVector:
    rng = np.random.default_rng(7)
    signal = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols)) / np.sqrt(rank)
    return (signal + noise * rng.normal(size=(rows, cols))).astype(np.float32).ravel()


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


def test_a_magnitude_costs_what_its_frequency_and_a_sign_do() -> None:
    levels = np.array([0] * 8 + [1, -1, 1, -1] + [2, -2] + [3, -3])
    # Of 16: a half, a quarter, an eighth and an eighth.
    found = rises(np.tile(levels, 10_000), np.full(160_000, 5, np.uint8))[5]
    assert found[:3] == pytest.approx([(2 + 1) - 1, 1, 0], abs=1e-3)


@given(
    st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=50),
    st.lists(st.floats(0, 3), min_size=13, max_size=13),
    st.floats(-0.5, 0),
    st.floats(0.01, 0.15),
)
def test_levels_are_chosen_where_error_and_bits_cost_least(
    values: list[float], dearer: list[float], shift: float, price: float
) -> None:
    # The larger a magnitude the less it may save to be one smaller, or two smaller may be better.
    dearer = sorted(dearer, reverse=True)
    bits = np.append(0, np.cumsum(dearer))
    magnitudes = np.arange(len(bits))
    at = magnitudes + shift * (magnitudes > 0)

    def cost(value: float, level: int) -> float:
        return float((abs(value) - at[abs(level)]) ** 2 + price * bits[abs(level)])

    table = np.tile(np.append(dearer, [0] * 51).astype(np.float32), (CLASSES, 1))
    of = np.zeros(len(values), np.uint8)
    chosen = choose(np.array(values, np.float32), of, np.float32(shift), table, price)
    for value, level in zip(values, chosen.tolist(), strict=True):
        assert level == 0 or (level > 0) == (value > 0)
        within = [k for k in (0, int(abs(value)), int(abs(value)) + 1) if k < len(bits)]
        assert cost(value, level) <= min(cost(value, k) for k in within) + 1e-4


def test_magnitudes_too_large_to_be_counted_are_rounded_to_the_nearest() -> None:
    values = (300 * np.random.default_rng(4).normal(size=50_000)).astype(np.float32)
    of = np.full(values.size, CLASSES - 1, np.uint8)
    levels = quantise(values, np.float32(0.5))
    chosen = choose(values, of, np.float32(0), rises(levels, of), SLOPE)
    large = np.abs(values) > 65
    assert np.abs(values - chosen)[large].max() <= 0.5


def test_the_design_approaches_uniform_quantisation() -> None:
    assert THRESHOLD[-1] == pytest.approx(0.5, abs=1e-3)
    assert SHIFT[-1] == pytest.approx(0, abs=1e-3)
    assert ERROR[24] == pytest.approx(1 / 12, rel=1e-3)
    assert len(THRESHOLD) == CLASSES
    assert np.all(np.diff(BITS) > 0)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("step", [0.02, 0.1, 0.3])
def test_white_noise_costs_what_theory_says(method: type[ECSQ], step: float) -> None:
    # At high rate a step s gives NMSE s**2 / 12 at h(X) - log2(s) bits, h(X) = log2(2 pi e) / 2.
    update = np.random.default_rng(1).normal(size=90_000).astype(np.float32)
    bits, nmse = measure(method(step), update, layout_of((300, 200), (30_000,)))
    assert nmse == pytest.approx(step**2 / 12, rel=0.02)
    assert bits == pytest.approx(log2(2 * pi * e) / 2 - log2(step), rel=0.006)


def test_quiet_arrays_get_few_bits() -> None:
    # Reverse water-filling: below the step nothing is sent, and the loud array costs as if alone.
    rng = np.random.default_rng(2)
    loud, quiet = rng.normal(size=20_000), 1e-3 * rng.normal(size=20_000)
    update = np.concatenate([loud, quiet]).astype(np.float32)
    method = ECSQ(0.2)
    both = len(method.encode(update, layout_of((20_000,), (20_000,)), rng))
    # The same step, for a root mean square that is sqrt(2) larger without the quiet half.
    alone = ECSQ(0.2 / np.sqrt(2)).encode(update[:20_000], layout_of((20_000,)), rng)
    assert both < len(alone) + 8


def test_rows_of_different_scale_are_coded_apart() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(256, 256)) * 2.0 ** rng.integers(-3, 4, (256, 1))
    shuffled = rng.permuted(rows.ravel())
    layout = layout_of((256, 256))
    sizes = [
        len(ECSQ(0.1).encode(x.astype(np.float32).ravel(), layout, rng)) for x in (rows, shuffled)
    ]
    # Knowing the scale of 7 equally likely ones saves a good deal of log2(7) = 2.8 bits.
    assert sizes[0] < sizes[1] - 0.4 * 256 * 256 / 8


@pytest.mark.parametrize("shape", [(256, 192), (192, 256), (4, 64, 192)])
def test_low_rank_matrices_cost_their_factors(shape: tuple[int, ...]) -> None:
    update = low_rank(256 * 192 // shape[-1], shape[-1], rank=3, noise=0)
    layout = layout_of(shape)
    bits, nmse = measure(LowRankECSQ(target_nmse=1e-3), update, layout)
    assert nmse <= 1e-3
    # 3 * (256 + 192) coefficients of some 5 + 2 bits, where each coordinate would take as much.
    assert bits * update.size < 3 * (256 + 192) * 8
    assert measure(ECSQ(target_nmse=1e-3), update, layout)[0] > 4.5


@pytest.mark.parametrize("nmse", [0.3, 0.03, 3e-4])
def test_the_low_rank_part_never_costs_more_than_it_saves(nmse: float) -> None:
    layout = layout_of((256, 192), (192,))
    for noise in (0.1, 1.0, 100.0):
        update = np.append(low_rank(256, 192, rank=3, noise=noise), np.ones(192, np.float32))
        plain = measure(ECSQ(target_nmse=nmse), update, layout)[0]
        assert measure(LowRankECSQ(target_nmse=nmse), update, layout)[0] < 1.02 * plain + 0.01


def test_the_rank_is_where_components_stop_paying() -> None:
    noise = np.full(40, 300.0)  # 200 x 200 at rms 2: singular values of noise alone are near 2 * 14
    assert _choose_rank(noise[:0], 4.0 * 40_000, (200, 200), False)[0] == 0
    strong = np.array([4000.0, 2000.0, 1000.0])
    weak = np.full(5, 20.0)
    energy = float((strong**2).sum() + 4 * 40_000)
    rank, coarseness = _choose_rank(np.append(strong, weak), energy, (200, 200), False)
    assert rank == 3
    assert 2 ** (coarseness / 2) == pytest.approx(2.8 * 2, rel=0.3)


def test_a_descent_finds_the_factors_of_an_exact_product() -> None:
    rng = np.random.default_rng(5)
    part = _Factors((60, 90), 0, np.array([16, 15, 14]))
    part.levels[:] = rng.integers(-9, 10, part.levels.shape)
    exact, matrix = part.levels.copy(), part.product()
    free = np.zeros((CLASSES, 64), np.float32)  # every level costs the same
    contexts = np.zeros(part.levels.shape, np.intp)
    part.levels[:60] += rng.integers(-2, 3, (60, 3))
    for _ in range(6):
        part.descend(0, matrix.T, contexts[:60], free, SLOPE)
    assert np.array_equal(part.levels, exact)


def test_a_descent_never_costs_more() -> None:
    matrix = 2 * low_rank(60, 90, rank=5, noise=0.7).reshape(60, 90)
    part = _Factors((60, 90), 0, np.array([14, 13, 12, 11, 10, 9, 8]))
    part.levels[:60] = np.random.default_rng(6).integers(-3, 4, (60, 7))
    part.fit(1, matrix)
    contexts = np.broadcast_to(np.arange(7), part.levels.shape)
    dearer = rises(part.levels.ravel(), contexts.ravel())

    def cost() -> float:
        bits = np.take_along_axis(
            np.cumsum(np.insert(dearer, 0, 0, axis=1), axis=1)[:7].T, np.abs(part.levels), axis=0
        )
        return float(np.square(matrix - part.product()).sum() + SLOPE * bits.sum())

    costs = [cost()]
    for _ in range(5):
        for side, whole, rows in ((0, matrix.T, slice(60)), (1, matrix, slice(60, None))):
            part.descend(side, whole, contexts[rows], dearer, SLOPE)
            costs.append(cost())
    assert np.all(np.diff(costs) < 1e-5 * costs[0])  # as float32 rounds
    assert costs[-1] < 0.5 * costs[0]


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("target", [0.5, 0.1, 3e-3, 1e-5])
def test_a_target_error_is_met_closely(method: type[ECSQ], target: float) -> None:
    update, layout = low_rank(200, 300, rank=4, noise=0.3), layout_of((200, 300))
    nmse = measure(method(target_nmse=target), update, layout)[1]
    assert 0.98 * target < nmse <= target


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("target", [0.0095, 0.00015, 0.3])
def test_nothing_is_tried_twice(
    method: type[ECSQ], target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[object, object]] = []
    put = method._put

    def spy(self: ECSQ, encoder: object, values: object, scale: object, *rest: object) -> None:
        tried.append((scale, rest[-1]))
        put(self, encoder, values, scale, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "_put", spy)
    for size in (60, 100, 200):  # the smaller, the farther apart the errors of neighbouring steps
        update, layout = low_rank(size, 150, rank=4, noise=0.3), layout_of((size, 150))
        tried.clear()
        method(target_nmse=target).encode(update, layout, np.random.default_rng(0))
        assert len(tried) == len(set(tried)) > 1


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("target", [0.2, 1.5, 6.0])
def test_a_target_size_is_met_closely(method: type[ECSQ], target: float) -> None:
    update, layout = low_rank(200, 300, rank=4, noise=0.3), layout_of((200, 300))
    bits = measure(method(target_bits=target), update, layout)[0]
    assert 0.94 * target < bits <= target  # sizes jump where tables come and go


@pytest.mark.parametrize("method", BOTH)
def test_a_size_too_small_for_anything_sends_zeros(method: type[ECSQ]) -> None:
    update, layout = np.ones(20, np.float32), layout_of((4, 5))
    payload = method(target_bits=0.1).encode(update, layout, np.random.default_rng(0))
    assert len(payload) == 4
    assert not method(target_bits=0.1).decode(payload, layout).any()


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("power", [-140, -60, 60, 100])
def test_any_scale_costs_the_same(method: type[ECSQ], power: int) -> None:
    # Powers of two shift the step's code alone; 2**-140 is subnormal.
    update = np.rint(8 * low_rank(30, 20, rank=2, noise=1)).astype(np.float32)
    layout, rng = layout_of((30, 20)), np.random.default_rng
    scaled = np.ldexp(update, power)
    one, other = (method(0.1).encode(x, layout, rng(0)) for x in (update, scaled))
    assert len(one) == pytest.approx(len(other), abs=2)
    decoded = method(0.1).decode(other, layout)
    assert np.abs(np.ldexp(method(0.1).decode(one, layout), power) - decoded).max() <= (
        np.abs(scaled).max() * 1e-5 + 2e-45
    )


@pytest.mark.parametrize("method", BOTH)
def test_the_largest_floats_stay_finite(method: type[ECSQ]) -> None:
    update = np.full(600, np.finfo(np.float32).max, np.float32)
    update[::3] *= -1
    assert measure(method(0.9), update, layout_of((30, 20)))[1] < 0.1


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(
    "shapes", [((),), ((3,),), ((1, 1),), ((0, 4), (2, 2), ()), ((2, 0), (1, 7))]
)
def test_small_and_empty_shapes(method: type[ECSQ], shapes: tuple[tuple[int, ...], ...]) -> None:
    layout = layout_of(*shapes)
    update = np.arange(1, layout.size + 1, dtype=np.float32)
    assert measure(method(0.01), update, layout)[1] < 1e-4


@given(st.sampled_from(BOTH), st.binary(max_size=60), st.lists(st.integers(0, 2**16), max_size=4))
def test_hostile_payloads_are_refused_or_decode(
    method: type[ECSQ], noise: bytes, flips: list[int]
) -> None:
    layout = layout_of((12, 9), (5,), (3, 2, 4))
    compressor = method(0.5)
    update = np.append(low_rank(12, 9, 2, 0.1), np.ones(29, np.float32))
    payload = bytearray(compressor.encode(update, layout, np.random.default_rng(0)))
    hostile = bytes(payload[:4]) + noise
    for flip in flips:
        payload[4 + flip // 8 % (len(payload) - 4)] ^= 1 << flip % 8
    for attempt in (
        bytes(payload),
        hostile,
        bytes(payload) + noise,
        bytes(payload[: 4 + len(noise)]),
    ):
        try:
            decoded = compressor.decode(attempt, layout)
        except PayloadError:
            continue
        assert decoded.shape == (layout.size,)
        assert np.isfinite(decoded).all()


def test_bad_parameters_are_refused() -> None:
    for method in BOTH:
        for key, value in (
            ("step", 0), ("step", True), ("step", float("nan")), ("step", None), ("step", 1e9),
            ("target_bits", 0), ("target_bits", "1"), ("target_nmse", 2), ("target_nmse", -1),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=f"{key}="):
                method(**{key: value})
        with pytest.raises(ConfigError, match=r"target_nmse=0\.1: null when"):
            method(target_bits=1.0, target_nmse=0.1)
    for value in (0, 1.5, True, "8"):
        with pytest.raises(ConfigError, match="max_rank="):
            LowRankECSQ(max_rank=value)  # type: ignore[arg-type]


def test_rescaled_arrays_are_as_far_along_as_what_they_stand_for() -> None:
    layout = layout_of((40, 50), (300,), (60, 20), (100,))
    update = np.random.default_rng(3).standard_normal(layout.size).astype(np.float32)
    for (_, array), scale in zip(layout.split(update), (1.0, 3.0, 0.6, 1e-3), strict=True):
        array *= np.float32(scale)
    plain, rescaled = (
        compressor.decode(compressor.encode(update, layout, np.random.default_rng(0)), layout)
        for compressor in (ECSQ(step=1.5), ECSQ(step=1.5, norm_correction=True))
    )

    def along(decoded: FloatVector) -> list[float]:
        pairs = zip(layout.split(update), layout.split(decoded), strict=True)
        return [
            float(np.vdot(x.astype(float), y) / np.vdot(x.astype(float), x))
            for (_, x), (_, y) in pairs
        ]

    before, after = along(plain), along(rescaled)
    assert min(before[:3]) < 0.8
    for old, new in zip(before[:3], after[:3], strict=True):
        if old > 0.5:  # gains are sixteenths of an octave
            assert abs(np.log2(new)) <= 1 / 32 + 1e-6
        else:  # and at most twofold
            assert new == pytest.approx(2 * old, rel=1e-5)
    assert before[3] == after[3] == 0  # nothing of it is sent
    for (_, x), (_, y) in zip(layout.split(plain), layout.split(rescaled), strict=True):
        nonzero = x.ravel() != 0
        ratios = y.ravel()[nonzero] / x.ravel()[nonzero]
        np.testing.assert_allclose(ratios, ratios[:1].mean() if ratios.size else 1, rtol=1e-5)


def test_a_rescaled_target_is_met_after_rescaling() -> None:
    layout = layout_of((80, 50), (50,))
    update = np.random.default_rng(3).standard_normal(layout.size).astype(np.float32)
    compressor = ECSQ(target_nmse=0.3, norm_correction=True)
    decoded = compressor.decode(compressor.encode(update, layout, np.random.default_rng(0)), layout)
    nmse = np.square(update - decoded).sum() / np.square(update).sum()
    assert 0.27 < nmse <= 0.3
