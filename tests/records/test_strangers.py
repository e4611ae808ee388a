"""Records of strangers: read within limits, and whatever is in them stays text."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedbw_sweep import status
from fedbw_sweep.config.identity import run_id_of
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import DamagedError, ResultsError
from fedbw_sweep.records import files, tables
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.files import parse_json, parse_settings, read_file
from fedbw_sweep.records.read import load, load_records
from fedbw_sweep.records.running import read_running
from fedbw_sweep.records.tables import parse_messages
from fedbw_sweep.report.__main__ import main as report
from fedbw_sweep.status import check, sweep_status
from tests.records.conftest import other_machine
from tests.records.seals import seal

Build = Callable[..., RunConfig]

CLEAR = "\x1b[2J"


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """End a test that hangs, for example in a pipe that nobody writes into."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(sweep: Path, run_config: Build) -> Path:
    """The folder of one of a sweep's runs."""
    return sweep / run_config("compression=topk").run_id


def rename(folder: Path, science: dict[str, Any], numerics: int) -> Path:
    """Give a record other settings, and the id and hashes that they make."""
    (folder / "config.yaml").write_text(yaml.safe_dump(science, allow_unicode=True))
    run_id = run_id_of(science, numerics)
    text = (folder / "status.json").read_text().replace(folder.name, run_id)
    (folder / "status.json").write_text(text)
    seal(folder)
    return folder.rename(folder.with_name(run_id))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["status.json", "rounds.csv", "messages.parquet", "parts.csv"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "large"])
def test_only_regular_files_of_some_size_are_read(
    sweep: Path, run: Path, name: str, kind: str
) -> None:
    path = run / name
    outside = sweep.parent / name
    path.rename(outside)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**40)  # takes no room on the disk
    found = load_records(sweep).results.set_index("run_id").loc[run.name]
    assert found["status"] == "missing"
    words = {"pipe": "is no regular file", "folder": "is no regular file"}
    words |= {"link": "is a link, which is not followed", "large": "has 1,099,511,627,776 bytes"}
    assert words[kind] in found["reason"]
    assert run.name in check(sweep)[0][0]
    shown = sweep_status(sweep)[0].set_index("run_id")["status"][run.name]
    assert shown == ("done" if name == "messages.parquet" else "missing"), "it reads no messages"
    collect(sweep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "refers to its own part a"),
        (b"[" * 5000 + b"]" * 5000, "nested more than 30 deep"),
        (b"a: " + b"[" * 40 + b"]" * 40, "nested more than 30 deep"),
        (b"- " * 5000 + b"x", "nested more than 30 deep"),
        (b"- 1\n", "not a mapping"),
        (b"", "not a mapping"),
        (b"lr: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
        (b"lr: 2001-01-01\n", "is no setting"),
        (b"lr: 2001-99-99\n", "month must be in"),
        (b"lr: !!timestamp x\n", "damaged"),
        (b"lr: !!binary aGk=\n", "is no setting"),
        (b"lr: !!int ''\n", "damaged"),
        (b"lr: " + b"9" * 5000 + b"\n", "damaged"),
        (b"lr: 99999999999999999999\n", "more than 64 bits"),
        (b"1: 2\n", "its key 1 is no text"),
        (b'lr: "\\e[2J"\n', "control characters"),
        ("lr: \u202egnp.exe\n".encode(), "control characters"),
        (b"lr: \xff\n", "damaged"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, text: bytes, words: str) -> None:
    with pytest.raises(DamagedError, match=words):
        parse_settings(tmp_path / "config.yaml", text)


def test_many_aliases_take_no_time(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 500)]
    with pytest.raises(DamagedError, match="refers to its own part"):
        parse_settings(tmp_path / "config.yaml", "\n".join(lines).encode())


@pytest.mark.parametrize(
    "text", [b'{"a":' * 40 + b"1" + b"}" * 40, b"[" * 10**6, b"[1]", b"9" * 5000]
)
def test_a_status_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(DamagedError):
        parse_json(tmp_path / "status.json", text)


def parquet(**keywords: Any) -> bytes:
    rows = keywords.pop("rows", 4)
    columns = {name: [1] * rows for name in tables.MESSAGES_COLUMNS}
    columns["direction"] = ["uplink"] * rows
    into = io.BytesIO()
    pq.write_table(pa.table(columns | keywords.pop("columns", {})), into, **keywords)
    return into.getvalue()


