from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError, DivergenceError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.local import train

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


@pytest.mark.parametrize(
    ("model", "vocabulary", "parameters"),
    [("pythia-14m", 50304, 14_067_712), ("tiny", 512, 1_320_960)],
)
def test_the_shipped_models_have_the_published_size(
    run_config: Callable[..., RunConfig], model: str, vocabulary: int, parameters: int
) -> None:
    layout = layout_of(build_model(run_config(f"model={model}").model, seed=0))
    assert neox_parameters(vocabulary, 128, 6, 512) == parameters
    assert layout.size == parameters
    assert layout.dense_bytes == 4 * parameters
    assert len(layout.tensors) == 76


def test_pythias_bytes_are_the_lessons() -> None:
    assert 4 * neox_parameters(50304, 128, 6, 512) == 56_270_848
    assert round(56_270_848 / 2**20, 2) == 53.66
    assert round(56_270_848 / 1e6, 2) == 56.27


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


def test_a_saved_model_loads_back_bit_by_bit(tmp_path: Path) -> None:
    original = build_model(tiny(), seed=3)
    original.save_pretrained(tmp_path)  # type: ignore[operator]
    config = tiny(name_or_path=str(tmp_path), architecture=None, weights="pretrained")
    vector, _ = read_arrays(original)
    loaded, _ = read_arrays(build_model(config, seed=9))
    np.testing.assert_array_equal(loaded, vector)


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "model_type"}), dtype=torch.bfloat16
    )
    half.save_pretrained(tmp_path)
    config = tiny(name_or_path=str(tmp_path), architecture=None, weights="pretrained")
    model = build_model(config, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert layout_of(model).dense_bytes == 4 * neox_parameters(256, 8, 1, 16)


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


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, _ = read_arrays(build_model(tiny(), seed=5))
    state = torch.random.get_rng_state()
    second, _ = read_arrays(build_model(tiny(), seed=5))
    other, _ = read_arrays(build_model(tiny(), seed=6))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


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


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", ""])
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_a_model_that_cannot_be_loaded_says_what_to_do(name: str, weights: str) -> None:
    config = tiny(name_or_path=name, architecture=None, weights=weights)
    with pytest.raises(ConfigError, match=r"model\.name_or_path=") as caught:
        build_model(config, seed=0)
    assert "model=pythia-14m" in str(caught.value)


def test_an_architecture_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture="):
        build_model(tiny(architecture={"model_type": "no_such_type"}), seed=0)


def plain_steps(model: nn.Module, batches: list[torch.Tensor], lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for batch in batches:
        logits = model(batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sequences(count: int, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, length + 1)).astype(np.int32)


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


def test_heldout_loss_is_transformers_own_loss() -> None:
    model, windows = build_model(tiny(), seed=0), sequences(300, length=16)
    batch = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert heldout_loss(model, windows) == pytest.approx(expected, rel=1e-5)
    assert heldout_loss(model, windows) == heldout_loss(model, windows)
