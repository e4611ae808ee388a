"""What of two records of one run may differ between unlike machines."""

from __future__ import annotations

import math

from fedbw_sweep.records.compare import Tolerance


def test_bytes_of_fixed_size_are_the_same_everywhere() -> None:
    fixed, coded = Tolerance.of(fixed_size=True), Tolerance.of(fixed_size=False)
    assert fixed.differ("uplink_bytes", 1000, 1001)
    assert not coded.differ("uplink_bytes", 1000, 1019)
    assert coded.differ("uplink_bytes", 1000, 1021)
    assert coded.differ("dense_uplink_bytes", 1000, 1001), "shapes say it"
    assert coded.differ("clients", 4, 5)


def test_a_change_of_numbers_by_design_allows_more_where_sizes_are_not_fixed() -> None:
    coded = Tolerance.of(fixed_size=False, renumbered=True)
    assert not coded.differ("uplink_bytes", 1000, 801)
    assert coded.differ("uplink_bytes", 1000, 799)
    assert not coded.of_rounds.differ("uplink_bytes", 1000, 701)
    assert coded.differ("loss", 2.0, 2.061)
    assert Tolerance.of(fixed_size=True, renumbered=True) == Tolerance.of(fixed_size=True)


def test_losses_may_differ_in_last_digits_but_not_be_missing() -> None:
    unlike = Tolerance.of(fixed_size=True)
    assert not unlike.differ("loss", 2.0, 2.0199)
    assert unlike.differ("loss", 2.0, 2.0201)
    assert unlike.differ("loss", 2.0, math.nan)
    assert not unlike.differ("loss", math.nan, math.nan)
    assert not unlike.differ("model_hash", "aa", "bb")
    # A loss of 10 may differ by 0.1, which is 10.5% of its perplexity.
    assert not unlike.differ("perplexity", math.exp(10), math.exp(10.099))
    assert unlike.differ("perplexity", math.exp(10), math.exp(10.101))


def test_on_the_same_machine_all_must_be_equal() -> None:
    assert Tolerance().differ("model_hash", "aa", "bb")
    assert Tolerance().differ("loss", 2.0, math.nextafter(2.0, 3.0))
    assert not Tolerance().differ("uplink_bytes", 7, 7)


def test_a_measured_column_that_is_added_later_is_a_loss_or_a_count() -> None:
    unlike = Tolerance.of(fixed_size=True)
    assert not unlike.differ("grad_norm", 2.0, 2.0199)
    assert unlike.differ("grad_norm", 2.0, 2.0201)
    assert unlike.differ("clients", 4, 5)
