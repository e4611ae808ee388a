"""Adapters: which layers have them, of what rank, and what is said where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedbw_sweep.cost.prediction import oversized, predict
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.layout_cache import find_layout
from fedbw_sweep.model.vector import frozen_parameters, layout_of
from fedbw_sweep.plan import main as plan
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.state import remembers
from tests.conftest import Execute, config_of
from tests.model.architectures import GPT2, LLAMA, NEOX, choice, learn, model_of

H, F, E, R = 64, 40, 4, 3
"""Features, those of an expert, experts, rank; queries have H features, keys H / 2."""
SIZES = {
    "vocab_size": 512,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": F,
}
OSS = {
    "model_type": "gpt_oss",
    **SIZES,
    "head_dim": 16,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_local_experts": E}
QWEN = {
    "model_type": "qwen3_moe",
    **SIZES,
    "head_dim": 16,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": F,
}
MAMBA = {"model_type": "mamba", "vocab_size": 512, "hidden_size": H, "num_hidden_layers": 2}
MAMBA |= {"state_size": 8, "time_step_rank": 4}
PHI = {"model_type": "phi3", **SIZES, "pad_token_id": 0, "eos_token_id": 1}

ATTENTION = (H + H) + 2 * (H + H // 2) + (H + H)  # query, key, value, output
GATE_UP, DOWN = E * (H + 2 * F), E * (F + H)
INNER = 2 * H  # mamba's
MIXER = (H + 2 * INNER) + (INNER + 4 + 2 * 8) + (4 + INNER)  # into it, x, dt; not out of it


def lora(targets: list[str] | None, **changes: object) -> Any:
    return choice(
        "lora", **{"rank": R, "alpha": 6.0, "targets": targets, "freeze_a": False, **changes}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "targets", "size"),
    [
        (OSS, ["all-linear"], ATTENTION + GATE_UP + DOWN),
        (MIXTRAL, ["all-linear"], ATTENTION + GATE_UP + DOWN),
        (QWEN, ["all-linear"], ATTENTION + GATE_UP + DOWN),
        (OSS, ["gate_up_proj"], GATE_UP),
        (QWEN, ["down_proj", "q_proj"], DOWN + 2 * H),
        (MIXTRAL, None, (H + H) + (H + H // 2)),  # query and value, as peft has it for mixtral
        (MAMBA, ["all-linear"], MIXER),
        (PHI, ["all-linear"], (H + 2 * H) + (H + H) + (H + 2 * F) + (F + H)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_point_27_every_layer_and_expert_has_the_rank_that_is_asked_for(
    architecture: dict[str, Any], targets: list[str] | None, size: int
) -> None:
    model = model_of(architecture, lora(targets))
    assert layout_of(model).size == 2 * R * size
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= {tensor.name for tensor in layout_of(model).tensors}
    assert changed


@pytest.mark.parametrize("architecture", [NEOX, LLAMA], ids=lambda a: a["model_type"])
def test_point_26_all_linear_and_the_head(architecture: dict[str, Any]) -> None:
    untied = {**architecture, "tie_word_embeddings": False}
    body, head = (layout_of(model_of(untied, lora([n]))).size for n in ("all-linear", "lm_head"))
    both = layout_of(model_of(untied, lora(["all-linear", "lm_head"]))).size
    assert both == body + head


@pytest.mark.parametrize(
    ("architecture", "targets", "words"),
    [
        (OSS, None, r"targets=None: peft has no choice of layers for GptOss.*gate_up_proj"),
        (PHI, None, r"targets=None: .*any of down_proj, gate_up_proj, lm_head, o_proj, qkv_proj"),
        (MAMBA, None, r"targets=None: .*any of dt_proj, in_proj, x_proj, or null"),
        (MAMBA, ["out_proj"], r"no linear layer out_proj .*any of dt_proj, in_proj, x_proj"),
        (GPT2, [], r"targets=\[\]: names no layer; give \[all-linear\], any of c_attn, c_fc, c_pr"),
        (OSS, ["router"], r"no linear layer router"),
    ],
)
def test_point_26_a_refusal_says_which_names_the_model_has(
    architecture: dict[str, Any], targets: list[str] | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        model_of(architecture, lora(targets))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [OSS, MIXTRAL], ids=lambda a: a["model_type"])
def test_point_27_experts_adapters_merge_into_their_matrices(architecture: dict[str, Any]) -> None:
    """By hand: W of each expert plus alpha / rank times its own B A."""
    adapted = model_of(architecture, lora(["gate_up_proj"]), seed=4)
    plain = model_of(architecture, choice("all"), seed=4)
    assert remembers(adapted, windows := learn(adapted, steps=10))  # evaluated by one thread
    trained = {name: p.detach() for name, p in adapted.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if not name.endswith("experts.gate_up_proj"):
                continue
            prefix = name.removesuffix("gate_up_proj")
            a = trained[f"{prefix}lora_A.default.weight"].view(E, R, -1)
            b = trained[f"{prefix}lora_B.default.weight"]
            b = b.view(b.shape[0], R, E).permute(2, 0, 1)
            change = 6.0 / R * torch.einsum("eor,eri->eoi", b, a)
            weight += change if change.shape == weight.shape else change.transpose(1, 2)
    assert heldout_loss(plain, windows) == pytest.approx(heldout_loss(adapted, windows), rel=1e-6)


@pytest.mark.parametrize("method", ["lowrank_ecsq", "ternary", "topk", "ecsq target_bits=0.5"])
@pytest.mark.parametrize("side", ["compression", "downlink"])
def test_point_23_no_figure_where_none_was_measured(method: str, side: str) -> None:
    name, *own = method.split()
    group = "compression" if side == "compression" else "compression@downlink"
    values = (f"{group}={name}", *(f"{side}.{each}" for each in own))
    layout = layout_of(model_of(NEOX, lora(["dense"])))
    config = config_of("model=tiny", "trainable=lora", *values)
    assert predict(config, layout) is None
    assert predict(config_of("model=tiny", *values), layout) is not None


@pytest.mark.parametrize("part", ["bias", "norm", "head"])
def test_point_23_nor_for_parts_of_another_kind(part: str) -> None:
    """Of pythia-like biases ternary was 104 B, measured 358."""
    config = config_of("model=tiny", f"trainable={part}", "compression=ternary")
    assert predict(config, *find_layout(config)) is None
    config = config_of("model=tiny", "trainable=body", "compression=ternary")
    assert predict(config, *find_layout(config)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "lowrank", "eden"])
def test_point_23_missed_rounds_are_those_of_the_clients(execute: Execute, method: str) -> None:
    overrides = (
        *("trainable=lora", "trainable.rank=1", "initial_model=sent", "rounds=3", "lr=1e-2"),
        *(f"compression@downlink={method}", "num_clients=6", "clients.dropout=0.3"),
    )
    record = execute(*overrides)
    assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    assert record.summary["prediction"] == "exact"


def test_point_23_methods_of_fixed_size_stay_exact_and_records_count() -> None:
    layout = layout_of(model_of(NEOX, lora(["dense"])))
    exact = predict(config_of("model=tiny", "trainable=lora", "compression=int8"), layout)
    assert exact is not None
    assert exact.basis == "exact"
    config = config_of("model=tiny", "trainable=lora", "compression=ternary")
    recorded = predict(config, layout, 0, (48, "1 run"))
    assert recorded is not None
    assert recorded.update_bytes == 48


@pytest.mark.parametrize(
    ("overrides", "rank", "words"),
    [
        ((), 200, ["trainable=lora trains adapters of {dense} B, more than the {frozen} B"]),
        (("compression=lowrank", "compression.rank=4"), 1, ["compression=lowrank sends "]),
        (
            ("compression@downlink=lowrank", "downlink.rank=4"),
            1,
            ["compression@downlink=lowrank sends "],
        ),
        (("compression=int8",), 8, []),
        ((), 1, []),
    ],
)
def test_point_28_what_is_larger_than_need_be_is_said(
    overrides: tuple[str, ...], rank: int, words: list[str]
) -> None:
    model = model_of(NEOX, lora(None, rank=rank))
    layout, frozen = layout_of(model), 4 * frozen_parameters(model)
    config = config_of("model=tiny", "trainable=lora", *overrides)
    said = oversized(config, layout, frozen)
    figures = {"dense": f"{layout.dense_bytes:,}", "frozen": f"{frozen:,}"}
    assert len(said) == len(words)
    for sentence, start in zip(said, words, strict=True):
        assert sentence.startswith(start.format(**figures))
        assert f"{layout.dense_bytes:,} B" in sentence


@pytest.mark.slow
def test_point_28_the_plan_says_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert plan(["model=tiny", "trainable=lora", "trainable.rank=2000"]) == 0
    adapters = 4 * 6 * 2000 * (128 + 3 * 128)
    assert f"trains adapters of {adapters:,} B, more than the 5,283,840 B" in " ".join(
        capsys.readouterr().out.split()
    )
