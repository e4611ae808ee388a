"""Measures of small sweeps, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.measure import Options, mean_curves, measure, measure_time
from tests.report.sweeps import small_sweep

pytestmark = pytest.mark.slow


def test_an_ambiguous_baseline_is_refused(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    for density in (0.1, 0.2):
        config = run_config("compression=topk", f"compression.density={density}")
        RunRecord(config, "done", summary={"loss": 1.0}).write(tmp_path)
    with pytest.raises(ConfigError, match=r"names 2 runs of one seed; add .*compression.density"):
        measure(load_records(tmp_path), Options(baseline={"compression": "topk"}))
    assert Options.parse_baseline("topk") == {"compression": "topk"}
    parsed = Options.parse_baseline("compression=topk,compression.density=0.1")
    assert parsed == {"compression": "topk", "compression.density": 0.1}
    runs = measure(load_records(tmp_path), Options(baseline=parsed))
    assert runs["loss_difference"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("lost", ["none", "none, seed 2"])
def test_time_without_a_baseline(
    tmp_path: Path, run_config: Callable[..., RunConfig], lost: str
) -> None:
    small_sweep(tmp_path, run_config)
    records = load_records(tmp_path)
    none = records.results["compression"] == "none"
    gone = none & (records.results["seed"].eq(2) | (lost == "none"))
    assert gone.any()
    results = records.results[~gone].reset_index(drop=True)
    options = Options(networks=tuple(NetworkConfig.choices("home")))
    records = replace(records, results=results)
    timed = measure_time(measure(records, options), records, options)
    without = timed["seed"].eq(2) | (lost == "none")
    assert timed.loc[without, "break_even_mbit_s"].isna().all()


def test_curves_are_means_over_seeds(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    records = load_records(tmp_path, messages=False)
    curves = mean_curves(records.results, records.rounds)
    assert curves["configuration"].tolist() == ["none"] * 3 + ["topk"] * 3
    assert curves["round"].tolist() == [0, 1, 2] * 2
    assert curves["loss"].tolist() == pytest.approx([4.05, 3.05, 2.05, 4.05, 3.55, 2.95])
    assert curves["sd"].tolist() == pytest.approx([0.1 / 2**0.5] * 6)
    assert curves["sent_up"].tolist() == pytest.approx([0, 1e-4, 2e-4, 0, 1e-5, 2e-5])
    assert curves["sent"].tolist() == pytest.approx([0, 2e-4, 4e-4, 0, 1.1e-4, 2.2e-4])
    assert curves["up"].tolist() == pytest.approx([0, 1e-4, 1e-4, 0, 1e-5, 1e-5])
    assert curves["down"].tolist() == pytest.approx([0, 1e-4, 1e-4] * 2)
    assert curves["text"].isna().all()
    weighed = records.results.assign(text_bytes_xz=[5_000_000] * 2 + [7_000_000] * 2)
    weighed = weighed.sort_values("compression", kind="stable")
    curves = mean_curves(weighed, records.rounds)
    assert curves["text"].tolist() == [5.0] * 3 + [7.0] * 3
