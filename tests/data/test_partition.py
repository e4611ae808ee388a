"""Who holds which records."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.federate import federate
from fedbw_sweep.errors import ConfigError
from tests.conftest import ROOT
from tests.data.texts import LENGTH, config, decoded, lines_of, text_config, to_bytes


@pytest.mark.slow
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


@pytest.mark.slow
def test_another_process_makes_the_same_text(rows: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.data.test_partition import digest;"
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


def test_records_of_nobody_are_no_client(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,who\n" + "some text,1\nsome text,\n" * 20)
    cfg = text_config(path, partition="natural", client_column="who", min_characters=0)
    assert federate(cfg, 1, LENGTH, 1, to_bytes).client_names == ("1",)
    with pytest.raises(ConfigError, match=r"num_clients=2: at most 1: "):
        federate(cfg, 2, LENGTH, 1, to_bytes)


def test_windows_longer_than_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join("four" for _ in range(40)))  # 36 x 5 - 1 training tokens, 4 x 5 - 1
    with pytest.raises(ConfigError, match=r"^num_clients=37: at most 9: .* 36 training records"):
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


def test_pooled_clients_hold_what_each_holds_alone() -> None:
    """Of seven speakers pooled by threes, six are in two clients; one client may hold them all."""
    alone = federate(config(), 7, LENGTH, 1, to_bytes)
    pooled = federate(config(pooled=3), 2, LENGTH, 1, to_bytes)
    for at, tokens in enumerate(pooled.clients):
        each = alone.clients[3 * at : 3 * at + 3]
        assert Counter(lines_of(tokens)) == sum((Counter(lines_of(t)) for t in each), Counter())
    assert pooled.client_names == tuple(f"{alone.client_names[at]} and 2 more" for at in (0, 3))
    whole = federate(config(pooled=7), 1, LENGTH, 1, to_bytes)
    each = [Counter(lines_of(tokens)) for tokens in alone.clients]
    assert Counter(lines_of(whole.clients[0])) == sum(each, Counter())
    assert np.array_equal(whole.heldout, alone.heldout)


def test_more_pools_than_there_are_name_the_largest_number() -> None:
    message = r"^num_clients=152: at most 151: 455 are .*=2000 char.*, data\.pooled=3 of them"
    with pytest.raises(ConfigError, match=message):
        federate(config(pooled=3), 152, LENGTH, 1, to_bytes)


def test_only_natural_clients_are_pooled() -> None:
    with pytest.raises(ConfigError, match=r"data\.pooled=2: must be 1 but with partition=natural"):
        config(partition="iid", pooled=2)
