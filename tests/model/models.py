"""A tiny model, its size by hand, and sequences to train it on."""

from __future__ import annotations

import numpy as np

from fedbw_sweep.config.groups import ModelConfig

TINY = {
    "model_type": "gpt_neox",
    "vocab_size": 256,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def tiny(**changes: object) -> ModelConfig:
    values = {"name": "t", "weights": "random", "name_or_path": None, "architecture": TINY}
    return ModelConfig.model_validate({**values, **changes})


def neox_parameters(vocabulary: int, hidden: int, layers: int, intermediate: int) -> int:
    """GPT-NeoX by hand: two embeddings, and in each block attention, MLP and two norms."""
    attention = hidden * 3 * hidden + 3 * hidden + hidden * hidden + hidden
    mlp = hidden * intermediate + intermediate + intermediate * hidden + hidden
    return 2 * vocabulary * hidden + layers * (attention + mlp + 4 * hidden) + 2 * hidden


def sequences(count: int, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, length + 1)).astype(np.int32)
