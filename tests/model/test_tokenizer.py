"""Text to tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.tokenizer import load_tokenizer
from tests.model.models import TINY, tiny


def test_tokens_are_bytes_without_a_tokenizer() -> None:
    assert load_tokenizer(tiny())("né").tolist() == [0x6E, 0xC3, 0xA9]


def test_a_models_own_tokenizer_is_used(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    build_model(tiny(), seed=0).save_pretrained(tmp_path)  # type: ignore[operator]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    config = tiny(name_or_path=str(tmp_path), architecture=None, weights="pretrained")
    assert load_tokenizer(config)("to be or").tolist() == [0, 1, 2]


def test_byte_tokens_need_a_vocabulary_of_256() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=100: byte tokens need at least 256"):
        load_tokenizer(tiny(architecture={**TINY, "vocab_size": 100}))
