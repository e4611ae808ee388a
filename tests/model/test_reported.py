"""Faults that users met in models, each with its siblings and the right value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.identity import numerics_of, run_id_of
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import architecture_of, build_model
from fedbw_sweep.model.layout_cache import find_layout
from fedbw_sweep.model.vector import layout_of
from tests.conftest import config_of
from tests.model.architectures import GPT2, LLAMA, NEOX, F, H, K, L, V, choice, model_of
from tests.model.models import tiny

Files = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def saved(
    architecture: dict[str, Any], folder: Path, change: Files, **config: object
) -> ModelConfig:
    """Save a model, with its file and its config changed."""
    build_model(tiny(architecture=architecture), 3).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return tiny(name_or_path=str(folder), architecture=None, weights="pretrained")


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        (NEOX, lambda a: {f"x.{k}": v for k, v in a.items()}, r"lacks 40 of the 40 arrays"),
        (GPT2, lambda a: dict(list(a.items())[::2]), r"lacks 20 of the 40 arrays .* and 17 more"),
        (
            NEOX,
            lambda a: {k: v for k, v in a.items() if "embed_out" not in k},
            r"random: lm_head\.weight\. Give",
        ),
        (
            LLAMA,
            lambda a: {k: v for k, v in a.items() if ".layers.2." not in k},
            r"lacks 9 of the 29 arrays .* model\.layers\.2\.",
        ),
    ],
    ids=["none", "half", "the head", "a layer"],
)
def test_point_6_a_checkpoint_that_lacks_arrays_is_refused(
    architecture: dict[str, Any], change: Files, words: str, tmp_path: Path
) -> None:
    config = saved(architecture, tmp_path, change)
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(config, 1)
    assert str(caught.value).startswith(f"model.name_or_path={tmp_path}: ")


@pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_point_6_what_is_tied_is_not_missing(architecture: dict[str, Any], tmp_path: Path) -> None:
    config = saved(architecture, tmp_path, lambda a: a)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert layout_of(build_model(config, 1)) == layout_of(model_of(architecture, choice("all"), 3))


LLAMA_SIZE = V * H + L * (2 * H * H + 2 * H * K + 3 * H * F + 2 * H) + H


@pytest.mark.parametrize(
    ("change", "tied", "size"),
    [
        (lambda a: {**a, "lm_head.weight": a["model.embed_tokens.weight"] + 1}, True, V * H),
        (lambda a: {**a, "lm_head.weight": a["model.embed_tokens.weight"].clone()}, True, 0),
        (lambda a: a, True, 0),
        (lambda a: {**a, "lm_head.weight": a["model.embed_tokens.weight"] + 1}, False, V * H),
    ],
    ids=["two matrices", "one matrix twice", "one matrix", "untied"],
)
@pytest.mark.parametrize("trainable", ["all", "body"])
def test_point_7_the_plan_takes_ties_from_the_file(
    change: Files, tied: bool, size: int, trainable: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = saved(LLAMA, tmp_path / "model", change, tie_word_embeddings=tied)
    config = config_of("model=tiny", f"trainable={trainable}").model_copy(update={"model": model})
    layout, frozen = find_layout(config)
    assert layout.dense_bytes + frozen == 4 * (LLAMA_SIZE + size)
    saved(LLAMA, tmp_path / "model", lambda a: a, tie_word_embeddings=True)  # another file
    layout, frozen = find_layout(config)
    assert layout.dense_bytes + frozen == 4 * LLAMA_SIZE


OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
OSS_BIASES = 2 * ((64 + 2 * 32 + 64) + 4 + 4 * (2 * 32 + 64))
"""In each of two blocks: query, key and value, output; the router; the experts' two."""
JAPANESE = {
    "model_type": "gpt_neox_japanese",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_multiple_size": 2,
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 4,
    "n_groups": 1,
    "expand": 2,
}


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        (OSS, OSS_BIASES),
        # Norms' two biases a block and the last; one dense_bias, only the last block's.
        (JAPANESE, 2 * 2 * 16 + 16 + 16),
        # The convolution's biases, for x, B and C, and dt_bias, one a head.
        (MAMBA2, 2 * ((32 + 2 * 4) + 4)),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_point_10_biases_of_every_name_train(architecture: dict[str, Any], size: int) -> None:
    assert layout_of(model_of(architecture, choice("bias"))).size == size


def test_point_10_what_the_model_never_trains_is_no_bias() -> None:
    model = model_of(NEOX, choice("all"))
    model.correction_bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    from fedbw_sweep.model.trainable import freeze

    freeze(model, choice("bias"), 0)
    assert not model.correction_bias.requires_grad


HUB = ("model=hub", "model.weights=random", "model.name_or_path=null")


def described(architecture: dict[str, Any], *overrides: str) -> RunConfig:
    config = config_of(*HUB, *overrides)
    return config.model_copy(update={"model": tiny(architecture=architecture)})


@pytest.mark.parametrize(
    ("architecture", "overrides", "number"),
    [
        (OSS, ("trainable=bias",), 6),
        (JAPANESE, ("trainable=bias",), 6),
        (OSS, (), 3),
        (OSS, ("trainable=lora", "trainable.targets=[all-linear]"), 7),
        (OSS, ("trainable=lora",), 3),
        (NEOX, ("trainable=lora", "trainable.targets=[all-linear]"), 3),
        (NEOX, ("trainable=bias",), 3),
        (GPT2, ("trainable=bias", "proximal_mu=0.1"), 3),
        ({"model_type": "opt", "layerdrop": 0.5}, ("proximal_mu=0.1",), 5),
        ({"model_type": "opt", "layerdrop": 0.5}, (), 3),
        ({"model_type": "opt"}, ("proximal_mu=0.1",), 3),
        ({"model_type": "bart"}, ("proximal_mu=0.1",), 5),
        ({"model_type": "bart"}, ("proximal_mu=0.1", "optimizer=sgd"), 3),
        ({**NEOX, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, (), 4),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, (), 4),
        ({**NEOX, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, (), 3),
        ({"model_type": "rwkv"}, (), 4),
    ],
)
def test_only_runs_whose_results_changed_have_another_id(
    architecture: dict[str, Any], overrides: tuple[str, ...], number: int
) -> None:
    config = described(architecture, *overrides)
    assert numerics_of(config.science) == number
    assert (config.run_id == run_id_of(config.science, 3)) is (number == 3)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({**NEOX, "intermediate_siz": 8}, "intermediate_siz=8: .*mean intermediate_size"),
        ({**GPT2, "n_lyer": 1}, "n_lyer=1: GPT2Config has no such key"),
        ({**LLAMA, "rotary_pct": 0.5}, "rotary_pct=0.5: LlamaConfig has no such key"),
        (
            {"model_type": "llama4", "text_config": {"hiden_size": 8}},
            r"architecture\.text_config\.hiden_size=8: .*mean hidden_size",
        ),
    ],
)
def test_point_22_keys_that_an_architecture_has_not_are_refused(
    architecture: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        architecture_of(tiny(architecture=architecture))


@pytest.mark.parametrize(
    "architecture",
    [
        {**NEOX, "rotary_pct": 0.5, "rope_theta": 100.0},
        {**LLAMA, "rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {**GPT2, "hidden_size": 8, "use_cache": False, "dtype": "float32"},
        {"model_type": "opt", "_remove_final_layer_norm": True, "layerdrop": 0.1},
    ],
)
def test_point_22_former_and_common_names_of_keys_are_taken(architecture: dict[str, Any]) -> None:
    kept = json.dumps(architecture)
    architecture_of(tiny(architecture=architecture))
    assert json.dumps(architecture) == kept
