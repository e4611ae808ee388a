"""The change of coordinates that both ends compute of what they know, and what it saves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.exact import (
    Integers,
    Matrix,
    bits_of,
    inverse_of_upper,
    orthonormalised,
    reflections,
)
from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.compression.rotation import Moved, Rotation
from fedbw_sweep.errors import ConfigError, PayloadError

from .test_ecsq import layout_of


def integers(columns: Matrix) -> Integers:
    return Integers(columns.copy(), bits_of(len(columns)))


def test_the_inverse_of_a_triangle() -> None:
    triangle = np.triu(np.random.default_rng(0).standard_normal((9, 9))) + 4 * np.eye(9)
    np.testing.assert_allclose(inverse_of_upper(triangle) @ triangle, np.eye(9), atol=1e-12)


def test_columns_become_those_of_a_qr_decomposition() -> None:
    columns = np.random.default_rng(1).standard_normal((50, 12)) @ np.diag(2.0 ** -np.arange(12))
    found, (expected, _) = orthonormalised(integers(columns)), np.linalg.qr(columns)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=2e-3)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=2e-3)


def test_columns_that_others_span_become_zeros() -> None:
    columns = np.random.default_rng(1).standard_normal((50, 3))
    dependent = np.column_stack([columns, columns[:, :1], np.zeros(50), columns[:, 1] + 1])
    found = orthonormalised(integers(dependent))
    np.testing.assert_array_equal(found[:, 3:5], 0)
    np.testing.assert_allclose(np.square(found).sum(0), [1, 1, 1, 0, 0, 1], atol=1e-4)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
def test_reflections_make_an_orthogonal_matrix_that_starts_with_the_basis(
    count: int, more: int, zeros: int
) -> None:
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((count + more, count)))[0]
    basis[:, max(0, count - zeros) :] = 0
    normals = reflections(basis.copy())
    whole = np.eye(count + more)
    for normal in normals.T:
        whole -= 2 * np.outer(whole @ normal, normal) / (normal @ normal)
    along = np.abs((whole[:, :count] * basis).sum(0))
    np.testing.assert_allclose(along, np.square(basis).sum(0), atol=1e-5)


def moved(rows: int, cols: int, rank: int = 90) -> FloatVector:
    """Return a matrix whose singular values halve every eight."""
    rng, rank = np.random.default_rng(3), min(rank, rows, cols)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (rows, cols))
    return (left * 2.0 ** (-np.arange(rank) / 8) @ right.T).astype(np.float32)


def rotation_of(difference: FloatVector) -> Rotation:
    return Rotation(Moved(difference, np.zeros_like(difference)))


@pytest.mark.parametrize("shape", [(16, 16), (17, 70), (40, 41), (128, 512), (20, 70_000)])
def test_turning_back_restores_a_matrix(shape: tuple[int, int]) -> None:
    rotation = rotation_of(moved(*shape))
    matrix = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    turned = matrix.copy()
    rotation.turn(turned)
    assert np.abs(turned - matrix).max() > 0.1
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
    rotation.turn(turned, back=True)
    np.testing.assert_allclose(turned, matrix, atol=1e-4)


@pytest.mark.parametrize("shape", [(100, 300), (128, 128)])
def test_the_first_coordinates_are_the_leading_singular_directions(shape: tuple[int, int]) -> None:
    difference, count = moved(*shape), Moved(moved(*shape), np.zeros(shape)).directions
    left, _, right = np.linalg.svd(difference)
    update = np.random.default_rng(5).standard_normal(shape)
    turned = update.astype(np.float32)
    rotation_of(difference).turn(turned)
    for some in (8, 24):  # well apart from what follows, and of the same span whatever the signs
        expected = np.linalg.norm(left[:, :some].T @ update @ right[:some].T)
        assert np.linalg.norm(turned[:some, :some]) == pytest.approx(expected, rel=0.03)
    assert np.linalg.norm(turned[:count, :count]) < np.linalg.norm(turned)


@pytest.mark.parametrize(
    "difference",
    [
        lambda: moved(30, 60, rank=2),
        lambda: np.eye(20, 50, dtype=np.float32),
        lambda: np.pad(moved(30, 20), ((0, 0), (30, 0))),  # rows of tokens that did not occur
        lambda: np.float32(1e-38) * moved(20, 30),
        lambda: np.float32(1e30) * moved(20, 30),
        lambda: np.full((18, 19), np.float32(3)),
    ],
)
def test_any_difference_will_do(difference: Callable[[], FloatVector]) -> None:
    rotation = rotation_of(difference())
    matrix = np.random.default_rng(4).standard_normal(difference().shape).astype(np.float32)
    turned = matrix.copy()
    rotation.turn(turned)
    rotation.turn(turned, back=True)
    np.testing.assert_allclose(turned, matrix, atol=1e-4)


@pytest.mark.parametrize(
    ("difference", "count"),
    [
        (moved(16, 200), 8),
        (moved(200, 300), 64),
        (moved(15, 200), 0),
        (np.zeros((30, 40), np.float32), 0),
        (np.full((30, 40), np.float32(np.inf)), 0),
    ],
    ids=["few", "many", "too thin", "nothing", "infinite"],
)
def test_how_many_directions_there_are(difference: FloatVector, count: int) -> None:
    assert Moved(difference, np.zeros_like(difference)).directions == count


LAYOUT = layout_of((64, 96), (200,), (96, 40))


def drawn(seed: int) -> FloatVector:
    return np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)


def test_an_update_along_what_has_moved_takes_fewer_bits() -> None:
    parts = [moved(64, 96).ravel(), drawn(1)[:200], moved(96, 40).ravel()]
    initial, change = drawn(2), np.concatenate(parts)
    known = Known(initial, (initial + change).astype(np.float32))
    rng = np.random.default_rng(6)
    update = change * np.float32(0.1) + np.float32(2e-3) * drawn(7)
    sizes, errors = {}, {}
    for context in ("none", "received"):
        codec = LowRankECSQ(0.2, context=context)
        payload = codec.encode(update, LAYOUT, rng, known)
        sizes[context] = len(payload)
        lost = codec.decode(payload, LAYOUT, known) - update
        errors[context] = np.square(lost).sum() / np.square(update).sum()
    assert errors["received"] < 1.1 * errors["none"]
    assert sizes["received"] < 0.8 * sizes["none"]


def test_the_largest_floats_stay_finite() -> None:
    update = np.full(LAYOUT.size, np.finfo(np.float32).max)
    update[::3] *= -1
    codec, known = LowRankECSQ(0.5, context="received"), Known(drawn(1), drawn(2))
    decoded = codec.decode(
        codec.encode(update, LAYOUT, np.random.default_rng(0), known), LAYOUT, known
    )
    assert np.isfinite(decoded).all()
    assert np.square(decoded / 1e38 - update / 1e38).sum() < 0.3 * np.square(update / 1e38).sum()


def test_where_nothing_has_moved_the_payload_is_as_without() -> None:
    initial, update = drawn(1), drawn(2)
    rng = np.random.default_rng
    plain = LowRankECSQ(1.0).encode(update, LAYOUT, rng(0))
    codec = LowRankECSQ(1.0, context="received")
    for known in (Known(), Known(initial, initial), Known(initial)):
        assert codec.encode(update, LAYOUT, rng(0), known)[4:] == plain[4:]


def test_another_context_or_none_is_refused() -> None:
    codec, known = LowRankECSQ(1.0, context="received"), Known(drawn(1), drawn(2))
    payload = codec.encode(drawn(3), LAYOUT, np.random.default_rng(0), known)
    assert codec.decode(payload, LAYOUT, known).any()
    one_bit = drawn(2)
    one_bit.view(np.uint32)[5] ^= 1
    for other in (Known(), Known(drawn(1)), Known(drawn(2), drawn(1)), Known(drawn(1), one_bit)):
        with pytest.raises(PayloadError, match=r"from another model \(initial, received\)"):
            codec.decode(payload, LAYOUT, other)
    with pytest.raises(PayloadError):
        LowRankECSQ(1.0).decode(payload, LAYOUT, known)


def test_a_context_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="context=sent: none or received"):
        LowRankECSQ(context="sent")
