"""The loss against whole logits in float64: architectures, ways, and what must stay untouched."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedbw_sweep.training.loss import OPTIONS, cross_entropy, has_linear_head

VOCABULARY, HIDDEN = 256, 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 128}


class Case(NamedTuple):
    """An architecture, whether its head is taken as linear, and why."""

    architecture: dict[str, Any]
    linear: bool
    reason: str


CASES = {
    "gpt_neox": Case({**SIZES}, True, "embed_out, whose weights are its own"),
    "gpt2": Case(GPT2, True, "the token embedding's weights"),
    "llama": Case({**SIZES}, True, "lm_head, whose weights are its own"),
    "opt": Case(
        {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8},
        True,
        "the projection before it belongs to the decoder",
    ),
    "gemma2": Case({**SIZES}, False, "a soft cap on the logits"),
    "gemma2-uncapped": Case({**SIZES, "final_logit_softcapping": None}, True, "no cap"),
    "cohere": Case({**SIZES}, False, "a scale on the logits"),
    "granite": Case({**SIZES, "logits_scaling": 8.0}, False, "a scale on the logits"),
    "granite-unscaled": Case({**SIZES, "logits_scaling": 1.0}, True, "a scale of 1"),
    "minicpm3": Case(
        {**SIZES, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8}
        | {"dim_model_base": 8},
        False,
        "a scale on the hidden states",
    ),
    "mamba": Case({**SIZES, "state_size": 4}, True, "no attention, the same head"),
    "bloom": Case({**SIZES, "n_layer": 2, "n_head": 2}, True, "the token embedding's weights"),
    "phi": Case({**SIZES, "num_key_value_heads": 2}, True, "a bias, which the loss takes too"),
    "qwen2": Case({**SIZES, "tie_word_embeddings": True}, True, "tied by choice"),
    "qwen3": Case({**SIZES, "tie_word_embeddings": True}, True, "tied by choice"),
    "bert": Case({**SIZES, "is_decoder": True}, False, "several layers"),
    "llama4_text": Case(
        {**SIZES, "intermediate_size_mlp": 32, "num_local_experts": 2},
        False,
        "transformers names no decoder",
    ),
}


def build(name: str, **changes: object) -> PreTrainedModel:
    """A tiny model outside training, with logits of about 2: a cap of 30 must show."""
    config = AutoConfig.for_model(name.partition("-")[0], **{**CASES[name].architecture, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in the beginning
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model.eval()


def add_adapter(model: PreTrainedModel, layer: str) -> None:
    """B starts at zero: the logits stay as they were until it trains."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[layer]), model)


def sequences(count: int = 3, length: int = 64) -> torch.Tensor:
    """Their 192 tokens make one whole chunk and a half."""
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (count, length + 1), generator=drawn)


def from_logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def check_against_float64(model: PreTrainedModel) -> None:
    windows, exact = sequences(), copy.deepcopy(model).double()
    expected = from_logits(exact, windows).double()  # mamba's logits are float32 always
    assert OPTIONS.batch_chunk_size is not None
    assert len(expected) > OPTIONS.batch_chunk_size
    expected.mean().backward()
    squares = [p.grad.square().sum() for p in exact.parameters() if p.grad is not None]
    scale = torch.stack(squares).sum().sqrt()

    with torch.inference_mode():
        each = cross_entropy(model, windows, reduction="none")
    assert each.dtype == torch.float32
    torch.testing.assert_close(each.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for reduction in ("mean", "none"):
        model.zero_grad()
        loss = cross_entropy(model, windows, reduction=reduction)
        loss.mean().backward()
        assert loss.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)
        for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None and theirs.grad is not None:
                assert (ours.grad - theirs.grad).norm() < 1e-5 * scale, name
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    model, case = build(name), CASES[name]
    for training in (False, True):
        model.train(training)
        assert has_linear_head(model, sequences()[:, :-1]) is case.linear, case.reason
    model.eval()  # dropout draws other numbers in float64
    check_against_float64(model)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "bloom"])
def test_logits_are_made_only_where_they_must_be(name: str) -> None:
    model, made = build(name), []
    cross_entropy(model, sequences(), reduction="mean")
    model.get_output_embeddings().register_forward_hook(lambda *_: made.append(1))
    cross_entropy(model, sequences(), reduction="mean").backward()
    assert not made
    from_logits(model, sequences())
    assert made


