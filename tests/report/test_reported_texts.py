"""Faults that users met in what is written and printed; see `test_reported`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report import figure
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.report.build import TableBuilder
from fedbw_sweep.report.measure import Options, mean_curves, measure
from fedbw_sweep.report.spec import load_spec
from fedbw_sweep.report.table import describe_bytes, summary_table
from tests.conftest import config_of, refuses
from tests.report.reported import MODEL, fail, printed, spec_of, table_of, write

pytestmark = pytest.mark.slow


# Units of a user's own table.


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        ("B", "2,683,208"),
        ("kB", "2683.21"),
        ("MB", "2.68"),
        ("KiB", "2620.32"),
        ("MiB", "2.56"),
    ],
)
def test_units_of_bytes_are_scaled(tmp_path: Path, unit: str, shown: str) -> None:
    write(tmp_path, 2.0, up=1_341_604)
    write(tmp_path, 2.0, "compression=topk", up=1_341_604)
    spec = load_spec(spec_of(tmp_path, f"value: uplink_bytes, header: up, unit: {unit}"))
    records = load_records(tmp_path)
    table = TableBuilder(measure(records, Options()), Options()).build("t", spec)
    assert table.frame[f"up ({unit})"].tolist() == [shown, shown]


@pytest.mark.parametrize(
    ("measure", "unit", "words"),
    [
        ("uplink_bytes", "KB", "B, kB, MB, GB, KiB, MiB, GiB"),
        ("bytes_to_target", "mb", "B, kB, MB, GB, KiB, MiB, GiB"),
        ("loss", "MB", "no unit of bytes"),
        ("seconds_to_target", "ms", "s, min, h"),
        ("break_even_mbit_s", "MB", "kbit/s, Mbit/s, Gbit/s"),
    ],
)
def test_other_units_are_refused(
    tmp_path: Path, measure: str, unit: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s", 2.0)
    spec = spec_of(tmp_path, f"value: {measure}, header: x, unit: {unit}")
    refuses(main, [str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--spec", str(spec)])
    said = " ".join(capsys.readouterr().err.split())
    for word in ("mine.yaml", measure, unit, words):
        assert word in said


# Nothing to show.


def all_failed(folder: Path) -> None:
    fail(folder, "lr=1e30", "optimizer=sgd")
    fail(folder, "lr=1e30", "optimizer=sgd", "seed=2")


def no_rounds(folder: Path) -> None:
    for method in ("none", "topk"):
        record = RunRecord(config_of("rounds=0", f"compression={method}"), "done")
        sent = dict.fromkeys(("uplink_bytes", "downlink_bytes", "total_bytes"), 0)
        model = {"model_parameters": 250_000, "frozen_parameters": 0, "dense_message_bytes": MODEL}
        record.summary = {"loss": 9.0, "clients_per_round": 4, **sent, **model}
        record.rounds = [
            {"round": 0, "loss": 9.0, "uplink_bytes": 0, "downlink_bytes": 0,
             "cumulative_uplink_bytes": 0, "cumulative_bytes": 0}
        ]  # fmt: skip
        record.write(folder)


def one_run(folder: Path) -> None:
    write(folder, 2.0)


def damaged(folder: Path) -> None:
    write(folder, 2.0)
    (folder / write(folder, 2.0, "seed=2") / "config.yaml").write_text("[]")


@pytest.mark.parametrize("made", [all_failed, no_rounds, one_run, damaged])
def test_there_may_be_little_or_nothing_to_show(
    tmp_path: Path, made: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "s"
    sweep.mkdir()
    made(sweep)
    out = tmp_path / "out"
    options = ["--target-loss", "3", "--budget-mb", "1", "--network", "campus"]
    assert main([str(sweep), "--out", str(out), *options]) == 0
    if made is all_failed:
        assert "loss is inf" in capsys.readouterr().out
    records = load_records(sweep)
    parts = pd.DataFrame({"run_id": [], "tensor": [], "part": [], "bytes": []})
    for common in (False, True):
        curves = mean_curves(records.results, records.rounds, common_seeds=common)
        for name in ("loss_against_bytes", "pareto_front", "bytes_by_round"):
            getattr(figure, name)(curves, tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 1_000
        figure.local_epochs(records.results, curves, tmp_path / "epochs.png")
    figure.bytes_by_part(records.results, parts, tmp_path / "parts.png")
    if made is not damaged:
        results = collect(sweep)[0]
        assert results["status"].iloc[0] in printed(sweep)
        assert isinstance(describe_bytes(results), list)


def test_no_runs_at_all(tmp_path: Path) -> None:
    write(tmp_path, 2.0)
    records = load_records(tmp_path)
    none, rounds = records.results.iloc[:0], records.rounds
    assert varying_settings(none) == ["compression"]
    assert list(run_labels(none, ["compression", "num_clients"])) == []
    assert summary_table(none).table.row_count == 0
    assert describe_bytes(none) == []
    assert mean_curves(none, rounds, common_seeds=True).empty


# results.csv written by other programs.


@pytest.mark.parametrize("index", [False, True])
def test_a_table_that_pandas_wrote_is_read(tmp_path: Path, index: bool) -> None:
    write(tmp_path / "s", 2.0)
    fail(tmp_path / "s", "seed=2")
    collect(tmp_path / "s")
    for name in ("results", "rounds"):
        table = pd.read_csv(tmp_path / "s" / f"{name}.csv")
        table.to_csv(tmp_path / f"{name}.csv", index=index)
    assert "250000.0" in (tmp_path / "results.csv").read_text()
    own, again = (load_records(path).results for path in (tmp_path / "s", tmp_path / "results.csv"))
    columns = ["run_id", "status", "uplink_bytes", "model_parameters", "loss", "seed"]
    pd.testing.assert_frame_equal(own[columns], again[columns])
    assert varying_settings(own) == varying_settings(again)


@pytest.mark.parametrize(
    ("text", "value"), [("9007199254740993.0", 9007199254740993), ("2e3", 2000)]
)
def test_whole_numbers_stay_exact(tmp_path: Path, text: str, value: int) -> None:
    write(tmp_path / "s", 2.0)
    collect(tmp_path / "s")
    table = pd.read_csv(tmp_path / "s" / "results.csv", dtype=str)
    table["total_bytes"] = text
    table.to_csv(tmp_path / "results.csv", index=False)
    assert load_records(tmp_path / "results.csv").results["total_bytes"].tolist() == [value]


# Terminals of other encodings and widths.


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("module", ["report", "status"])
def test_any_terminal_can_show_it(tmp_path: Path, encoding: str, module: str) -> None:
    for seed in (1, 2):
        write(tmp_path / "s", 2.0 + seed / 10, f"seed={seed}")
    fail(tmp_path / "s", "compression=topk")
    out = ["--out", str(tmp_path / "out")] if module == "report" else []
    done = subprocess.run(
        [sys.executable, "-m", f"fedbw_sweep.{module}", str(tmp_path / "s"), *out],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if module == "report":
        text = done.stdout.decode(encoding)
        assert ("2.150 +- 0.071" if encoding == "ascii" else "2.150 ± 0.071") in text


@pytest.mark.parametrize("width", [180, 80, 40])
def test_no_number_is_cut(tmp_path: Path, width: int) -> None:
    """A billion of bytes and a label of many words: what is too wide stands one below the other."""
    for clients in (8, 1_000_000):
        write(
            tmp_path, 2.125, "compression=topk", f"num_clients={clients}", "lr=0.03125",
            up=3_241_936_823_120, bits_per_coordinate=3.504,
        )  # fmt: skip
    shown = printed(tmp_path, width)
    assert ("3.504" in shown) == (width != 80)
    assert ("No room for bits/coordinate" in shown) == (width == 80)
    for number in ("6,483,873.65", "1000000", "2.125", "2.00"):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,…])", shown), number
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


# A user's own tables.


@pytest.mark.parametrize(
    "names", [("a/t.yaml", "b/t.yaml"), ("a/t.yaml", "t.yml"), ("5%.yaml", "5#.yaml")]
)
def test_tables_of_one_name_are_refused(
    tmp_path: Path, names: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s", 2.0)
    specs = []
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        specs += ["--spec", str(spec_of(tmp_path, "value: loss, header: loss", name))]
    refuses(main, [str(tmp_path / "s"), "--out", str(tmp_path / "out"), *specs])
    said = "".join(capsys.readouterr().err.split())
    assert all(str(tmp_path / name) in said for name in names)


@pytest.mark.parametrize(
    "lines",
    [
        "rows: [compression, compression]",
        "rows: [compression]\ncolumns: [num_clients, num_clients]",
        "rows: [compression]\ncolumns: [compression]",
    ],
)
def test_a_setting_named_twice_is_refused(
    tmp_path: Path, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s", 2.0)
    spec = tmp_path / "mine.yaml"
    spec.write_text(f"title: Mine\n{lines}\nmeasures: [{{value: loss, header: loss}}]\n")
    refuses(main, [str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--spec", str(spec)])
    assert "twice" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_a_table_may_have_any_file_name(tmp_path: Path) -> None:
    for method in ("none", "topk"):
        write(tmp_path / "s", 2.0, f"compression={method}")
    names = ["50%.yaml", "a#1.yaml", "b\\c.yaml", "ä ~^$&{}_.yaml", '"quoted".yaml']
    specs = [spec_of(tmp_path, "value: loss, header: loss", name) for name in names]
    arguments = [word for path in specs for word in ("--spec", str(path))]
    out = tmp_path / "out"
    assert main([str(tmp_path / "s"), "--out", str(out), *arguments]) == 0
    page = (out / "report.tex").read_text()
    assert len(re.findall(r"\\input\{tables/[\w.-]+\}", page)) == 6
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"],
        cwd=out, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


# Bytes that are few.


@pytest.mark.parametrize(
    ("up", "unit", "shown"),
    [
        ((288, 1_237), "B", ["576", "2,474"]),
        ((800, 700_000), "kB", ["1.60", "1,400.00"]),
        ((475_000, 500_000), "kB", ["950.00", "1,000.00"]),  # 0.95 MB are two digits
        ((500_000, 2_000_000_000), "MB", ["1.00", "4000.00"]),
    ],
)
def test_few_bytes_have_three_digits(
    tmp_path: Path, up: Sequence[int], unit: str, shown: Sequence[str]
) -> None:
    for method, count in zip(("none", "topk"), up, strict=True):
        write(tmp_path, 2.0, f"compression={method}", up=count)
    table = table_of(tmp_path)
    assert table.frame[f"up ({unit})"].tolist() == list(shown)
    assert table.best[f"up ({unit})"].tolist() == [True, False]
    text = printed(tmp_path)
    assert f"uplink {unit}" in text
    assert all(f"{float(number.replace(',', '')):,.0f}" in text for number in shown[1:])


def test_a_message_of_few_bytes_is_said_in_all_units(tmp_path: Path) -> None:
    write(tmp_path, 2.0, dense_message_bytes=576)
    [line, _] = describe_bytes(collect(tmp_path)[0])
    assert line.endswith("576 B = 0.000549 MiB = 0.000576 MB")  # 576 / 2^20, 576 / 10^6
