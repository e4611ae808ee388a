"""The page in a real browser, without a network."""

from __future__ import annotations

import re
import shlex
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import expect

from fedbw_sweep.records.read import Records, load_records
from fedbw_sweep.report.page import LIMIT
from fedbw_sweep.report.render import Rendered
from tests.conftest import config_of
from tests.report.pages import (
    EVIL,
    LOSSES,
    MODEL_BYTES,
    ROUNDS,
    UPDATE_BYTES,
    Open,
    Write,
    finished,
    first_column,
    marks,
    rows,
    write_sweep,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    write_sweep(folder)
    return folder


@pytest.fixture(scope="module")
def report(sweep: Path, write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    frame = pd.DataFrame({"method": [EVIL], "loss": ["2.1 ± 0.1"]})
    table = Rendered("one", f"A title {EVIL}", frame, frame == "", frame)
    path = tmp_path_factory.mktemp("report") / "report.html"
    records = replace(load_records(sweep), notes=[f"x.csv: {EVIL} is cut off"])
    return write(records, [table], path, [f"table two is left out: {EVIL}"])


@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_offline_and_fits(report: Path, opened: Open, width: int) -> None:
    assert report.stat().st_size < LIMIT
    page = opened(report, width)
    assert page.title() == "fedbw_sweep report"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for chart in ("#curves svg", "#front svg"):
        box = page.locator(chart).bounding_box()
        assert box is not None
        assert 300 < box["width"] <= width
    assert len(marks(page, "curves")) == len(LOSSES) * ROUNDS
    assert len(marks(page, "front")) == len(LOSSES)


def test_the_table_has_means_and_deviations(report: Path, opened: Open) -> None:
    page = opened(report)
    assert first_column(page) == ["none", "int8", "topk", "sign"]  # by loss
    for row, (method, losses) in zip(rows(page).all(), LOSSES.items(), strict=True):
        done = [loss for loss in losses if loss is not None]
        mean, sd = statistics.mean(done), statistics.stdev(done)
        cells = row.locator("td").all_inner_texts()
        assert cells[2] == f"{mean:.3f} ± {sd:.3f}"
        assert cells[4] == f"{UPDATE_BYTES[method] * ROUNDS / 1e3:,.2f}"  # 49.38 kB at least
        exact = row.locator("td").nth(4).get_attribute("title")
        assert exact == f"{UPDATE_BYTES[method] * ROUNDS:,} B"
    assert [row.locator("td").nth(1).inner_text() for row in rows(page).all()] == [
        "3 done", "3 done", "2 done, 1 failed", "2 done, 1 missing"
    ]  # fmt: skip


def test_a_heading_sorts(report: Path, opened: Open) -> None:
    page = opened(report)
    heading = page.get_by_role("button", name=re.compile(r"^uplink ?kB$"))
    heading.click()
    assert first_column(page) == ["topk", "sign", "int8", "none"]
    cell = page.locator("#main th", has=heading)
    expect(cell).to_have_attribute("aria-sort", "ascending")
    heading.click()
    assert first_column(page) == ["none", "int8", "sign", "topk"]
    expect(cell).to_have_attribute("aria-sort", "descending")
    page.get_by_role("button", name="compression").click()
    assert first_column(page) == ["int8", "none", "sign", "topk"]


def test_the_filter_filters_table_and_charts(report: Path, opened: Open) -> None:
    page = opened(report)
    page.locator("#filter").press_sequentially("FAILED top")
    expect(rows(page)).to_have_count(1)
    assert first_column(page) == ["topk"]
    expect(page.locator("#count")).to_have_text("1 of 4")
    expect(page.locator("#curves .mark-symbol.role-mark path")).to_have_count(ROUNDS)
    page.locator("#filter").fill("nonsense")
    expect(page.locator("#main tbody")).to_have_text("Nothing matches the filter.")
    expect(page.locator("#curves")).to_be_hidden()
    expect(page.locator("#front")).to_be_hidden()
    page.locator("#filter").fill("")
    expect(rows(page)).to_have_count(4)
    expect(page.locator("#curves .mark-symbol.role-mark path")).to_have_count(4 * ROUNDS)


@pytest.mark.parametrize("direction", ["uplink_bytes", "total_bytes"])
def test_the_pareto_front_is_right(report: Path, opened: Open, direction: str) -> None:
    page = opened(report)
    page.locator("#direction").select_option(direction)
    down = MODEL_BYTES if direction == "total_bytes" else 0
    final = {
        method: (
            (UPDATE_BYTES[method] + down) * ROUNDS,
            statistics.mean(loss for loss in losses if loss is not None),
        )
        for method, losses in LOSSES.items()
    }
    beaten = {
        a for a in final for b in final if a != b
        and all(y <= x for x, y in zip(final[a], final[b], strict=True))
    }  # fmt: skip
    expect(page.locator("#front-note")).to_contain_text(f"{4 - len(beaten)} of 4")
    shown = {mark["configuration"]: mark["Pareto front"] for mark in marks(page, "front")}
    assert {name for name, verdict in shown.items() if verdict == "no: dominated"} == beaten
    assert beaten == {"sign"}


def test_pointing_at_a_mark_tells_its_numbers(report: Path, opened: Open) -> None:
    page = opened(report)
    at = next(
        number
        for number, mark in enumerate(marks(page, "curves"))
        if mark["configuration"] == "int8" and mark["round"] == "2"
    )
    page.locator("#curves .mark-symbol.role-mark path").nth(at).hover()
    tip = page.locator("#vg-tooltip-element")
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("4.300 ± 0.100")  # 2.3 + 2 rounds to go
    expect(tip).to_contain_text("508,642 B")  # 2 x 254,321
    expect(tip).to_contain_text("2,508,642 B")


def test_the_legend_filters_and_the_wheel_zooms(report: Path, opened: Open) -> None:
    page = opened(report)
    entry = page.locator("#legend").get_by_role("button", name="int8")
    entry.click()
    expect(entry).to_have_attribute("aria-pressed", "true")

    def opacities() -> set[tuple[str, str | None]]:
        paths = page.locator("#curves .mark-symbol.role-mark path").all()
        labels = [mark["configuration"] for mark in marks(page, "curves")]
        return set(zip(labels, (path.get_attribute("opacity") for path in paths), strict=True))

    assert {name for name, opacity in opacities() if opacity == "1"} == {"int8"}
    entry.click()
    assert {name for name, opacity in opacities() if opacity == "1"} == set(LOSSES)

    def ticks() -> list[str]:
        return page.locator("#curves .role-axis-label text").all_text_contents()

    before = ticks()
    box = page.locator("#curves svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 150)
    page.mouse.wheel(0, -40)
    page.wait_for_timeout(300)
    assert ticks() == before  # the page may scroll
    page.locator("#curves").scroll_into_view_if_needed()
    box = page.locator("#curves svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 150)
    page.keyboard.down("Shift")
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(300)
    page.keyboard.up("Shift")
    assert ticks() != before


def test_a_row_opens_to_commands_that_repeat_its_runs(report: Path, opened: Open) -> None:
    page = opened(report)
    rows(page).filter(has_text="topk").click()
    commands = page.locator("pre.command").all_inner_texts()
    assert len(commands) == 3
    for seed, written in enumerate(commands, start=1):
        python, flag, module, *overrides = shlex.split(written)
        assert [python, flag, module] == ["python", "-m", "fedbw_sweep"]
        same = config_of("compression=topk", f"seed={seed}", f"rounds={ROUNDS}")
        assert config_of(*overrides).run_id == same.run_id
        expect(page.locator("#main .detail")).to_contain_text(same.run_id)
    settings = page.locator("#main .detail .settings div").all_inner_texts()
    assert {tuple(text.split()) for text in settings} == {
        ("rounds", "5", "4"),
        ("compression", "none", "topk"),
    }
    expect(page.locator("#versions")).to_contain_text("2.13.0")
    rows(page).filter(has_text="topk").click()
    expect(page.locator("#main .detail")).to_have_count(0)


def test_failed_and_missing_runs_are_named_with_their_reasons(report: Path, opened: Open) -> None:
    page = opened(report)
    expect(page.locator(".lead")).to_contain_text("12 runs · 10 done, 1 failed, 1 missing")
    [failed, missing] = page.locator("#problems tbody tr").all()
    if "missing" in failed.inner_text().split():
        failed, missing = missing, failed
    expect(failed).to_contain_text(EVIL)  # as text, not as an element
    expect(failed).to_contain_text("topk, seed=3")
    expect(missing).to_contain_text("sign, seed=3")
    expect(page.locator("#tables")).to_contain_text(f"A title {EVIL}")
    assert page.locator("img").count() == 0
    assert page.title() == "fedbw_sweep report"


def test_notes_and_tables_are_shown(report: Path, opened: Open) -> None:
    page = opened(report)
    assert page.locator(".notes li").all_inner_texts() == [
        f"x.csv: {EVIL} is cut off",
        f"table two is left out: {EVIL}",
    ]
    cells = page.locator("#one td").all()
    sides = [cell.evaluate("cell => getComputedStyle(cell).textAlign") for cell in cells]
    assert sides == ["left", "right"]


def changed(records: Records, **columns: Any) -> Records:
    return replace(records, results=records.results.assign(**columns))


def test_one_run_with_a_hostile_name(
    sweep: Path, tmp_path: Path, write: Write, opened: Open
) -> None:
    config = config_of(f"rounds={ROUNDS}")
    records = changed(load_records(sweep / config.run_id), compression=EVIL)
    write(records, [], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    assert first_column(page) == [EVIL]
    ticks = page.locator("#front .role-axis-label text").all_text_contents()
    assert [tick for tick in ticks if tick.startswith(("1.", "2."))], ticks  # a loss of 2.0
    assert {"2", "5"} & set(ticks), ticks  # 4 MB
    page.locator("#front .mark-symbol.role-mark path").hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("document.title")
    assert page.locator("img").count() == 0
    assert page.title() == "fedbw_sweep report"
    expect(page.locator("#main .row .sd")).not_to_contain_text(["±"])
    rows(page).click()  # a row of results that does not tell its config: config.yaml does
    written = page.locator("pre.command").inner_text()
    assert config_of(*shlex.split(written)[3:]).run_id == config.run_id


def test_runs_that_all_failed(sweep: Path, tmp_path: Path, write: Write, opened: Open) -> None:
    configs = [config_of("compression=topk", f"rounds={ROUNDS}", "seed=3")]
    records = load_records([sweep / config.run_id for config in configs])
    write(records, [], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    expect(page.locator("#front-note")).to_have_text("No run with bytes and a loss.")
    expect(rows(page)).to_have_count(1)
    expect(page.locator("#problems tbody tr")).to_have_count(1)


def test_ten_thousand_runs_fit_and_what_does_not_is_named(
    sweep: Path, tmp_path: Path, write: Write, opened: Open
) -> None:
    few, runs, last = load_records(sweep), 10_000, 40
    rng = np.random.default_rng(0)
    results = few.results[few.results["status"] == "done"].sample(
        runs, replace=True, random_state=0
    )
    numbers = {
        "run_id": pd.array([f"{number:012x}" for number in rng.integers(0, 2**48, runs)], "string"),
        "lr": rng.random(runs),
        "loss": rng.normal(3, 1, runs),
        "uplink_bytes": rng.integers(10**4, 10**9, runs),
    }
    results = results.assign(**numbers).reset_index(drop=True)
    rounds = pd.DataFrame(
        {
            "run_id": results["run_id"].repeat(last).to_numpy(),
            "round": np.tile(np.arange(1, last + 1), runs),
            "loss": rng.normal(3, 1, runs * last),
            "cumulative_uplink_bytes": rng.integers(10**4, 10**9, runs * last),
            "cumulative_bytes": rng.integers(10**4, 10**9, runs * last),
        }
    )
    frame = pd.DataFrame({"a": ["x" * 100_000]})
    large = Rendered("large", "A large table", frame, frame == "", frame)
    records = replace(few, results=results, rounds=rounds, notes=["odd"] * 1000)
    write(records, [large], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < LIMIT
    page = opened(tmp_path / "report.html")
    notes = page.locator(".notes").inner_text()
    kept = re.search(r"The table has ([\d,]+) of 10,000 configurations", notes)
    assert kept
    assert 1000 < int(kept[1].replace(",", "")) < runs
    for words in (
        "and 970 more remarks",
        "loss curves of",
        "A loss curve has at most",
        "tables/large.html",
    ):
        assert words in notes
    expect(rows(page)).to_have_count(100)
    page.locator("#more").click()
    expect(rows(page)).to_have_count(200)
    best = rows(page).first.locator("td").all_inner_texts()
    assert f"{results['loss'].min():.3f}" in best


def test_the_front_is_over_the_common_seeds(tmp_path: Path, write: Write, opened: Open) -> None:
    """With its hard seed 3 none would be beaten by int8, which was never given it."""
    for seed, loss in enumerate((2.0, 2.2, 5.0), start=1):
        for method, more in (("none", 0.0), ("int8", 0.5)):
            if method == "none" or seed < 3:
                config = config_of(f"compression={method}", f"seed={seed}", f"rounds={ROUNDS}")
                finished(config, loss + more).write(tmp_path)
    page = opened(write(load_records(tmp_path), [], tmp_path / "report.html"))
    expect(page.locator("#front-note")).to_contain_text("2 of 2 on the Pareto front")
    expect(page.locator("#front-note")).to_contain_text("Over the seeds that all have: n = 2.")
    shown = {mark["configuration"]: mark["loss (nats per token)"] for mark in marks(page, "front")}
    assert shown == {"none": "2.100 over seeds 1, 2", "int8": "2.600 over seeds 1, 2"}


def test_few_bytes_have_a_unit_of_their_own(tmp_path: Path, write: Write, opened: Open) -> None:
    finished(config_of("compression=topk", f"rounds={ROUNDS}"), 2.0).write(tmp_path)
    page = opened(write(load_records(tmp_path), [], tmp_path / "report.html"))
    assert page.get_by_role("button", name=re.compile(r"^uplink ?kB$")).count() == 1
    assert rows(page).first.locator("td").nth(4).inner_text() == "49.38"  # 4 x 12,345 B
