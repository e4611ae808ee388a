"""Arithmetic that must not round, against Python's own integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fedbw_sweep.compression.exact import (
    PER_OCTAVE,
    Integers,
    Multiplier,
    bits_of,
    exp2,
    orthonormal,
    product,
    product_blocks,
)


@pytest.mark.parametrize("parts", [0, 1, 64, 127, 128, -1, -64, 3000, -17_000])
def test_powers_are_the_nearest_float64(parts: int) -> None:
    value = float(exp2(parts))
    below, above = (
        (Fraction(value) + Fraction(np.nextafter(value, side))) / 2 for side in (0.0, np.inf)
    )
    # The 128th root of 2**parts lies between the midpoints to the neighbours.
    slack = Fraction(1, 1 << 6)  # of half a unit: the root has 61 bits
    low = below - slack * (Fraction(value) - below)
    high = above + slack * (above - Fraction(value))
    assert low**PER_OCTAVE <= Fraction(2) ** parts <= high**PER_OCTAVE


def test_powers_of_arrays() -> None:
    np.testing.assert_array_equal(exp2(np.array([-128, 0, 256])), [0.5, 1, 4])


@pytest.mark.parametrize("terms", [1, 2, 3, 512, 513, 50_304])
def test_sums_of_products_stay_below_the_integers_that_float64_holds(terms: int) -> None:
    bits = bits_of(terms)
    assert terms * 4**bits <= 2**53 < terms * 4 ** (bits + 1)


def exactly(matrix: np.ndarray) -> np.ndarray:
    """Return the numbers as fractions, which never round."""
    return np.vectorize(Fraction, otypes=[object])(matrix.astype(float))


def test_products_of_integers_are_exact() -> None:
    rng = np.random.default_rng(0)
    left = Integers(rng.normal(size=(40, 30)), bits_of(40))
    square = exactly(left.values).T @ exactly(left.values) * Fraction(left.unit) ** 2
    np.testing.assert_array_equal(exactly(left.gram()), square)
    assert np.abs(left.values).max() <= 2**left.bits
    thin = Integers(rng.normal(size=(30, 3)), bits_of(40))
    matrix = Multiplier(rng.normal(size=(40, 30)).astype(np.float32))
    rounded = matrix._matrix
    values, unit = matrix.times(thin)
    assert unit == rounded.unit * thin.unit
    np.testing.assert_array_equal(exactly(values), exactly(rounded.values) @ exactly(thin.values))


def test_rounding_is_to_the_nearest_of_units_that_are_powers_of_two() -> None:
    rounded = Integers(np.array([[0.75, -3.0, 0.3]]), 4)
    # 3 is between 2 and 4: 12 of the unit 1/4.
    assert rounded.unit == 0.25
    np.testing.assert_array_equal(rounded.values, [[3, -12, 1]])
    assert Integers(np.zeros((2, 2)), 20).values.tolist() == [[0, 0], [0, 0]]
    assert Integers(np.zeros((0, 3), np.float32), 20).values.shape == (0, 3)


def test_columns_of_zeros_change_nothing() -> None:
    rng = np.random.default_rng(1)
    dense = rng.normal(size=(20, 30)).astype(np.float32)
    dense[:, ::3] = 0
    right, left = rng.normal(size=(30, 2)), rng.normal(size=(20, 2))
    values, unit = Multiplier(dense).times(Integers(right.copy(), 20))
    np.testing.assert_allclose(values * unit, dense @ right, atol=1e-4)
    values, unit = Multiplier(dense).transposed_times(Integers(left.copy(), 20))
    np.testing.assert_allclose(values * unit, dense.T @ left, atol=1e-4)


def test_a_row_that_is_small_beside_others_keeps_its_digits() -> None:
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(300, 5)), rng.normal(size=(400, 5))
    left[::2] *= 1e-30
    expected = left @ right.T
    scale = np.abs(left).max(axis=1)[:, None] * np.abs(right).max(axis=1)
    assert (np.abs(product(left, right) - expected) < 3e-7 * scale).all()
    assert len(list(product_blocks(left, right, 1))) > 1


def test_a_basis_is_orthonormal_and_spans_the_columns() -> None:
    rng = np.random.default_rng(3)
    columns = rng.normal(size=(50, 6)).astype(np.float32)
    columns[:, 4] = 2 * columns[:, 1]  # dependent
    columns[:, 5] = 0
    basis = orthonormal(columns).astype(float)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(basis @ (basis.T @ columns), columns, atol=1e-5)
    np.testing.assert_allclose(orthonormal(np.zeros((4, 2), np.float32)), np.eye(4, 2))
