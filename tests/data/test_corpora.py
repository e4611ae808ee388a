"""The corpora that there are, counted by other means."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.errors import ConfigError
from tests.data.texts import config


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


def test_conf_data_choices(run_config: Callable[..., RunConfig]) -> None:
    assert run_config("data=shakespeare").data.partition == "natural"
    for name in ("text", "hub"):
        data = run_config(f"data={name}", "data.path=x").data
        assert (data.name, data.path, data.partition) == (name, "x", "iid")
        with pytest.raises(ConfigError, match=r"^data\.path=\?\?\?: a value must be given"):
            run_config(f"data={name}")
