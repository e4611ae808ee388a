"""What is held out of a corpus, before anything is known about clients."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.tokens import Tokens, windows
from fedbw_sweep.errors import ConfigError


def mark_heldout(corpus: pd.DataFrame, fraction: float) -> NDArray[np.bool_]:
    """Mark records as held out: by position alone, nothing is drawn."""
    if corpus["client"].isna().all():
        mask = np.zeros(len(corpus), bool)
        count = max(1, round(len(corpus) * fraction))
        mask[((np.arange(count) + 0.5) * len(corpus) / count).astype(np.int64)] = True
        return mask
    # Records whose middle lies in the last `fraction` of a client's characters; never its first.
    size = corpus["text"].str.len()
    of_client = size.groupby(corpus["client"], dropna=False)
    start = of_client.cumsum() - size
    late = start + size / 2 >= (1 - fraction) * of_client.transform("sum")
    return np.asarray(late & (start > 0), bool)


def heldout_set(cfg: DataConfig, tokens: Tokens, sequence_length: int) -> Tokens:
    """Take evenly spaced windows of the held-out text: some of every part of the corpus."""
    available = windows(tokens, sequence_length)
    if not len(available):
        raise ConfigError(
            "data.heldout_fraction",
            cfg.heldout_fraction,
            f"the held-out text has {len(tokens)} tokens, fewer than the {sequence_length + 1} of "
            "one window; raise it or lower sequence_length",
        )
    count = min(max(1, cfg.heldout_tokens // sequence_length), len(available))
    return available[((np.arange(count) + 0.5) * len(available) / count).astype(np.int64)]
