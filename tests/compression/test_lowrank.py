"""PowerSGD: exact for low rank, near the best by warm start, sizes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedbw_sweep.compression.feedback import State, encode_with_state
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lowrank import LowRank
from fedbw_sweep.errors import ConfigError, PayloadError

LAYOUT = Layout(
    (
        TensorSpec("w", (10, 20)),
        TensorSpec("b", (7,)),
        TensorSpec("conv", (6, 4, 5)),
        TensorSpec("small", (2, 3)),
        TensorSpec("scalar", ()),
    )
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussian(size: int) -> FloatVector:
    return rng(4).standard_normal(size).astype(np.float32)


def test_size() -> None:
    # Rank 2: 2 (10 + 20) + 7 + 2 (6 + 20) + 6, for which two factors are longer, + 1 numbers.
    payload = LowRank(2).encode(gaussian(LAYOUT.size), LAYOUT, rng())
    assert len(payload) == 4 + 4 * 126 == LowRank(2).expected_bytes(LAYOUT)


def test_what_is_not_a_matrix_travels_as_it_is() -> None:
    update = gaussian(LAYOUT.size)
    decoded = LowRank(2).decode(LowRank(2).encode(update, LAYOUT, rng()), LAYOUT)
    np.testing.assert_array_equal(decoded[200:207], update[200:207])
    np.testing.assert_array_equal(decoded[-7:], update[-7:])
    assert not np.allclose(decoded[:200], update[:200], atol=0.1)


@pytest.mark.parametrize("scale", [1, 1e-44, 1e30])
def test_a_matrix_of_that_rank_is_exact(scale: float) -> None:
    layout = Layout((TensorSpec("w", (40, 50)),))
    product = rng().standard_normal((40, 3)) @ rng(1).standard_normal((3, 50))
    update = (scale * product).astype(np.float32).ravel()
    decoded = LowRank(3).decode(LowRank(3).encode(update, layout, rng()), layout)
    np.testing.assert_allclose(decoded, update, atol=2e-6 * np.abs(update).max() + 6e-45)


def test_warm_start_converges_to_the_best() -> None:
    layout = Layout((TensorSpec("w", (60, 40)),))
    left, values, right = np.linalg.svd(rng().standard_normal((60, 40)), full_matrices=False)
    values = 0.8 ** np.arange(40)
    update = ((left * values) @ right).astype(np.float32).ravel()
    best = np.square(values[4:]).sum()
    errors, state = [], State()
    for number in range(12):
        payload, state = encode_with_state(LowRank(4), update, layout, rng(number), state)
        errors.append(np.square(LowRank(4).decode(payload, layout) - update).sum())
    assert errors[0] > 1.15 * best
    assert errors[-1] == pytest.approx(best, rel=0.01)


def test_without_state_the_start_is_random() -> None:
    update = gaussian(LAYOUT.size)
    payloads = {LowRank(2).encode(update, LAYOUT, rng(seed)) for seed in (1, 1, 2)}
    assert len(payloads) == 2


def test_recovers_from_a_round_of_zeros() -> None:
    layout = Layout((TensorSpec("w", (10, 20)),))
    _, state = encode_with_state(LowRank(2), np.zeros(200, np.float32), layout, rng(), {})
    for _ in range(3):
        payload, state = encode_with_state(LowRank(2), gaussian(200), layout, rng(), state)
    decoded = LowRank(2).decode(payload, layout)
    assert np.square(decoded - gaussian(200)).sum() < 0.8 * np.square(gaussian(200)).sum()


def test_state_of_another_layout_is_refused() -> None:
    state: State = {"right_factors": np.ones(6, np.float32)}
    with pytest.raises(ValueError, match="right factors"):
        encode_with_state(LowRank(2), gaussian(LAYOUT.size), LAYOUT, rng(), state)


def test_numbers_must_be_finite() -> None:
    payload = LowRank(2).encode(gaussian(LAYOUT.size), LAYOUT, rng())
    for start in (4, 4 + 4 * 30, 4 + 4 * 62):
        hostile = payload[:start] + b"\x00\x00\xc0\x7f" + payload[start + 4 :]
        with pytest.raises(PayloadError):
            LowRank(2).decode(hostile, LAYOUT)


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "4"])
def test_bad_parameter(rank: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        LowRank(rank)