def test_gpt2_and_qwen_are_tied_and_phi_has_a_bias() -> None:
    """So that the cases are what their reasons say."""
    for name in ("gpt2", "opt", "bloom", "qwen2", "qwen3"):
        model = build(name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name in ("gpt_neox", "llama"):
        model = build(name)
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert build("phi").get_output_embeddings().bias.abs().max() == 1


@pytest.mark.parametrize(
    ("layer", "linear"), [("lm_head", False), ("q_proj", True)], ids=["head", "attention"]
)
def test_an_adapter_on_the_head_needs_its_logits(layer: str, linear: bool) -> None:
    model = build("llama")
    assert has_linear_head(model, sequences()[:, :-1])
    add_adapter(model, layer)  # after the first answer, and without effect as yet
    assert has_linear_head(model, sequences()[:, :-1]) is linear
    check_against_float64(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.3)
    check_against_float64(model)


@pytest.mark.parametrize("trained", ["head", "body"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "phi"])
def test_what_is_frozen_gets_no_gradient(name: str, trained: str) -> None:
    model = build(name)
    head = set(model.get_output_embeddings().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_((parameter in head) == (trained == "head"))
    check_against_float64(model)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_draws_what_the_whole_forward_pass_draws(name: str) -> None:
    model = build(name).train()
    losses = []
    for compute in (
        lambda: cross_entropy(model, sequences(), reduction="mean"),
        lambda: from_logits(model, sequences()).mean(),
    ):
        torch.manual_seed(3)
        losses.append(compute().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(from_logits(model.eval(), sequences()).mean().item())


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2", "minicpm3", "llama", "gpt2"])
def test_weights_do_not_decide(name: str, value: float) -> None:
    """Scaled zeros are zeros, and a diverged model's worker may go on with another run."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    assert has_linear_head(model, sequences()[:, :-1]) is CASES[name].linear


def spoil(module: nn.Module, *_: object) -> None:
    """Change buffers in training: in place, and for another tensor."""
    if module.training:
        module.get_buffer("steps").add_(1)
        module.register_buffer("mean", module.get_buffer("mean") * 0.9)


def with_buffers(module: nn.Module) -> None:
    module.register_buffer("steps", torch.tensor([2**53 + 1]))
    module.register_buffer("mean", torch.tensor([1.0, float("nan")]))
    module.register_forward_hook(spoil)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_trying_a_model_leaves_it_as_it_was(training: bool, reduction: str) -> None:
    model = build("gpt2").train(training)
    model.transformer.h[0].train(not training)  # a mode of its own
    with_buffers(model)
    model.transformer.wte.weight.grad = torch.full((VOCABULARY, HIDDEN), 7.0)
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    has_linear_head(model, sequences()[:, :-1])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0], name
        assert torch.equal(buffer.nan_to_num(5), buffers[name][1].nan_to_num(5)), name
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["transformer.wte.weight"]
    assert (grads["transformer.wte.weight"] == 7).all()
    torch.manual_seed(1)
    ours = cross_entropy(model, sequences(), reduction=reduction)  # type: ignore[arg-type]
    torch.manual_seed(1)
    theirs = from_logits(model, sequences())
    torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("part", "linear"),
    [(lambda model: model, False), (lambda model: model.gpt_neox, True)],
    ids=["whole model", "decoder"],
)
def test_buffers_count_each_forward_pass_once(
    part: Callable[[Any], nn.Module], linear: bool
) -> None:
    model = build("gpt_neox").train()
    counted = part(model)
    with_buffers(counted)
    for _ in range(3):
        cross_entropy(model, sequences(), reduction="mean").backward()
    assert has_linear_head(model, sequences()[:, :-1]) is linear
    assert counted.get_buffer("steps").item() == 2**53 + 1 + 3
    assert counted.get_buffer("mean")[0].item() == pytest.approx(0.9**3)
    model.eval()
    assert has_linear_head(model, sequences()[:, :-1])  # they count in training alone


@pytest.mark.slow
def test_a_model_is_tried_once_and_not_kept() -> None:
    model, calls = build("gpt_neox"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        cross_entropy(model, sequences(), reduction="none")
    assert len(calls) == 1
    copied = copy.deepcopy(model)
    cross_entropy(copied, sequences(), reduction="none")
    assert len(calls) == 2
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_threads_that_share_a_model_get_the_same_bits() -> None:
    chunks = [sequences(8) for _ in range(12)]

    def evaluate(model: PreTrainedModel, chunk: torch.Tensor) -> float:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return float(cross_entropy(model, chunk, reduction="none").double().sum())

    def evaluate_all(threads: int) -> list[float]:
        model = build("phi")  # not tried yet
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda chunk: evaluate(model, chunk), chunks))

    assert evaluate_all(1) == evaluate_all(6) == evaluate_all(6)


def test_a_model_that_is_not_transformers_gives_its_logits() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, inputs: torch.Tensor, use_cache: bool = False) -> Any:
            assert not use_cache
            return type("Output", (), {"logits": self.table(inputs)})

    torch.manual_seed(0)
    model = Bigram()
    ours = cross_entropy(model, sequences(), reduction="none")
    torch.testing.assert_close(ours, from_logits(model, sequences()))
