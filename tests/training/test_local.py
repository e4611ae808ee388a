"""A client's local steps against plain PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedbw_sweep.errors import DivergenceError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.vector import read_arrays, write_arrays
from fedbw_sweep.training.local import train
from tests.model.models import sequences, tiny


def plain_steps(model: nn.Module, batches: list[torch.Tensor], lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for batch in batches:
        logits = model(batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("epochs", "steps", "taken"), [(1, None, 3), (2, None, 6), (0, None, 0), (1, 2, 2), (0, 7, 7)]
)
def test_local_steps_replace_epochs(epochs: int, steps: int | None, taken: int) -> None:
    model = build_model(tiny(), seed=0)
    before, _ = read_arrays(model)
    done = train(
        model,
        sequences(5),
        epochs=epochs,
        steps=steps,
        batch_size=2,
        lr=1e-3,
        rng=np.random.default_rng(1),
    )
    after, _ = read_arrays(model)
    assert done.steps == taken
    assert math.isnan(done.loss) == (taken == 0)
    assert np.array_equal(before, after) == (taken == 0)


def test_training_is_plain_adamw_over_a_random_order() -> None:
    windows = sequences(6)
    ours, plain = build_model(tiny(), seed=0), build_model(tiny(), seed=0)
    train(ours, windows, epochs=1, steps=None, batch_size=3, lr=1e-2, rng=np.random.default_rng(4))
    rng = np.random.default_rng(4)
    rng.integers(2**63)
    order = rng.permutation(6)
    batches = [torch.from_numpy(windows[order[i : i + 3]].astype(np.int64)) for i in (0, 3)]
    plain_steps(plain, batches, lr=1e-2)
    np.testing.assert_allclose(read_arrays(ours)[0], read_arrays(plain)[0], rtol=1e-4, atol=1e-5)


def test_divergence_is_an_error() -> None:
    model = build_model(tiny(), seed=0)
    vector, exact = read_arrays(model)
    write_arrays(model, np.full_like(vector, np.nan), exact)
    with pytest.raises(DivergenceError, match="loss is nan after 0 steps"):
        train(
            model,
            sequences(2),
            epochs=1,
            steps=None,
            batch_size=2,
            lr=1e-3,
            rng=np.random.default_rng(0),
        )