@pytest.mark.slow
def test_messages_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "messages.parquet"
    assert len(parse_messages(path, parquet())) == 4
    bomb = parquet(rows=5_000_000)
    assert len(bomb) < 2**20
    with pytest.raises(DamagedError, match="more than 4,000,000 rows"):
        parse_messages(path, bomb)
    with pytest.raises(DamagedError, match="another method than Snappy"):
        parse_messages(path, parquet(compression="zstd"))
    with pytest.raises(DamagedError, match="direction has values of another kind"):
        parse_messages(path, parquet(columns={"direction": ["x" * 1000] * 4}))
    with pytest.raises(DamagedError, match="round has values of another kind"):
        parse_messages(path, parquet(columns={"round": [0.5] * 4}))
    with pytest.raises(DamagedError, match="round has values of another kind, or lacks"):
        parse_messages(path, parquet(columns={"round": [1, None, 1, 1]}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../etc", "", "0123456789AB", "0123456789abc", "a/b"])
def test_a_run_id_is_never_a_path(sweep: Path, run: Path, name: str) -> None:
    table = other_machine(sweep)
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows.loc[0, "run_id"] = name
    rows.to_csv(table, index=False)
    with pytest.raises(ResultsError, match="run_id"):
        load(table)
    said = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**said, "run_id": name}))
    seal(run)
    assert load(sweep).set_index("run_id")["status"][run.name] == "missing"


@pytest.mark.slow
def test_no_control_character_reaches_a_terminal(
    sweep: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads((run / "status.json").read_text())
    said |= {"status": "failed", "reason": f"bad{CLEAR}\u202e\x07", "processor": CLEAR}
    (run / "status.json").write_text(json.dumps(said))
    seal(run)
    copy = sweep / f"copy{CLEAR}"
    copy.mkdir()
    (copy / "config.yaml").write_text("a: b")
    collect(sweep)
    status.main([str(sweep)])
    status.main([str(sweep), "--check"])
    report([str(sweep), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert r"bad\x1b[2J" in captured.out
    assert not {"\x1b", "\x07", "\u202e"} & set(captured.out + captured.err)
    assert CLEAR not in (sweep / "results.csv").read_text()


STRANGE: dict[str, dict[str, Any]] = {
    "bracket": {"upload": "[x"},
    "dollar": {"upload": "$x_{", "data": {"name": "$\\frac{"}},
    "empty": {"upload": "", "compression": {"name": ""}},
    "infinite": {"lr": float("inf"), "proximal_mu": float("-inf")},
    "nan": {"lr": float("nan")},
    "huge": {"num_clients": 1e300, "rounds": 1e300, "seed": 1e300},
    "text": {"num_clients": "many", "seed": "one", "rounds": "'; rm -rf x; '"},
    "list": {"num_clients": [1], "rounds": {"x": []}, "seed": None},
    "markup": {"upload": "[red]<script>alert(1)</script>[/red]"},
}


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("rounds.csv", b"uplink_message_bytes", b"", "column without a name more than once"),
        ("rounds.csv", b"perplexity", b"loss", "column loss more than once"),
        ("timing.csv", b"\n0,", b"\n,", "round lacks a value in some rows"),
    ],
)
def test_tables_that_lack_names_or_numbers_are_damaged(
    sweep: Path, run: Path, name: str, old: bytes, new: bytes, words: str
) -> None:
    text = (run / name).read_bytes()
    assert old in text
    changed = text.replace(old, new)
    if not new:
        changed = changed.replace(b"downlink_message_bytes", b"")
    (run / name).write_bytes(changed)
    seal(run)
    records = load_records(sweep)
    assert any(words in note for note in records.notes), records.notes
    [status] = records.results.loc[records.results["run_id"] == run.name, "status"]
    assert status == "missing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_settings_stop_neither_report_nor_status(
    sweep: Path, run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    science = yaml.safe_load((run / "config.yaml").read_text())
    science |= {
        key: own | value if isinstance(own := science[key], dict) else value
        for key, value in STRANGE[kind].items()
    }
    strange = rename(run, science, json.loads((run / "status.json").read_text())["numerics"])
    assert report([str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text()
    for table in (True, False):
        if not table:
            (sweep / "results.csv").unlink()
        capsys.readouterr()
        assert status.main([str(sweep)]) == 0
        assert strange.name in capsys.readouterr().out
        collect(sweep)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": "x", "host": 3}', '{"pid": 1e300}', "9" * 5000]
)
def test_a_damaged_running_file_or_timing_breaks_no_status(
    sweep: Path, run: Path, text: str
) -> None:
    (run / "running.json").write_text(text)
    assert read_running(run) is None
    (run / "timing.csv").write_text(text)
    (run / "timing.csv").write_text("round,round_seconds\nx,y\n")
    seal(run)
    for folder in sweep.iterdir():
        if folder.is_dir() and folder != run:
            own = {"pid": os.getpid(), "host": os.uname().nodename, "started": 0, "rounds": 2}
            (folder / "running.json").write_text(json.dumps({**own, "round": 1, "loss": 1.0}))
    assert len(sweep_status(sweep)[0]) == 4


def test_the_limits_are_those_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(DamagedError, match="has 5 bytes, at most 4 are read"):
        read_file(path, 4)
    assert set(files.LIMITS) == {
        "config.yaml", "status.json", "rounds.csv", "parts.csv", "timing.csv", "messages.parquet"
    }  # fmt: skip
