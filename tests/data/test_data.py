from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.federate import federate
from fedbw_sweep.data.plays import parse_play
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.errors import ConfigError
from tests.conftest import ROOT

LENGTH = 16


def config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "name": "shakespeare",
        "partition": "natural",
        "alpha": 0.5,
        "min_characters": 2000,
        "heldout_fraction": 0.1,
        "heldout_tokens": 1024,
    }
    return DataConfig(**{**values, **changes})


def text_config(file: Path, **changes: Any) -> DataConfig:
    return config(**{"name": "text", "path": str(file), "partition": "iid", **changes})


def to_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def decoded(tokens: NDArray[np.int32]) -> str:
    return bytes(tokens.astype(np.uint8)).decode()


def lines_of(tokens: NDArray[np.int32]) -> list[str]:
    return decoded(tokens).split("\n")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """300 one-line records, each unique, of 5 people and 3 topics."""
    frame = pd.DataFrame(
        {
            "text": [f"record {i:03d} says häß ☃" for i in range(300)],
            "who": [f"person {i % 5}" for i in range(300)],
            "topic": [f"topic {i % 3}" for i in range(300)],
        }
    )
    path = tmp_path / "rows.parquet"
    frame.to_parquet(path)
    return path


# --- Shakespeare --------------------------------------------------------------------------------

PLAY = """\
# A Play

## ACT I

### SCENE I. A street with
a lamp.

_Enter ANNE and
BOB_

**ANNE**  
Good morrow,  
_[Aside]_  
and good-bye,'\\--says he.

_Exit BOB_

Still here.

**BOB**  
__\\[Within]_  
[To ANNE]_  
Ay. _He sighs_ Me!

**ANNE**  
*[Reads
aloud.]*  

### SCENE II. Elsewhere

Nobody says this.

**First Lord: & c.**  
Last words
"""  # noqa: W291


def test_a_small_play_by_hand() -> None:
    assert parse_play(PLAY) == [
        ("ANNE", "Good morrow,\nand good-bye,'--says he.\nStill here."),
        ("BOB", "Ay.  Me!"),
        ("First Lord: & c.", "Last words"),
    ]
    assert parse_play("") == parse_play("# Title\nprose") == []


def test_shakespeare_is_all_there() -> None:
    corpus = load_corpus(config())
    # Speeches: `cat plays/*/*.md | grep -c '^\*\*'`. Characters: a line-by-line awk count.
    assert len(corpus) == 31_354
    assert corpus["client"].nunique() == 1_426
    assert corpus["label"].nunique() == 38
    assert corpus["text"].str.len().sum() == 4_388_224
    assert not corpus["text"].str.contains(r"[_\\*#\[\]]|  $|^\s|\n\n", regex=True).any()
    first = corpus[corpus["label"] == "hamlet"].iloc[0]
    assert (first["text"], first["client"]) == ("Who's there?", "hamlet/BERNARDO")
    sizes = corpus["text"].str.len().groupby(corpus["client"]).sum()
    assert [(sizes >= least).sum() for least in (500, 2_000, 10_000)] == [
        843,
        455,
        135,
    ]  # as in conf/data
    heldout = corpus["text"][corpus["heldout"]].str.len().sum()
    # Speakers of fewer than five speeches mostly keep theirs.
    assert 0.09 < heldout / sizes.sum() < 0.1


def test_more_clients_than_speakers_names_the_largest_number() -> None:
    with pytest.raises(ConfigError, match=r"^num_clients=456: at most 455: .*=2000 char.*1426"):
        federate(config(), 456, LENGTH, 1, to_bytes)
    assert len(federate(config(min_characters=10_000), 135, LENGTH, 1, to_bytes).clients) == 135


def test_natural_clients_are_the_same_speakers_for_any_number_seed_and_threshold() -> None:
    few = federate(config(), 3, LENGTH, 1, to_bytes)
    many = federate(config(), 8, LENGTH, 2, to_bytes)
    assert many.client_names[:3] == few.client_names
    for one, other in zip(few.clients, many.clients, strict=False):
        np.testing.assert_array_equal(one, other)
    strict = federate(config(min_characters=5_000), 8, LENGTH, 1, to_bytes).client_names
    all_names = federate(config(), 60, LENGTH, 1, to_bytes).client_names
    assert strict == tuple(name for name in all_names if name in strict)[:8]


