"""The corpora that there are, counted by other means."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.errors import ConfigError
from tests.data.texts import config


@pytest.mark.slow
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


def own(cfg: DataConfig) -> pd.DataFrame:
    lines = [f"{cfg.text_column} {number}" for number in range(20)]
    return pd.DataFrame({"text": lines, "client": None, "label": None})


def no_table(cfg: DataConfig) -> list[str]:
    return ["text"]


OWN = "data=text", "data.path=null"


def test_a_text_of_the_users_own_is_read_by_its_function(
    run_config: Callable[..., RunConfig],
) -> None:
    config = run_config(*OWN, f"data._target_={__name__}.own")
    assert load_corpus(config.data)["text"].tolist()[:2] == ["text 0", "text 1"]
    assert config.science["data"]["_target_"] == f"{__name__}.own"
    assert with_contents(config).data.content is None
    other = run_config(*OWN, f"data._target_={__name__}.no_table")
    assert config.run_id != other.run_id
    for target, words in ((f"{__name__}.no_table", "must return a DataFrame"), ("no.such", "no")):
        with pytest.raises(ConfigError, match=rf"data\._target_={target}: .*{words}"):
            load_corpus(run_config(*OWN, f"data._target_={target}").data)
