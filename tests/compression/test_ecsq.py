"""One-step quantisers: rates, targets, scales, hostile payloads."""

from __future__ import annotations

from math import e, log2, pi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
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


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("step", [0.02, 0.1, 0.3])
def test_white_noise_costs_what_theory_says(method: type[ECSQ], step: float) -> None:
    # At high rate a step s gives NMSE s**2 / 12 at h(X) - log2(s) bits, h(X) = log2(2 pi e) / 2.
    update = np.random.default_rng(1).normal(size=90_000).astype(np.float32)
    bits, nmse = measure(method(step), update, layout_of((300, 200), (30_000,)))
    assert nmse == pytest.approx(step**2 / 12, rel=0.02)
    assert bits == pytest.approx(log2(2 * pi * e) / 2 - log2(step), rel=0.006)


def test_embeddings_have_a_step_of_their_own() -> None:
    """Every other coordinate is decoded to the same bits; those of tokens err a quarter as much."""
    rng = np.random.default_rng(5)
    update = rng.normal(size=40_000).astype(np.float32)
    layout = Layout((TensorSpec("h", (100, 200)), TensorSpec("wte", (200, 100), tokens=True)))
    plain, finer = (
        method.decode(method.encode(update, layout, np.random.default_rng(0)), layout)
        for method in (ECSQ(0.4), ECSQ(0.4, embedding_step=0.25))
    )
    assert finer[:20_000].tobytes() == plain[:20_000].tobytes()
    for step, decoded in ((0.4, plain), (0.1, finer)):
        error = float(np.square(update[20_000:] - decoded[20_000:]).mean())
        assert error == pytest.approx(step**2 / 12, rel=0.04)
    # log2(4) bits more for each of half of the coordinates.
    sizes = [len(ECSQ(0.4, embedding_step=s).encode(update, layout, rng)) for s in (1.0, 0.25)]
    assert 8 * (sizes[1] - sizes[0]) == pytest.approx(2 * 20_000, rel=0.03)


@pytest.mark.parametrize("method", BOTH)
def test_without_embeddings_their_step_changes_nothing(method: type[ECSQ]) -> None:
    update = np.random.default_rng(6).normal(size=6_000).astype(np.float32)
    layout = layout_of((60, 100))
    payloads = [
        method(1.0, embedding_step=share).encode(update, layout, np.random.default_rng(0))
        for share in (1.0, 0.25)
    ]
    assert payloads[0][4:] == payloads[1][4:]  # but for the frame


@pytest.mark.parametrize("share", [0, 1.5, "1", True])
def test_bad_steps_of_embeddings_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=f"embedding_step={share}: a number from 0.01 to 1"):
        ECSQ(embedding_step=share)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"embedding_step=0\.5: .* 1 when target_nmse is set"):
        LowRankECSQ(target_nmse=0.1, embedding_step=0.5)


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


@pytest.mark.slow
@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("target", [0.5, 0.1, 3e-3, 1e-5])
def test_a_target_error_is_met_closely(method: type[ECSQ], target: float) -> None:
    update, layout = low_rank(200, 300, rank=4, noise=0.3), layout_of((200, 300))
    nmse = measure(method(target_nmse=target), update, layout)[1]
    assert 0.98 * target < nmse <= target


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("method", [ECSQ, LowRankECSQ])
@pytest.mark.parametrize("parameters", [{"step": 2.0}, {"target_nmse": 0.1}, {"target_bits": 0.5}])
def test_an_update_counts_as_large_as_it_is_told(
    method: type[ECSQ], parameters: dict[str, float]
) -> None:
    """Of another rms an error is relative to that; of its own the payload is the usual one."""
    layout = Layout((TensorSpec("w", (60, 50)),))
    update = np.random.default_rng(5).standard_normal(layout.size).astype(np.float32)
    rms, codec = float(np.sqrt(np.mean(np.square(update, dtype=np.float64)))), method(**parameters)

    def encode(unit: float) -> bytes:
        return codec.encode_in_units(update, layout, np.random.default_rng(0), unit)

    def lost(payload: bytes) -> float:
        return float(np.mean(np.square(codec.decode(payload, layout) - update)))

    usual = codec.encode(update, layout, np.random.default_rng(0))
    assert lost(encode(rms)) == pytest.approx(lost(usual), rel=0.02)
    finer = encode(rms / 4)
    if "target_bits" in parameters:
        assert finer == usual, "so many bits, whatever the unit"
    else:
        assert lost(finer) <= (0.1 * 1.01 if "target_nmse" in parameters else 1.0) * (rms / 4) ** 2
        assert len(finer) > 1.5 * len(usual)
    zeros = np.zeros_like(update)
    nothing = codec.encode_in_units(zeros, layout, np.random.default_rng(0), 1.0)
    assert not codec.decode(nothing, layout).any()
