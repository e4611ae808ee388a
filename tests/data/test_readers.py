"""Files and data sets are read as the records that they hold, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.federate import federate
from fedbw_sweep.errors import ConfigError
from tests.conftest import ROOT
from tests.data.texts import LENGTH, config, text_config, to_bytes

TEXTS = ["Grüße, 世界 🌍", "NA", "007", "two\nlines", "true", "2020-01-01"] * 5

Write = Callable[[pd.DataFrame, Path], Any]


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".csv", lambda frame, path: frame.to_csv(path, index=False)),
        (".jsonl", lambda frame, path: frame.to_json(path, orient="records", lines=True)),
        (".parquet", lambda frame, path: frame.to_parquet(path)),
        (".PARQUET", lambda frame, path: frame.to_parquet(path)),
    ],
)
def test_every_kind_of_table_gives_the_same_records(
    tmp_path: Path, suffix: str, write: Write
) -> None:
    path = tmp_path / f"texts{suffix}"
    frame = pd.DataFrame({"said": [*TEXTS, "  ", None], "who": [*"abc" * 10, "d", "d"], "x": 1.5})
    write(frame, path)
    corpus = load_corpus(text_config(path, text_column="said", client_column="who"))
    assert corpus["text"].tolist() == TEXTS
    assert corpus["client"].tolist() == list("abc" * 10)
    assert corpus["label"].isna().all()


def test_text_that_looks_like_numbers_or_dates_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "007", "who": "2020-01-01"}\n' * 20)
    corpus = load_corpus(text_config(path, client_column="who"))
    assert corpus.loc[0, ["text", "client"]].tolist() == ["007", "2020-01-01"]


def test_a_text_file_is_paragraphs_or_else_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\nstill one\r\n\r\n \ntwo\n\n\n".encode())
    assert load_corpus(text_config(path))["text"].tolist() == ["one\nstill one", "two"]
    path = tmp_path / "b.txt"
    path.write_text("\none\ntwo\nthrée\n", "utf-8")
    assert load_corpus(text_config(path))["text"].tolist() == ["one", "two", "thrée"]


GOOD_CSV = "text,who,n\n" + "some text,me,1\n" * 20


@pytest.mark.parametrize(
    ("file", "content", "changes", "message"),
    [
        ("a.txt", None, {}, r"data\.path=.*a\.txt: no such file; give a \.txt, \.jsonl, "),
        ("a.txt", None, {"path": None}, r"data\.path=None: no such file"),
        ("a.txt", b"", {}, r"data\.path=.*: is empty"),
        ("a.txt", b" \n\n\t\n", {}, r"data\.path=.*: has no text"),
        ("a.txt", b"\xff\xfe\x00", {}, r"data\.path=.*: cannot be read as \.txt: .*utf-8"),
        ("a.txt", b"a\nb", {"text_column": "x"}, r"data\.text_column=x: .* there are: text"),
        ("a.txt", b"just one", {}, r"data\.heldout_fraction=0\.1: leaves one side"),
        ("a.doc", b"x", {}, r"data\.path=.*: unknown kind of file; give a \.txt, "),
        ("a.parquet", b"PAR1 is not enough", {}, r"data\.path=.*: cannot be read as \.parquet: "),
        ("a.jsonl", b'{"text": "a"}\n{"te', {}, r"data\.path=.*: cannot be read as \.jsonl: "),
        ("a.jsonl", b"1\n2", {}, r"data\.text_column=text: no such column; there are: 0"),
        ("a.jsonl", b'{"text": 3}\n{"text": 4}', {}, r"data\.text_column=text: must hold text"),
        ("a.jsonl", b'{"text": null}', {}, r"data\.path=.*: has no text"),
        ("a.csv", b'text\n"open', {}, r"data\.path=.*: cannot be read as \.csv: "),
        ("a.csv", b"text\n\xff\n", {}, r"data\.path=.*: cannot be read as \.csv: .*utf-8"),
        ("a.csv", b"\n\n", {}, r"data\.path=.*: cannot be read as \.csv: No columns"),
        ("a.csv", b"text,who\n", {}, r"data\.path=.*: has no text"),
        ("a.csv", GOOD_CSV, {"client_column": "x"}, r"data\.client_column=x: .*: text, who, n$"),
        ("a.csv", GOOD_CSV, {"label_column": "x"}, r"data\.label_column=x: no such column"),
        ("a.csv", GOOD_CSV, {"partition": "natural"}, r"data\.partition=natural: .*client_column"),
        ("a.csv", GOOD_CSV, {"partition": "dirichlet"}, r"data\.label_column=None: dirichlet need"),
        (
            "a.csv",
            GOOD_CSV,
            {"partition": "natural", "client_column": "who"},
            r"num_clients=2: at most 0: .*data\.min_characters=2000 characters, of 1;",
        ),
        (
            "a.csv",
            GOOD_CSV,
            {"partition": "dirichlet", "label_column": "who", "alpha": 1e-9},
            # Two windows of 17 tokens, in records of (9 + 1 + 9) / 2 held-out tokens: 4 records.
            r"data\.alpha=1e-09: no draw gave each of 2 clients 4 records; raise it or",
        ),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, file: str, content: bytes | str | None, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"^{message}"):
        federate(text_config(path, **changes), 2, LENGTH, 1, to_bytes)


def test_a_folder_is_not_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=.*: is not a file"):
        load_corpus(text_config(tmp_path))


@pytest.fixture
def hub_folder(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", rows.parent / "cache")
    folder = rows.parent / "dataset" / "data"
    folder.mkdir(parents=True)
    rows.rename(folder / "train-00000-of-00001.parquet")
    return folder.parent


def test_a_hub_data_set(hub_folder: Path) -> None:
    cfg = text_config(hub_folder, name="hub", client_column="who", label_column="topic")
    corpus = load_corpus(cfg)
    assert len(corpus) == 300
    assert corpus.loc[7, ["text", "client", "label"]].tolist() == [
        "record 007 says häß ☃",
        "person 2",
        "topic 1",
    ]
    assert len(load_corpus(cfg.model_copy(update={"split": "train[:10%]"}))) == 30
    for changes, message in (
        ({"split": "nope"}, r"data\.path=.*nope.*check .*data\.split"),
        ({"subset": "nope"}, r"data\.path=.*nope.*check .*data\.subset"),
        ({"text_column": "x", "client_column": None, "label_column": None}, r"there are: text, wh"),
        ({"client_column": "x"}, r"data\.client_column=x: no such column"),
        ({"path": None}, r"data\.path=None: give a data set's name"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_corpus(cfg.model_copy(update=changes))


@pytest.mark.slow
def test_an_unreachable_hub_says_so_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, datasets\n"
        "from fedbw_sweep.data.corpora import ConfigError, DataConfig, load_corpus\n"
        "cfg, start = DataConfig.model_validate_json(sys.argv[1]), time.perf_counter()\n"
        "try: load_corpus(cfg)\n"
        "except ConfigError as error: print(time.perf_counter() - start, error)"
    )
    # Not the suite's offline mode; nothing listens at port 9 of this machine.
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    cfg = config(name="hub", path="stanfordnlp/imdb")
    done = subprocess.run(
        [sys.executable, "-c", code, cfg.model_dump_json()],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 10
    assert message.startswith("data.path=stanfordnlp/imdb: cannot be loaded (")
    assert "connect to the hub" in message
    assert "data=text" in message


def test_offline_mode_does_not_ask_the_hub() -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=r"data\.path=stanfordnlp/imdb: cannot be loaded"):
        load_corpus(config(name="hub", path="stanfordnlp/imdb"))
    assert time.perf_counter() - start < 10
