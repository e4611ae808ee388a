"""What the bench makes of a codec's answers."""

from __future__ import annotations

import numpy as np
import pytest

from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.bench.measures import error, measure
from fedbw_sweep.testing import layout_of


@pytest.mark.parametrize("clients", [5, 8, 20])
def test_the_error_of_means_is_that_of_cohorts_and_of_all(clients: int) -> None:
    layout, rng = layout_of((30,)), np.random.default_rng(4)
    updates = [rng.standard_normal(30).astype(np.float32) for _ in range(clients)]
    halves = [update.astype(np.float16) for update in updates]
    codec = Codec(
        "half",
        lambda update, _: update.astype(np.float16).tobytes(),
        lambda payload: np.frombuffer(payload, np.float16).astype(np.float32),
    )
    [row] = measure(layout, updates, [codec], seed=0, repeats=1).to_dict("records")
    assert row["mean_nmse"] == pytest.approx(
        error(np.mean(halves, axis=0, dtype=float), np.mean(updates, axis=0, dtype=float))
    )
    if clients > 8:
        of_eight = [
            error(np.mean(halves[at : at + 8], axis=0, dtype=float),
                  np.mean(updates[at : at + 8], axis=0, dtype=float))
            for at in (0, 8)
        ]  # fmt: skip
        assert row["mean_nmse_8"] == pytest.approx(np.median(of_eight))
    else:
        assert row["mean_nmse_8"] is None or np.isnan(row["mean_nmse_8"])
