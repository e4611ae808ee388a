"""Faults that users met in training, each with its siblings and the right value."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.data.tokens import ClientTokens, FederatedText
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import build_model
from fedbw_sweep.plan import main as plan
from fedbw_sweep.sweeps.run import check
from fedbw_sweep.training.check import check_model, check_step
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.local import train
from fedbw_sweep.training.loss import cross_entropy
from fedbw_sweep.training.state import remembers
from tests.conftest import ROOT, Execute, config_of, refuses
from tests.model.architectures import GPT2, LLAMA, NEOX

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
BERT = {"model_type": "bert", **SIZES}
XLM = {"model_type": "xlm", "vocab_size": 300, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
BIG_BIRD = {**BERT, "model_type": "big_bird", "is_decoder": True, "block_size": 4}
OPT = {
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "layerdrop": 0.5,
    "dropout": 0.0,
    "max_position_embeddings": 64,
}


def described(architecture: dict[str, Any]) -> ModelConfig:
    return ModelConfig(name="t", weights="random", name_or_path=None, architecture=architecture)


def text_of(length: int = 16, largest: int = 255) -> FederatedText:
    windows = np.random.default_rng(0).integers(0, largest, (6, length + 1)).astype(np.int32)
    windows[0, 0] = largest
    return FederatedText(ClientTokens.of([windows.ravel()]), ("a",), windows, 1.0)


def checked(architecture: dict[str, Any], text: FederatedText) -> None:
    config = described(architecture)
    model = build_model(config, 1)
    check_model(model, config, text)
    check_step(copy.deepcopy(model), config, text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "remedy"),
    [
        (BERT, "add +model.architecture.is_decoder=true"),
        ({**BERT, "model_type": "roberta"}, "add +model.architecture.is_decoder=true"),
        ({**BERT, "model_type": "electra"}, "add +model.architecture.is_decoder=true"),
        (XLM, "add +model.architecture.causal=true"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_point_1_a_model_that_sees_the_answer_is_refused(
    architecture: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ConfigError, match="predicts a token from later ones too") as caught:
        checked(architecture, text_of())
    assert remedy in str(caught.value)
    key = remedy.rpartition(".")[2].partition("=")[0]
    checked({**architecture, key: True}, text_of())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [NEOX, GPT2, LLAMA, OPT], ids=lambda a: a["model_type"])
@pytest.mark.parametrize("length", [1, 2, 17, 31])
def test_point_1_causal_models_pass(architecture: dict[str, Any], length: int) -> None:
    checked(architecture, text_of(length))


def test_point_1_a_masked_lm_in_a_folder_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    sizes = {key: value for key, value in BERT.items() if key != "model_type"}
    AutoModelForMaskedLM.from_config(BertConfig(**sizes)).save_pretrained(tmp_path)
    config = ModelConfig(
        name="hub", weights="pretrained", name_or_path=str(tmp_path), architecture=None
    )
    with pytest.raises(ConfigError, match=r"set is_decoder=true in its config\.json"):
        check_model(build_model(config, 1), config, text_of())


def test_point_1_a_gate_of_zero_hides_nothing() -> None:
    config = described(BERT)
    model = build_model(config, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.output.dense.weight"):
                parameter.zero_()
    with pytest.raises(ConfigError, match="later ones"):
        check_model(model, config, text_of())


DYNAMIC = {
    **NEOX,
    "rope_parameters": {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
}
LONG = {
    **LLAMA,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 64,
}
RWKV = {"model_type": "rwkv", **SIZES, "num_hidden_layers": 3, "rescale_every": 1}
RWKV = {
    k: v for k, v in RWKV.items() if k not in ("num_attention_heads", "max_position_embeddings")
}
RWKV["attention_hidden_size"] = 16
GRIFFIN = {"model_type": "recurrent_gemma", **SIZES, "num_key_value_heads": 1, "lru_width": 16}
del GRIFFIN["max_position_embeddings"]
REFORMER = {
    "model_type": "reformer",
    "vocab_size": 300,
    "hidden_size": 16,
    "is_decoder": True,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 32,
    "attn_layers": ["lsh"],
    "axial_pos_embds": False,
    "max_position_embeddings": 64,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [DYNAMIC, LONG, RWKV, GRIFFIN], ids=lambda a: a["model_type"]
)
def test_point_4_what_a_model_has_seen_changes_nothing(architecture: dict[str, Any]) -> None:
    """A model that has trained on and evaluated other texts does what a new one does."""
    text, longer = text_of(16), text_of(48)
    old, new = (build_model(described(architecture), 3) for _ in range(2))
    arrays = copy.deepcopy(new.state_dict())

    def learn(model: nn.Module, windows: np.ndarray) -> float:
        rng = np.random.default_rng(1)
        model.load_state_dict(arrays)
        return train(model, windows, epochs=1, steps=None, batch_size=2, lr=0.01, rng=rng).loss

    learn(old, longer.heldout)
    heldout_loss(old, longer.heldout)
    old.load_state_dict(arrays)
    assert heldout_loss(old, text.heldout) == heldout_loss(new, text.heldout)
    assert heldout_loss(old, text.heldout) == heldout_loss(old, text.heldout)
    assert learn(old, text.heldout) == learn(new, text.heldout)
    for (name, one), other in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_point_4_evaluation_is_that_of_a_new_model_for_each_length() -> None:
    """Frequencies by transformers' own rule, in a model that has seen nothing."""
    model = build_model(described(DYNAMIC), 3)
    for length in (48, 16, 64, 20):
        windows = text_of(length).heldout
        fresh = build_model(described(DYNAMIC), 3).eval()
        tokens = torch.from_numpy(windows.astype(np.int64))
        with torch.no_grad():
            logits = fresh(tokens[:, :-1], use_cache=False).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert heldout_loss(model, windows) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("architecture", [NEOX, GPT2, LLAMA, OPT], ids=lambda a: a["model_type"])
