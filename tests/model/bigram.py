"""A causal LM of a user's own: the next token depends on the last one alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from fedbw_sweep.config.groups import ModelConfig


class BigramConfig(PreTrainedConfig):
    model_type = "bigram"
    vocab_size: int = 256
    width: int = 4


class Bigram(PreTrainedModel):
    config_class = BigramConfig

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))


def build(config: ModelConfig) -> Bigram:
    return Bigram(BigramConfig(**(config.architecture or {})))


def build_another(config: ModelConfig) -> nn.Module:
    return nn.Linear(2, 2)
