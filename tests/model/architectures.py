"""Three small architectures, and models of them of which a part trains."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import TypeAdapter

from fedbw_sweep.config.groups import ModelConfig, TrainableConfig
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.training.local import train

V, H, L, F, P, K, R = 256, 8, 3, 20, 32, 4, 2
"""Tokens, features, blocks, MLP's features, positions, keys' features; the adapters' rank."""

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": P,
}

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_embd": H,
    "n_layer": L,
    "n_head": 2,
    "n_inner": F,
    "n_positions": P,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}

LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": F,
    "max_position_embeddings": P,
    "tie_word_embeddings": True,
}


def choice(name: str, **parameters: object) -> TrainableConfig:
    return TypeAdapter(TrainableConfig).validate_python({"name": name, **parameters})


def model_of(architecture: dict[str, object], trainable: TrainableConfig, seed: int = 0):
    values = {"name": "t", "weights": "random", "name_or_path": None, "architecture": architecture}
    model = build_model(ModelConfig.model_validate(values), seed)
    freeze(model, trainable, seed)
    return model


def learn(model: torch.nn.Module, steps: int = 3) -> np.ndarray:
    windows = np.random.default_rng(0).integers(0, V, (6, 9)).astype(np.int32)
    rng = np.random.default_rng(1)
    train(model, windows, epochs=0, steps=steps, batch_size=2, lr=0.05, rng=rng)
    return windows