def test_point_4_ordinary_models_are_not_copied(architecture: dict[str, Any]) -> None:
    model = build_model(described(architecture), 3)
    for training in (True, False):
        assert not remembers(model.train(training), text_of().heldout)


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: np.random.rand(), "numpy.random"),  # noqa: NPY002
        (random.random, "Python's random"),
        (partial(np.random.default_rng().random), "a source of its own"),
    ],
)
def test_point_4_draws_outside_torch_are_refused(draw: Callable[[], float], name: str) -> None:
    config = described(NEOX)
    model = build_model(config, 1)
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out * (1 + draw()))
    with pytest.raises(ConfigError, match=f"draws numbers from {name}, outside torch's"):
        check_model(model, config, text_of())


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        (BIG_BIRD, r"BigBird.* draws numbers from numpy\.random"),
        (REFORMER, r"Reformer.* draws numbers from a source of its own"),  # a seed of the system's
    ],
)
def test_point_4_architectures_that_draw_elsewhere(
    architecture: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(architecture, text_of(60))


@pytest.mark.parametrize("chosen", ["all", "one layer", "one skipped layer"])
def test_point_9_fedprox_pulls_layers_that_a_step_skips(chosen: str) -> None:
    """Against autograd on the whole objective."""
    model = build_model(
        described({**OPT, "layerdrop": 0.5 if chosen != "one skipped layer" else 1.0}), 2
    )
    if chosen != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.1." in name)
    with torch.no_grad():
        ours, theirs = model, copy.deepcopy(model)
    windows = text_of().heldout
    rng = partial(np.random.default_rng, 5)
    options = {"epochs": 0, "steps": 6, "batch_size": 2, "lr": 0.05, "proximal_mu": 3.0}
    adam = partial(torch.optim.AdamW, eps=1e-3)  # else keys' biases follow rounding errors
    train(ours, windows, rng=rng(), optimizer=adam, **options)  # type: ignore[arg-type]

    drawn, trained = rng(), [p for p in theirs.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    stepper = adam(trained, lr=0.05)
    theirs.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(drawn.integers(2**63)))
        order: list[int] = []
        for _ in range(6):
            order = order or drawn.permutation(len(windows)).tolist()
            batch, order = order[:2], order[2:]
            loss = cross_entropy(
                theirs, torch.from_numpy(windows[batch].astype(np.int64)), reduction="mean"
            )
            pull = sum((p - w).square().sum() for p, w in zip(trained, start, strict=True))
            stepper.zero_grad()
            (loss + 1.5 * pull).backward()
            stepper.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("architecture", "text", "words"),
    [
        (GPT2, text_of(33), r"^sequence_length=33: at most 32 with GPT2LMHeadModel"),
        (OPT, text_of(80), r"^sequence_length=80: at most 64 with OPTForCausalLM"),
        ({**BERT, "is_decoder": True}, text_of(65), r"^sequence_length=65: at most 64 with Bert"),
        (NEOX, text_of(16, 256), r"text has token 256, the model has 256 rows"),
        (GPT2, text_of(16, 9999), r"text has token 9999, the model has 256 rows"),
        ({**NEOX, "num_attention_heads": 3}, text_of(), "hidden size is not divisible"),
        ({**OPT, "num_attention_heads": 3}, text_of(), r"^model\.architecture=.*divisible"),
        ({**NEOX, "hidden_act": "gelo"}, text_of(), r"^model\.architecture=.*gelo"),
    ],
)
def test_point_12_what_does_not_fit_is_refused(
    architecture: dict[str, Any], text: FederatedText, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(architecture, text)


@pytest.mark.parametrize("error", [ValueError("no\nsuch thing"), AssertionError(), KeyError("x")])
def test_point_12_what_fails_in_training_alone_is_refused(error: Exception) -> None:
    config = described(NEOX)
    model = build_model(config, 1)

    def fail(module: nn.Module, *_: object) -> None:
        if module.training:
            raise error

    model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(ConfigError, match=r"GPTNeoXForCausalLM fails on the text"):
        check_step(model, config, text_of())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=tiny", "model.architecture.num_attention_heads=3"], "not divisible"),
        (["model=tiny", "model.architecture.vocab_size=100"], "byte tokens need at least 256"),
        (["model=tiny", "+model.architecture.intermediate_siz=3"], "no such key; did you mean"),
    ],
)
def test_point_12_the_plan_and_the_check_say_the_same(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.chdir(tmp_path)
        refuses(plan, overrides)
    assert words in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=words):
        check([config_of(*overrides)])


