"""Sparse methods: which coordinates are kept, what they become, what they cost."""

from __future__ import annotations

from math import comb, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.sparse import (
    RandK,
    Ternary,
    Threshold,
    TopK,
    kept_count,
    largest,
    random_subset,
    two_magnitudes,
)
from fedbw_sweep.errors import ConfigError, PayloadError

LAYOUT = Layout((TensorSpec("weight", (2, 4)), TensorSpec("bias", (2,))))
UPDATE = np.array([0.1, -8, 0, 2, -0.3, 0.2, 4, -0.1, 0, 0.5], np.float32)


def roundtrip(method: TopK | Threshold | RandK, update: FloatVector = UPDATE) -> list[float]:
    layout = LAYOUT if update is UPDATE else Layout((TensorSpec("t", update.shape),))
    payload = method.encode(update, layout, np.random.default_rng(0))
    return [round(float(x), 6) for x in method.decode(payload, layout)]


@pytest.mark.parametrize(
    ("density", "size", "kept"),
    [(0.29, 100, 29), (0.01, 50, 1), (1e-9, 10, 1), (1, 10, 10), (0.7, 10, 7), (0.5, 0, 0)],
)
def test_the_number_kept_is_exact(density: float, size: int, kept: int) -> None:
    assert kept_count(density, size) == kept


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=300), st.data())
def test_largest_takes_the_first_among_equals(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    magnitudes = np.abs(np.array(values, np.float32))
    expected = np.sort(np.argsort(-magnitudes, kind="stable")[:count])
    assert np.array_equal(largest(magnitudes, count), expected)


@pytest.mark.parametrize("heavy", [False, True])
def test_largest_of_many_equals_a_full_sort(heavy: bool) -> None:
    # Heavy: all large values sit where the sample does not look, and its threshold misses them.
    magnitudes = np.random.default_rng(0).random(300_000, np.float32)
    if heavy:
        magnitudes[::5] += 1
    expected = np.sort(np.argsort(-magnitudes, kind="stable")[:3000])
    assert np.array_equal(largest(magnitudes, 3000), expected)


def test_topk_keeps_the_largest_magnitudes() -> None:
    assert roundtrip(TopK(0.3)) == [0, -8, 0, 2, 0, 0, 4, 0, 0, 0]


def test_topk_values_are_rounded_as_named() -> None:
    assert roundtrip(TopK(0.3, "fp16")) == [0, -8, 0, 2, 0, 0, 4, 0, 0, 0]
    # Steps of 8/127: 2 is 31.75 steps and becomes 32, 4 is 63.5 and becomes 64 (half to even).
    step = 8 / 127
    assert roundtrip(TopK(0.3, "int8")) == [
        0, -8, 0, round(32 * step, 6), 0, 0, round(64 * step, 6), 0, 0, 0
    ]  # fmt: skip


def test_ternary_sends_the_mean_magnitude_of_the_kept() -> None:
    # (8 + 2 + 4) / 3 over the three kept, not over all ten.
    mean = round(14 / 3, 6)
    assert roundtrip(Ternary(0.3)) == [0, -mean, 0, mean, 0, 0, mean, 0, 0, 0]


def test_two_bits_send_one_of_two_mean_magnitudes() -> None:
    # The mean parts 8 from 2 and 4, whose mean is 3; and 4 and 8 from 0.5 and 2.
    assert roundtrip(TopK(0.3, "2bit")) == [0, -8, 0, 3, 0, 0, 3, 0, 0, 0]
    assert roundtrip(Threshold(0.5, "2bit")) == [0, -6, 0, 1.25, 0, 0, 6, 0, 0, 1.25]
    equal = two_magnitudes(np.full(5, 0.3, np.float32))
    assert equal.tolist() == [np.float32(0.3)] * 2


@given(st.lists(st.floats(0.0, 2.0**99, width=32), min_size=1, max_size=40))
def test_two_magnitudes_are_no_worse_than_one(values: list[float]) -> None:
    magnitudes = np.array(values, np.float32)
    two = two_magnitudes(magnitudes).astype(np.float64)
    nearest = np.abs(magnitudes[:, None] - two).min(axis=1)
    one = magnitudes.mean(dtype=np.float64)
    assert np.square(nearest).sum() <= np.square(magnitudes - one).sum() * (1 + 1e-6) + 1e-30


def test_threshold_keeps_what_reaches_it() -> None:
    assert roundtrip(Threshold(0.5)) == [0, -8, 0, 2, 0, 0, 4, 0, 0, 0.5]


def test_zeros_are_never_sent() -> None:
    assert len(TopK(1.0).encode(np.zeros(10, np.float32), LAYOUT, np.random.default_rng(0))) < 12
    assert roundtrip(TopK(1.0)) == [round(float(x), 6) for x in UPDATE]


def test_a_threshold_saves_bytes() -> None:
    layout = Layout((TensorSpec("t", (100, 1000)),))
    update = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    for threshold in (1, 2, 3):
        size = len(Threshold(threshold).encode(update, layout, np.random.default_rng(0)))
        kept = int(np.count_nonzero(np.abs(update) >= threshold))
        # Four bytes a value, and positions that are as good as random.
        assert size == pytest.approx(4 * kept + log2(comb(100_000, kept)) / 8, rel=0.02, abs=70)


def test_sign_values_cost_one_bit() -> None:
    layout = Layout((TensorSpec("t", (200, 1000)),))
    update = np.random.default_rng(2).normal(size=200_000).astype(np.float32)
    sizes = {
        v: len(TopK(0.1, v).encode(update, layout, np.random.default_rng(0)))
        for v in ("fp32", "fp16", "2bit", "sign")
    }
    assert sizes["fp32"] - sizes["sign"] == pytest.approx(20_000 * 31 / 8 - 4, abs=5)
    assert sizes["fp32"] - sizes["fp16"] == pytest.approx(20_000 * 2 - 4, abs=5)
    # The second bit says which magnitude: fewer are large, so that it takes less than one.
    assert 0.8 * 20_000 / 8 < sizes["2bit"] - sizes["sign"] < 20_000 / 8


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8", "2bit", "sign"])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1.0, 1e30, 3e38])
def test_any_scale_is_kept(values: str, scale: float) -> None:
    update = (np.array([1, -1, 1, 1]) * scale).astype(np.float32)
    layout = Layout((TensorSpec("t", (4,)),))
    for method in (TopK(1.0, values), *([] if values == "2bit" else [RandK(1.0, values)])):
        payload = method.encode(update, layout, np.random.default_rng(0))
        assert np.allclose(method.decode(payload, layout), update, rtol=1e-3, atol=0)


def test_randk_costs_four_bytes_besides_frame_and_values() -> None:
    layout = Layout((TensorSpec("t", (100, 100)),))
    update = np.random.default_rng(3).normal(size=10_000).astype(np.float32)
    payload = RandK(0.1).encode(update, layout, np.random.default_rng(0))
    assert len(payload) == pytest.approx(4 + 4 + 4000, abs=4)


@pytest.mark.slow
def test_randk_is_unbiased_and_plain_without_the_gain() -> None:
    draws = np.array(
        [RandK(0.3).decode(RandK(0.3).encode(UPDATE, LAYOUT, rng), LAYOUT)
         for rng in map(np.random.default_rng, range(4000))]
    )  # fmt: skip
    error = UPDATE * np.sqrt(7 / 3 / 4000)  # each is x / .3 with probability .3: variance 7/3 x^2
    assert np.all(np.abs(draws.mean(0) - UPDATE) <= 5 * np.abs(error) + 1e-6)
    plain = roundtrip(RandK(0.3, unbiased=False))
    assert sum(a == b != 0 for a, b in zip(plain, UPDATE.round(6).tolist(), strict=True)) <= 3
    assert all(abs(a - b) < 1e-6 for a, b in zip(plain, UPDATE, strict=True) if a)


@pytest.mark.slow
def test_random_subsets_are_uniform_and_the_same_everywhere() -> None:
    # Golden: computed from the published PCG-64 stream; any change breaks payloads in flight.
    counts = np.zeros(10)
    for seed in range(3000):
        subset = random_subset(seed, 10, 4)
        assert np.count_nonzero(subset) == 4
        counts += subset
    assert np.all(np.abs(counts - 1200) < 5 * np.sqrt(3000 * 0.4 * 0.6))
    for count in (0, 1, 9, 10):
        assert np.count_nonzero(random_subset(7, 10, count)) == count


def test_more_positions_than_the_density_allows_are_refused() -> None:
    # Same frame, a body with every coordinate.
    sparse, full = TopK(0.3), TopK(1.0)
    rng = np.random.default_rng(0)
    body = full.encode(UPDATE, LAYOUT, rng)[4:]
    with pytest.raises(PayloadError, match="8 coordinates"):
        sparse.decode(sparse.encode(UPDATE, LAYOUT, rng)[:4] + body, LAYOUT)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 2, True, "0.1", None, float("nan")])
def test_bad_densities_are_refused(density: object) -> None:
    for method in (TopK, RandK, Ternary):
        with pytest.raises(ConfigError, match=r"density=.*in \(0, 1\]"):
            method(density=density)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0, -1, True, "x", None, float("nan"), float("inf")])
def test_bad_thresholds_are_refused(threshold: object) -> None:
    with pytest.raises(ConfigError, match="threshold="):
        Threshold(threshold)  # type: ignore[arg-type]


def test_bad_values_are_refused() -> None:
    for method in (TopK, RandK, Threshold):
        with pytest.raises(
            ConfigError, match=r"values=int4: one of fp32, fp16, int8, (2bit, )?sign"
        ):
            method(values="int4")
    with pytest.raises(ConfigError, match="values=2bit: one of fp32, fp16, int8, sign"):
        RandK(values="2bit")
    with pytest.raises(ConfigError, match="unbiased="):
        RandK(unbiased="yes")  # type: ignore[arg-type]
