"""The covering set of runs, and the comparison of what two commits made of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from fedbw_sweep.config.identity import config_columns
from tests.conftest import ROOT, config_of
from tools import compare_commits
from tools.compare_commits import RUNS, Tree, cases, differences, possible, shared, tables

HERE = Tree(ROOT, "python")
METHODS = sorted(path.stem for path in (ROOT / "conf/compression").glob("*.yaml"))
FACTORS = {"compression": METHODS, "downlink": METHODS, **RUNS["factors"]}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return compare_commits.cover(FACTORS)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return cases(METHODS)


@pytest.mark.slow
def test_there_are_at_most_80_runs(rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    assert len(rows) == len(runs) <= 80
    assert [run["seed"] for run in runs] == list(range(1, len(runs) + 1))


def test_every_pair_of_values_is_in_a_run(rows: list[dict[str, Any]]) -> None:
    for first, second in combinations(FACTORS, 2):
        if (first, second) == ("compression", "downlink"):
            continue  # hundreds of pairs
        wanted = {(a, b) for a in FACTORS[first] for b in FACTORS[second]}
        if {first, second} == {"upload", "compression.error_feedback"}:
            wanted -= {("weights", True), (True, "weights")}
        assert {(row[first], row[second]) for row in rows} == wanted, (first, second)


def test_pairs_that_are_refused_are_never_wanted() -> None:
    factors = {"upload": ["update", "weights"], "compression.error_feedback": [False, True]}
    assert possible(factors) == {
        frozenset({("upload", "update"), ("compression.error_feedback", False)}),
        frozenset({("upload", "update"), ("compression.error_feedback", True)}),
        frozenset({("upload", "weights"), ("compression.error_feedback", False)}),
    }


@pytest.mark.parametrize("way", ["compression", "downlink"])
def test_every_variant_of_every_method_goes_up_and_down(
    runs: list[dict[str, Any]], way: str
) -> None:
    assert {run[way] for run in runs} == set(METHODS)
    for method, variants in RUNS["methods"].items():
        for variant in variants:
            wanted = {f"{way}.{key}": value for key, value in variant.items()}
            assert any(run[way] == method and wanted.items() <= run.items() for run in runs), wanted


def test_every_variant_of_other_factors_is_used(runs: list[dict[str, Any]]) -> None:
    for choices in RUNS["variants"].values():
        for variant in (variant for variants in choices.values() for variant in variants):
            assert any(all(run.get(k) == v for k, v in variant.items()) for run in runs), variant


@pytest.mark.slow
def test_every_run_is_one_that_the_package_does(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        own = HERE.own(run)
        names = {key: "compression@downlink" if key == "downlink" else key for key in own}
        written = (f"{names[k]}={json.dumps(value)}".replace('"', "") for k, value in own.items())
        config = config_of(*written)
        columns = config_columns(config.science)
        plain = {key for key, value in own.items() if not isinstance(value, dict | list)}
        assert plain - columns.keys() == {"device"}
        assert {key: own[key] for key in plain & columns.keys()} == {
            key: columns[key] for key in plain & columns.keys()
        }


# --- Renames, on made-up trees -------------------------------------------------------------------


def tree(folder: Path, **choices: list[str]) -> Tree:
    for group in ("compression", "server"):
        (folder / "conf" / group).mkdir(parents=True)
    for name, keys in choices.items():
        group = "compression" if name == "ecsq" else "server"
        path = folder / "conf" / group / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict.fromkeys(keys, 1)), encoding="utf-8")
    return Tree(folder, "python")


def test_keys_are_renamed_where_the_choice_has_the_new_name(tmp_path: Path) -> None:
    case = {
        "compression": "ecsq",
        "compression.rescale": True,
        "compression.step": 2.0,
        "downlink": "ecsq",
        "downlink.rescale": False,
        "server": "fedadam",
        "server.eta": 0.01,
        "clients.dropout": 0.4,
    }
    old = tree(tmp_path / "old", ecsq=["step", "rescale"], fedadam=["eta"])
    new = tree(tmp_path / "new", ecsq=["step", "norm_correction"], fedadam=["lr"])
    assert old.own(case) == case
    assert new.own(case) == {
        "compression": "ecsq",
        "compression.norm_correction": True,
        "compression.step": 2.0,
        "downlink": "ecsq",
        "downlink.norm_correction": False,
        "server": "fedadam",
        "server.lr": 0.01,
        "clients.dropout": 0.4,
    }


def test_a_run_is_written_as_a_preset(tmp_path: Path) -> None:
    case = {"compression": "ecsq", "downlink": "ecsq", "downlink.step": 2.0, "rounds": 3}
    tree(tmp_path, ecsq=["step"]).write(case, tmp_path / "case.yaml")
    text = (tmp_path / "case.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert yaml.safe_load(text) == {
        "defaults": [
            {"override /compression": "ecsq"},
            {"override /compression@downlink": "ecsq"},
        ],
        "downlink": {"step": 2.0},
        "rounds": 3,
    }


# --- Matching and comparing, on made-up tables ---------------------------------------------------


def sweep(folder: Path, run_id: str, loss: float = 2.5, uplink: int = 100, **settings: Any) -> Path:
    """Write a sweep of one run of two rounds with seed 7, and one other run."""
    (folder / run_id).mkdir(parents=True)
    settings = {"seed": 7, "compression": "topk", "compression.density": 0.1, **settings}
    run = {"run_id": run_id, "model_hash": f"of {loss}", "loss": loss, **settings}
    other = {**run, "run_id": "other", "seed": 8, "loss": 99.0}
    pd.DataFrame([other, run]).to_csv(folder / "results.csv", index=False)
    rows = [
        {"run_id": name, "round": r, "loss": loss + 1 - r, "uplink_bytes": uplink * r, "took": name}
        for name in ("other", run_id)
        for r in (0, 1)
    ]
    pd.DataFrame(rows).to_csv(folder / "rounds.csv", index=False)
    sent = {"round": 1, "client": 3, "direction": "uplink", "payload_bytes": uplink}
    pd.DataFrame([sent]).to_parquet(folder / run_id / "messages.parquet")
    return folder


CASE = {"seed": 7, "compression": "topk", "compression.density": 0.1, "model.architecture": {}}


def compared(
    before: Path, after: Path, tolerance: float = 0.0, ignored: tuple[str, ...] = ()
) -> tuple[dict[str, float], Counter[str]]:
    counted: Counter[str] = Counter()
    both = tables(before, CASE), tables(after, CASE)
    found = differences(*both, counted, tolerance, list(ignored))
    return {one.column: one.relative for one in found}, counted


def test_runs_are_matched_by_settings_whatever_their_ids_and_further_columns(
    tmp_path: Path,
) -> None:
    before = sweep(tmp_path / "a", "0123")
    after = sweep(tmp_path / "b", "4567", ended="rounds", new_bytes=3)
    found, counted = compared(before, after)
    assert not found
    assert counted == {
        "results.csv loss": 1,
        "results.csv model_hash": 1,
        "results.csv new_bytes, which only one has": 0,
        "rounds.csv loss": 2,
        "rounds.csv uplink_bytes": 2,
        "messages.parquet payload_bytes": 1,
    }


def test_a_run_that_does_not_have_the_settings_asked_for_is_an_error(tmp_path: Path) -> None:
    before = sweep(tmp_path / "a", "0123")
    after = sweep(tmp_path / "b", "4567", **{"compression.density": 0.01})
    with pytest.raises(ValueError, match=r"compression\.density=0\.1, and has 0\.01"):
        compared(before, after)


def test_differences_are_found_with_their_size(tmp_path: Path) -> None:
    before = sweep(tmp_path / "a", "0123")
    found, _ = compared(before, sweep(tmp_path / "b", "4567", uplink=125))
    assert found == {"rounds.csv uplink_bytes": 0.25, "messages.parquet payload_bytes": 0.25}
    found, _ = compared(before, sweep(tmp_path / "c", "4567", loss=2.5 * (1 + 1e-6)))
    assert found == {
        "results.csv loss": pytest.approx(1e-6),
        "results.csv model_hash": float("inf"),
        "rounds.csv loss": pytest.approx(1e-6),
    }


def test_losses_may_differ_within_a_tolerance_and_bytes_not(tmp_path: Path) -> None:
    before = sweep(tmp_path / "a", "0123")
    after = sweep(tmp_path / "b", "4567", loss=2.5 * (1 + 1e-6), uplink=125)
    found, _ = compared(before, after, tolerance=1e-5)
    assert found.keys() == {"rounds.csv uplink_bytes", "messages.parquet payload_bytes"}
    found, _ = compared(before, after, tolerance=1e-5, ignored=("uplink_bytes",))
    assert found.keys() == {"messages.parquet payload_bytes"}


def test_missing_messages_are_a_difference(tmp_path: Path) -> None:
    before, after = sweep(tmp_path / "a", "0123"), sweep(tmp_path / "b", "4567")
    (after / "4567" / "messages.parquet").unlink()
    assert compared(before, after)[0] == {"messages.parquet rows": float("inf")}


def test_a_run_that_failed_both_times_is_listed(tmp_path: Path) -> None:
    before = sweep(tmp_path / "a", "0123", model_hash="")
    assert compared(before, before)[0] == {"results.csv model_hash": 0.0}


@pytest.mark.parametrize(
    ("before", "after", "size"),
    [
        ("3", "3.0", 0.0),
        ("", "", 0.0),
        ("nan", "nan", 0.0),
        ("4", "3", 0.25),
        ("0", "3", float("inf")),
        ("nan", "3", float("inf")),
        ("", "3", float("inf")),
        ("ab", "ac", float("inf")),
        ("1", "inf", float("inf")),
    ],
)
def test_sizes_of_differences(before: str, after: str, size: float) -> None:
    assert compare_commits.apart(before, after) == size


def test_runs_that_differ_are_grouped_by_what_they_share() -> None:
    runs = [
        {"seed": 1, "server": "fedadam", "compression": "topk", "model": "tiny"},
        {"seed": 2, "server": "fedadam", "compression": "none", "model": "gpt2"},
        {"seed": 3, "server": "fedavg", "compression": "topk", "model": "tiny"},
        {"seed": 4, "server": "fedavg", "compression": "sign", "model": "gpt2"},
        {"seed": 5, "server": "fedavg", "compression": "none", "model": "gpt2"},
    ]
    assert list(shared({0, 1}, runs)) == [("server=fedadam (2 of 2 runs)", {0, 1})]
    assert list(shared({0, 1, 3}, runs)) == [
        ("server=fedadam (2 of 2 runs)", {0, 1}),
        ("compression=sign (1 of 1 runs)", {3}),
    ]
    assert not list(shared(set(), runs))


def test_only_what_is_allowed_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [{"seed": 1, "proximal_mu": 0.1, "upload": "update"}, {"seed": 2, "proximal_mu": 0.0}]
    loss = compare_commits.Difference("rounds.csv loss", 0.5, "2", "3")
    assert compare_commits.report(runs, [[], []], []) == 0
    assert compare_commits.report(runs, [[loss], []], []) == 1
    assert "by up to 5.0e-01 of it, 2 -> 3" in capsys.readouterr().out
    assert compare_commits.report(runs, [[loss], []], ["proximal_mu=0.10"]) == 0
    assert compare_commits.report(runs, [[loss], []], ["proximal_mu=0"]) == 1
    assert compare_commits.report(runs, [[loss], [loss]], ["upload=update"]) == 1
    assert "seeds 2" in capsys.readouterr().out