DYNAMIC_RUN = (
    "model.architecture.max_position_embeddings=32",
    "+model.architecture.rope_parameters={rope_type:dynamic,factor:4.0,rope_theta:10000.0,"
    "partial_rotary_factor:0.25}",
)


@pytest.mark.slow
def test_point_4_a_run_after_another_is_the_run_alone(execute: Execute) -> None:
    """In one process, as a sweep's workers are."""
    length = "sequence_length=48"
    alone = execute(*DYNAMIC_RUN, length)
    execute(*DYNAMIC_RUN, "sequence_length=128")
    after = execute(*DYNAMIC_RUN, length)
    assert alone.error is None
    assert after.summary["model_hash"] == alone.summary["model_hash"]
    assert [row["loss"] for row in after.rounds] == [row["loss"] for row in alone.rounds]


@pytest.mark.ray
@pytest.mark.slow
def test_point_12_nothing_trains_if_a_run_of_the_sweep_cannot(tmp_path: Path) -> None:
    small = ["num_clients=4", "fraction_fit=0.5", "rounds=1", "local_steps=1"]
    model = [
        "model=hub", "model.weights=random", "model.name_or_path=null",
        "model.architecture={model_type:gpt2,n_positions:32,n_embd:8,n_layer:1,n_head:2}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "fedbw_sweep", "-m", *model, "sequence_length=8,64", *small]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}/out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    words = "sequence_length=64: at most 32 with GPT2LMHeadModel"
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*/rounds.csv"))
