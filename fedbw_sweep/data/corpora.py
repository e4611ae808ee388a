"""The configured corpus: read once, with its held-out records marked."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd
from hydra.utils import get_method

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.heldout import mark_heldout
from fedbw_sweep.errors import ConfigError


def load_corpus(cfg: DataConfig) -> pd.DataFrame:
    """Read the configured corpus and mark what is held out.

    The last one is kept, since every run of a sweep asks for it: treat it as read-only. A file
    that was edited is another corpus where `cfg` names its content.

    Parameters
    ----------
    cfg : DataConfig
        Corpus and `heldout_fraction`.

    Returns
    -------
    DataFrame
        A row per record, in corpus order: ``text`` (str), ``client`` and ``label`` (str, missing
        where the corpus says nothing), ``heldout`` (bool).

    Raises
    ------
    ConfigError
        If there is no such corpus, it cannot be read, or it has no text.
    """
    # The same corpus for every partition of it.
    partition = {
        "partition": "iid",
        "alpha": 1.0,
        "min_characters": 0,
        "pooled": 1,
        "heldout_tokens": 1,
    }
    return _load_corpus(cfg.model_copy(update=partition))


@lru_cache(maxsize=1)
def _load_corpus(cfg: DataConfig) -> pd.DataFrame:
    try:
        read = get_method(cfg.target)
    except (ImportError, ValueError) as error:
        raise ConfigError("data._target_", cfg.target, str(error)) from None
    corpus = read(cfg)
    if not isinstance(corpus, pd.DataFrame) or not {"text", "client", "label"} <= set(corpus):
        wanted = "must return a DataFrame with the columns text, client and label"
        raise ConfigError("data._target_", cfg.target, wanted)
    corpus = corpus[corpus["text"].str.strip() != ""].reset_index(drop=True)
    if corpus.empty:
        raise ConfigError("data.path", cfg.path, "has no text; every record is blank")
    corpus["heldout"] = mark_heldout(corpus, cfg.heldout_fraction)
    if not corpus["heldout"].any() or corpus["heldout"].all():
        raise ConfigError(
            "data.heldout_fraction",
            cfg.heldout_fraction,
            f"leaves one side of the split of {len(corpus)} whole records empty; "
            "change it, give more and shorter records, or leave out data.client_column",
        )
    return corpus
