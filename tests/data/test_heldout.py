"""Which text is held out, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.federate import federate
from tests.data.texts import LENGTH, text_config, to_bytes


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
