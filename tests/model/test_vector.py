"""A model's arrays as one vector and exact bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from tests.model.models import tiny


def test_tied_weights_travel_once(tmp_path: Path) -> None:
    hidden, layers, positions = 8, 2, 16
    GPT2Config(
        vocab_size=300, n_embd=hidden, n_layer=layers, n_head=2, n_positions=positions
    ).save_pretrained(tmp_path)
    model = build_model(tiny(name_or_path=str(tmp_path), architecture=None), seed=0)
    block = 12 * hidden * hidden + 13 * hidden
    expected = (300 + positions) * hidden + layers * block + 2 * hidden
    layout = layout_of(model)
    assert layout.size == expected
    vector, exact = read_arrays(model)
    write_arrays(model, vector + 1, exact)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)  # type: ignore[union-attr]


class Buffered(nn.Module):
    """Persistent integer, boolean and float buffers, one that is not persistent, a frozen array."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("steps", torch.tensor([7, -1], dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("mean", torch.full((2,), 0.5))
        self.register_buffer("cache", torch.zeros(100), persistent=False)


def test_integer_buffers_travel_as_they_are() -> None:
    model = Buffered()
    layout = layout_of(model)
    assert [t.name for t in layout.tensors] == ["weight", "steps", "mask", "mean"]
    assert (layout.size, layout.exact_bytes, layout.dense_bytes) == (8, 19, 51)
    vector, exact = read_arrays(model)
    np.testing.assert_array_equal(vector, np.array([0, 1, 2, 3, 4, 5, 0.5, 0.5], np.float32))
    other = Buffered()
    with torch.no_grad():
        for array in other.state_dict().values():
            array.zero_()
    write_arrays(other, vector, exact)
    for name, array in model.state_dict().items():
        assert name == "frozen" or torch.equal(other.state_dict()[name], array), name
