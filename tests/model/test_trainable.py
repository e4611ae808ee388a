"""What trains, by hand for three architectures; what is frozen stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.model.vector import layout_of, read_arrays, read_frozen
from fedbw_sweep.seeding import seed_for
from fedbw_sweep.training.evaluation import heldout_loss
from tests.model.architectures import (
    GPT2,
    LLAMA,
    NEOX,
    F,
    H,
    K,
    L,
    P,
    R,
    V,
    choice,
    learn,
    model_of,
)

GPT_WEIGHTS = 3 * H * H + H * H + 2 * H * F  # query, key and value in one; output; MLP

GPT_BIASES = 2 * H + 3 * H + H + F + H  # two norms, query, key and value, output, MLP

GPT_BLOCK = GPT_WEIGHTS + GPT_BIASES + 2 * H  # and the norms' gains

LLAMA_BLOCK = 2 * H * H + 2 * H * K + 3 * H * F + 2 * H  # query, output; key, value; MLP; norms

LORA = {"rank": R, "alpha": 3.0, "targets": None, "freeze_a": False}

BY_HAND = [
    (NEOX, "all", {}, 2 * V * H + L * GPT_BLOCK + 2 * H),
    (NEOX, "last_n", {"blocks": 2}, 2 * GPT_BLOCK),
    (NEOX, "head", {}, V * H),
    (NEOX, "bias", {}, L * GPT_BIASES + H),
    (NEOX, "norm", {}, L * 4 * H + 2 * H),
    (NEOX, "body", {}, L * GPT_BLOCK + 2 * H),
    (NEOX, "lora", LORA, L * R * (H + 3 * H)),
    (
        NEOX,
        "lora",
        {**LORA, "targets": ["all-linear"]},
        L * R * ((H + 3 * H) + (H + H) + 2 * (H + F)),
    ),
    (NEOX, "lora", {**LORA, "targets": ["dense"], "freeze_a": True}, L * R * H),
    (NEOX, "lora", {**LORA, "targets": ["lm_head"]}, R * (H + V)),
    (GPT2, "all", {}, (V + P) * H + L * GPT_BLOCK + 2 * H),
    (GPT2, "last_n", {"blocks": L}, L * GPT_BLOCK),
    (GPT2, "head", {}, V * H),  # tied: the input embedding as well
    (GPT2, "bias", {}, L * GPT_BIASES + H),
    (GPT2, "norm", {}, L * 4 * H + 2 * H),
    (GPT2, "body", {}, L * GPT_BLOCK + 2 * H),
    (GPT2, "lora", LORA, L * R * (H + 3 * H)),
    (LLAMA, "all", {}, V * H + L * LLAMA_BLOCK + H),
    (LLAMA, "last_n", {"blocks": 1}, LLAMA_BLOCK),
    (LLAMA, "head", {}, V * H),
    (LLAMA, "norm", {}, L * 2 * H + H),
    (LLAMA, "body", {}, L * LLAMA_BLOCK + H),
    (LLAMA, "lora", LORA, L * R * ((H + H) + (H + K))),
    (LLAMA, "lora", {**LORA, "freeze_a": True}, L * R * (H + K)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "name", "parameters", "size"),
    BY_HAND,
    ids=[f"{a['model_type']}-{n}-{i}" for i, (a, n, _, _) in enumerate(BY_HAND)],
)
def test_exactly_what_is_chosen_trains(
    architecture: dict[str, object], name: str, parameters: dict[str, object], size: int
) -> None:
    model = model_of(architecture, choice(name, **parameters))
    layout = layout_of(model)
    assert layout.size == size
    assert layout.dense_bytes == 4 * size
    arrays = {n: p.detach().clone() for n, p in model.named_parameters()}
    frozen, (before, _) = read_frozen(model), read_arrays(model)
    assert len(frozen) == 4 * (sum(p.numel() for p in model.parameters()) - size)
    learn(model)
    assert read_frozen(model) == frozen
    travelling = {tensor.name for tensor in layout.tensors}
    for n, p in model.named_parameters():
        assert torch.equal(p, arrays[n]) == (n not in travelling), n
    assert not np.array_equal(read_arrays(model)[0], before)


def test_the_body_of_pythia_is_11_8_times_smaller(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("trainable=body")
    model = build_model(config.model, 0)
    whole = layout_of(model).dense_bytes
    freeze(model, config.trainable, 0)
    assert layout_of(model).dense_bytes == whole - 2 * 4 * 50304 * 128
    assert round(whole / layout_of(model).dense_bytes, 1) == 11.8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [NEOX, GPT2, LLAMA], ids=lambda a: a["model_type"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_merged_adapters_give_the_trained_models_loss(
    architecture: dict[str, object], freeze_a: bool
) -> None:
    """Merged by hand, into a model that has never seen an adapter: W + alpha / rank B A."""
    parameters = {"rank": R, "alpha": 3.0, "targets": ["all-linear"], "freeze_a": freeze_a}
    adapted = model_of(architecture, choice("lora", **parameters), seed=4)
    plain = model_of(architecture, choice("all"), seed=4)
    untrained = np.random.default_rng(5).integers(0, V, (40, 9)).astype(np.int32)
    assert heldout_loss(adapted, untrained) == heldout_loss(plain, untrained)
    windows = learn(adapted, steps=10)
    trained, weights = heldout_loss(adapted, windows), adapted.state_dict()
    assert trained < heldout_loss(plain, windows) - 1e-3
    transposed = architecture is GPT2  # its layers multiply by the weight from the right
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            key = name.removesuffix("weight")
            if f"{key}lora_A.default.weight" in weights:
                a, b = (weights[f"{key}lora_{m}.default.weight"] for m in "AB")
                weight += 3.0 / R * ((b @ a).T if transposed else b @ a)
            elif f"{key}base_layer.weight" not in weights and name in weights:
                assert torch.equal(weight, weights[name]), name
    assert heldout_loss(plain, windows) == pytest.approx(trained, rel=1e-6)


def test_adapters_are_drawn_from_the_seed_and_leave_torchs_generator_alone() -> None:
    lora = choice("lora", **LORA)
    state = torch.random.get_rng_state()
    first, again, other = (read_arrays(model_of(NEOX, lora, seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    # peft's initialisation of A is that of torch's linear layers, one after the other.
    torch.manual_seed(seed_for(1, "lora") % 2**63)
    a = torch.nn.Linear(H, R, bias=False).weight
    torch.random.set_rng_state(state)
    drawn = next(layout_of(model_of(NEOX, lora, 1)).split(first))
    assert drawn[0].name == "gpt_neox.layers.0.attention.query_key_value.lora_A.default.weight"
    assert drawn[1].shape == a.shape
    assert np.abs(drawn[1]).max() <= 1 / math.sqrt(H)


@pytest.mark.parametrize(
    ("architecture", "name", "parameters", "words"),
    [
        (NEOX, "last_n", {"blocks": 4}, "trainable.blocks=4: GPTNeoXForCausalLM has 3; give 1 to"),
        (LLAMA, "bias", {}, "trainable=bias: LlamaForCausalLM has no such parameters"),
        (
            NEOX,
            "lora",
            {**LORA, "targets": ["dense", "q_proj"]},
            "has no linear layer q_proj with weights of its own; give [all-linear], any of dense, "
            "dense_4h_to_h, dense_h_to_4h, lm_head, query_key_value, or null",
        ),
        (GPT2, "lora", {**LORA, "targets": ["lm_head"]}, "any of c_attn, c_fc, c_proj, or null"),
        (NEOX, "lora", {**LORA, "targets": []}, "trainable.targets=[]"),
    ],
)
def test_what_a_model_does_not_have_is_an_error(
    architecture: dict[str, object], name: str, parameters: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        model_of(architecture, choice(name, **parameters))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("trainable=last_n", "trainable.blocks=0"), "trainable.blocks=0: .*at least 1"),
        (("trainable=lora", "trainable.rank=0"), "trainable.rank=0: .*at least 1"),
        (("trainable=lora", "trainable.rank=2.5"), "trainable.rank=2.5: .*integer"),
        (("trainable=lora", "trainable.alpha=-1"), "trainable.alpha=-1: .*above 0"),
        (("trainable=lora", "trainable.targets=dense"), "trainable.targets=dense: .*brackets"),
        (("trainable=lora", "trainable.targets=[1]"), r"trainable.targets.0=1: .*string"),
        (("trainable=bias", "+trainable.rank=2"), "trainable.rank=2: .*not permitted"),
        (("trainable.name=none",), "trainable.name=none: must be all, .* choose another with"),
        (("initial_model=guessed",), "initial_model=guessed: .*'known' or 'sent'"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    run_config: Callable[..., RunConfig], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(*overrides)
