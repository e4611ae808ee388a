"""The held-out loss against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedbw_sweep.model.build import build_model
from fedbw_sweep.training.evaluation import heldout_loss
from tests.model.models import sequences, tiny


def test_heldout_loss_is_transformers_own_loss() -> None:
    model, windows = build_model(tiny(), seed=0), sequences(300, length=16)
    batch = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert heldout_loss(model, windows) == pytest.approx(expected, rel=1e-5)
    assert heldout_loss(model, windows) == heldout_loss(model, windows)
