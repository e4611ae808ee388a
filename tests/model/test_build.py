"""Models are built as they are described, from a seed or from saved weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.layout_cache import find_layout
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.vector import layout_of, read_arrays
from tests.conftest import Execute
from tests.model.models import TINY, neox_parameters, tiny


@pytest.mark.parametrize(
    ("model", "vocabulary", "parameters"),
    [("pythia-14m", 50304, 14_067_712), ("tiny", 512, 1_320_960)],
)
def test_the_built_in_models_have_the_published_size(
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


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, _ = read_arrays(build_model(tiny(), seed=5))
    state = torch.random.get_rng_state()
    second, _ = read_arrays(build_model(tiny(), seed=5))
    other, _ = read_arrays(build_model(tiny(), seed=6))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


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


OWN = (
    "+model._target_=tests.model.bigram.build",
    "~model.architecture",
    "+model.architecture={vocab_size: 256, width: 3}",
)


@pytest.mark.slow
def test_a_model_of_the_users_own_is_built_by_its_function(
    run_config: Callable[..., RunConfig], execute: Execute, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = run_config("model=tiny", *OWN)
    assert config.science["model"]["_target_"] == "tests.model.bigram.build"
    first, again = (read_arrays(build_model(config.model, 1))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    layout, frozen = find_layout(config)  # from shapes
    assert (layout.size, frozen) == (256 * 3 + 3 * 256 + 256, 0)
    assert load_tokenizer(config.model)("a").tolist() == [97]
    record = execute(*OWN, "compression=int8")
    assert record.error is None
    assert record.summary["model_parameters"] == layout.size
    assert record.summary["loss"] < record.summary["initial_loss"]


def test_another_builder_is_another_run(run_config: Callable[..., RunConfig]) -> None:
    one = run_config("model=tiny", *OWN)
    other = run_config("model=tiny", *OWN, "model._target_=tests.model.bigram.Bigram")
    assert one.run_id != other.run_id != run_config("model=tiny").run_id


@pytest.mark.parametrize("name", ["build_another", "nothing_there"])
def test_what_builds_no_model_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\._target_=tests\.model\.bigram\.{name}: "):
        build_model(tiny(_target_=f"tests.model.bigram.{name}"), seed=0)