def test_a_natural_client_holds_all_its_speaker_says_but_the_end() -> None:
    corpus = load_corpus(config())
    text = federate(config(), 2, LENGTH, 1, to_bytes)
    for name, tokens in zip(text.client_names, text.clients, strict=True):
        speeches = corpus[corpus["client"] == name]
        kept = decoded(tokens)
        assert "\n".join(speeches["text"]).startswith(kept + "\n")
        spoken = speeches["text"].str.len().to_numpy()
        kept_speeches = int((~speeches["heldout"]).sum())
        # To the nearest whole speech.
        off = spoken[kept_speeches:].sum() - 0.1 * spoken.sum()
        assert -spoken[kept_speeches - 1] / 2 <= off <= spoken[kept_speeches] / 2


# --- Split and partitions -----------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet"])
@pytest.mark.parametrize("clients", [2, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_record_is_in_one_place(rows: Path, partition: str, clients: int, seed: int) -> None:
    cfg = text_config(
        rows,
        partition=partition,
        client_column="who",
        label_column="topic",
        min_characters=0,
        heldout_tokens=10**6,
    )
    text = federate(cfg, clients, LENGTH, seed, to_bytes)
    held = federate(cfg.model_copy(update={"partition": "iid"}), 3, LENGTH, 7, to_bytes).heldout
    np.testing.assert_array_equal(text.heldout, held)

    trained = Counter(line for tokens in text.clients for line in lines_of(tokens))
    corpus = load_corpus(cfg)
    heldout = set(corpus["text"][corpus["heldout"]])
    assert len(heldout) == 30
    assert max(trained.values()) == 1
    assert trained.keys().isdisjoint(heldout)
    if clients == 5 or partition != "natural":
        assert trained.keys() | heldout == set(corpus["text"])
    else:
        assert len(trained) == 2 * 54
    for tokens in text.clients:  # in corpus order
        assert lines_of(tokens) == sorted(lines_of(tokens))


def test_iid_shares_are_equal_and_drawn_at_random(rows: Path) -> None:
    clients = federate(text_config(rows), 4, LENGTH, 1, to_bytes).clients
    sizes = [len(lines_of(tokens)) for tokens in clients]
    assert sum(sizes) == 270
    assert max(sizes) - min(sizes) <= 1
    assert len(set(np.diff([int(line[7:10]) for line in lines_of(clients[0])]))) > 2


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_seed_alone_draws_the_partition(rows: Path, partition: str) -> None:
    cfg = text_config(rows, partition=partition, label_column="topic")
    one, again, other = (
        [tokens.tobytes() for tokens in federate(cfg, 4, LENGTH, seed, to_bytes).clients]
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_alpha_sets_how_uneven_dirichlet_is(rows: Path) -> None:
    topic = dict(pd.read_parquet(rows)[["text", "topic"]].to_numpy())

    def largest_share(alpha: float) -> float:
        cfg = text_config(rows, partition="dirichlet", label_column="topic", alpha=alpha)
        counts = [
            Counter(topic[line] for line in lines_of(tokens))
            for tokens in federate(cfg, 3, LENGTH, 1, to_bytes).clients
        ]
        return float(np.mean([max(c.values()) / c.total() for c in counts]))

    assert largest_share(1e4) < 0.4 < 0.6 < largest_share(0.1)


def test_natural_held_out_text_is_the_end_of_each_client(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,who\n" + "".join(f"{i:04d},{'ab'[i % 2]}\n" for i in range(40)))
    cfg = text_config(path, client_column="who", heldout_fraction=0.25)
    corpus = load_corpus(cfg)
    assert corpus["text"][corpus["heldout"]].tolist() == [f"{i:04d}" for i in range(30, 40)]
    cfg = text_config(path, heldout_fraction=0.25)  # nobody's: evenly spaced
    corpus = load_corpus(cfg)
    assert corpus.index[corpus["heldout"]].tolist() == list(range(2, 40, 4))


def test_a_client_of_one_record_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,who\none record,a\nother,b\nother,b\n")
    corpus = load_corpus(text_config(path, client_column="who", heldout_fraction=0.6))
    assert corpus["heldout"].tolist() == [False, False, True]


def test_the_held_out_set_is_evenly_spaced_windows_of_the_held_out_text(rows: Path) -> None:
    corpus = load_corpus(text_config(rows))
    stream = to_bytes("\n".join(corpus["text"][corpus["heldout"]]))
    text = federate(text_config(rows, heldout_tokens=5 * LENGTH), 2, LENGTH, 1, to_bytes)
    available = (len(stream) - 1) // LENGTH
    starts = [int((i + 0.5) * available / 5) * LENGTH for i in range(5)]
    expected = np.stack([stream[s : s + LENGTH + 1] for s in starts])
    np.testing.assert_array_equal(text.heldout, expected)
    assert text.heldout.dtype == np.int32
    assert text.heldout_tokens_per_byte == 1


def test_tokens_per_byte_counts_utf8_bytes(rows: Path) -> None:
    def characters(text: str) -> list[int]:
        return [ord(character) for character in text]

    text = federate(text_config(rows), 2, LENGTH, 1, characters)
    # "record 000 says häß ☃" and a newline: 22 characters, 26 bytes; no newline after the last.
    assert text.heldout_tokens_per_byte == (30 * 22 - 1) / (30 * 26 - 1)
    assert max(tokens.max() for tokens in text.clients) == ord("☃")


@pytest.mark.slow
def test_another_process_makes_the_same_text(rows: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.data.test_data import digest;"
        "print(digest(Path(sys.argv[1]))); assert not {'torch', 'ray', 'flwr'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(rows)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (digest(rows), "")


def digest(rows: Path) -> str:
    """A hash of natural Shakespeare and of `rows` partitioned in all three ways."""
    table = {"client_column": "who", "label_column": "topic", "min_characters": 0}
    ways = [text_config(rows, partition=p, **table) for p in ("natural", "iid", "dirichlet")]
    sums = hashlib.sha256()
    for cfg in (config(), *ways):
        text = federate(cfg, 4, LENGTH, 3, to_bytes)
        for array in (*text.clients, text.heldout):
            sums.update(np.ascontiguousarray(array).tobytes())
        sums.update(repr(text.client_names).encode())
    return sums.hexdigest()


@given(n=st.integers(0, 200), length=st.integers(1, 70))
def test_windows_predict_every_token_but_the_first_once(n: int, length: int) -> None:
    tokens = np.arange(n, dtype=np.int32)
    cut = windows(tokens, length)
    count = max(0, (n - 1) // length)
    assert cut.shape == (count, length + 1)
    assert cut.dtype == np.int32
    np.testing.assert_array_equal(cut[:, 1:].ravel(), np.arange(1, 1 + count * length))
    np.testing.assert_array_equal(cut[:, :-1].ravel(), np.arange(count * length))


# --- Files --------------------------------------------------------------------------------------

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


def test_records_of_nobody_are_no_client(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,who\n" + "some text,1\nsome text,\n" * 20)
    cfg = text_config(path, partition="natural", client_column="who", min_characters=0)
    assert federate(cfg, 1, LENGTH, 1, to_bytes).client_names == ("1",)
    with pytest.raises(ConfigError, match=r"num_clients=2: at most 1: "):
        federate(cfg, 2, LENGTH, 1, to_bytes)


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


def test_windows_longer_than_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join("four" for _ in range(40)))  # 36 x 5 - 1 training tokens, 4 x 5 - 1
    with pytest.raises(ConfigError, match=r"^num_clients=37: at most 36: the training records"):
        federate(text_config(path), 37, LENGTH, 1, to_bytes)
    # Shards of 3 or 4 records hold 14 or 19 tokens; a window takes 17.
    with pytest.raises(ConfigError, match=r"^num_clients=10: at most 9: client \d gets 14 .* 17 "):
        federate(text_config(path), 10, LENGTH, 1, to_bytes)
    assert len(federate(text_config(path), 9, LENGTH, 1, to_bytes).clients) == 9
    with pytest.raises(ConfigError, match=r"^data\.heldout_fraction=0\.1: .* has 19 tokens, .* 20"):
        federate(text_config(path), 1, 19, 1, to_bytes)

    path = tmp_path / "b.csv"
    path.write_text("text,who\n" + "long enough,a\n" * 20 + "no,b\n" * 5 + "long enough,c\n" * 20)
    cfg = text_config(path, partition="natural", client_column="who", min_characters=0)
    federate(cfg.model_copy(update={"min_characters": 20}), 2, LENGTH, 1, to_bytes)
    # Of b's five records the last is held out: 4 x 3 - 1 tokens are left.
    with pytest.raises(ConfigError, match=r"^num_clients=3: at most [012]: client b gets 11 train"):
        federate(cfg, 3, LENGTH, 1, to_bytes)


# --- Hub ----------------------------------------------------------------------------------------


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


# --- conf/data ----------------------------------------------------------------------------------


def test_conf_data_choices(run_config: Callable[..., RunConfig]) -> None:
    assert run_config("data=shakespeare").data.partition == "natural"
    for name in ("text", "hub"):
        data = run_config(f"data={name}", "data.path=x").data
        assert (data.name, data.path, data.partition) == (name, "x", "iid")
        with pytest.raises(ConfigError, match=r"^data\.path=\?\?\?: a value must be given"):
            run_config(f"data={name}")
