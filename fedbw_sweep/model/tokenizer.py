"""Text -> token ids: the model's own tokenizer, or UTF-8 bytes."""

from __future__ import annotations

import numpy as np
from transformers import AutoTokenizer

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.data.tokens import Tokenize
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import architecture_of, locate

BYTE_VOCABULARY = 256


def load_tokenizer(config: ModelConfig) -> Tokenize:
    """Return text -> token ids: the model's own tokenizer where it has one, else UTF-8 bytes.

    Raises
    ------
    ConfigError
        If the model has no tokenizer and fewer than 256 token ids.
    """
    if config.weights == "pretrained" or config.architecture is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(**locate(config))
        except (OSError, ValueError):
            tokenizer = None  # a folder or hub entry with weights only
        # For some architectures transformers makes an empty tokenizer where there is none.
        if tokenizer is not None and set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return lambda text: np.array(
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
            )
    vocabulary = architecture_of(config).get_text_config().vocab_size
    if vocabulary < BYTE_VOCABULARY:
        raise ConfigError(
            "model.architecture.vocab_size", vocabulary, "byte tokens need at least 256"
        )
    return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)
