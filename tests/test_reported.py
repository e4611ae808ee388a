"""Which tests hold each fault that public reports had told of, numbered as there."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import ROOT

POINTS = {
    1: ["training/test_reported.py::test_point_1_"],
    2: ["report/test_reported.py::test_null_is_told_apart_from_a_value"],
    3: [
        "report/test_reported.py::test_bold_is_over_the_common_seeds",
        "report/test_reported.py::test_without_a_common_seed_nothing_is_bold",
        "report/test_reported.py::test_speedups_are_over_the_common_seeds",
        "report/test_reported.py::test_the_front_is_over_the_common_seeds",
    ],
    4: ["training/test_reported.py::test_point_4_"],
    5: ["config/test_reported.py::test_point_5_"],
    6: ["model/test_reported.py::test_point_6_"],
    7: ["model/test_reported.py::test_point_7_"],
    8: [
        "report/test_reported_texts.py::test_units_of_bytes_are_scaled",
        "report/test_reported_texts.py::test_other_units_are_refused",
    ],
    9: ["training/test_reported.py::test_point_9_"],
    10: ["model/test_reported.py::test_point_10_"],
    11: ["data/test_limits.py::test_point_11_"],
    12: ["training/test_reported.py::test_point_12_"],
    13: [
        "test_plan.py::test_a_grid_without_points_is_refused",
        "test_main.py::test_bad_input_stops_before_any_training",
    ],
    14: ["report/test_reported_texts.py::test_there_may_be_little_or_nothing_to_show"],
    15: [
        "report/test_reported_texts.py::test_a_table_that_pandas_wrote_is_read",
        "report/test_reported_texts.py::test_whole_numbers_stay_exact",
    ],
    16: [
        "report/test_reported_texts.py::test_any_terminal_can_show_it",
        "report/test_reported_texts.py::test_no_number_is_cut",
    ],
    17: ["report/test_reported.py::test_a_label_has_the_leaf_that_differs"],
    18: ["report/test_reported_texts.py::test_tables_of_one_name_are_refused"],
    19: ["report/test_reported_texts.py::test_a_setting_named_twice_is_refused"],
    20: ["report/test_reported_texts.py::test_a_table_may_have_any_file_name"],
    21: ["examples/test_own_compressor.py::test_it_is_planned_and_measured"],
    22: ["model/test_reported.py::test_point_22_"],
    23: ["model/test_adapters.py::test_point_23_"],
    24: ["report/test_reported_texts.py::test_few_bytes_have_three_digits"],
    25: [
        "report/test_reported.py::test_the_whole_model_is_compared_with",
        "report/test_reported.py::test_a_column_that_says_nothing_is_left_out",
        "report/test_reported.py::test_a_run_measures_what_adapters_save",
    ],
    26: ["model/test_adapters.py::test_point_26_"],
    27: ["model/test_adapters.py::test_point_27_"],
    28: ["model/test_adapters.py::test_point_28_"],
    29: [
        "report/test_reported.py::test_lines_say_which_is_which",
        "report/test_reported.py::test_error_feedback_is_off_for_weights_alone",
        "report/test_reported.py::test_the_codec_bench_says_which_bound_it_is",
    ],
}
"""By number: how the ids of its tests begin."""

ALONE = {15, 18, 19, 20, 21}
"""Faults of one place, which have no two others of their kind."""


@pytest.mark.slow
def test_each_has_a_test_and_two_of_its_kind() -> None:
    named = [name for names in POINTS.values() for name in names]
    files = sorted({"tests/" + name.split("::")[0] for name in named})
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *files],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    cases = [line.removeprefix("tests/") for line in listed.stdout.splitlines() if "::" in line]
    count = Counter(
        number
        for number, names in POINTS.items()
        for name in names
        for case in cases
        if case.startswith(name)
    )
    assert POINTS.keys() == set(range(1, 30))
    for number in POINTS:
        assert count[number] >= (1 if number in ALONE else 3), number
