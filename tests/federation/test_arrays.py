"""Which of a model's arrays travel, and how: tied ones, saved ones, those that are no floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedbw_sweep.federation import shared
from fedbw_sweep.model.build import build_model
from fedbw_sweep.sweeps import run
from tests.conftest import Execute

pytestmark = pytest.mark.slow

TINY_BYTES = 5_283_840


def gpt2_bytes(vocabulary: int, hidden: int, layers: int, positions: int) -> int:
    """GPT-2 by hand, its output embedding tied to its input embedding and counted once."""
    block = 12 * hidden * hidden + 13 * hidden
    return 4 * ((vocabulary + positions) * hidden + layers * block + 2 * hidden)


@pytest.mark.parametrize(
    "settings", [(), ("trainable=lora", "compression@downlink=topk", "initial_model=sent")]
)
def test_a_run_that_is_lent_the_last_ones_model_starts_from_the_same(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    first = execute("compression=topk", *settings)
    other = execute("compression=int8", "seed=2", *settings, folder="other")
    assert other.rounds[0]["loss"] != first.rounds[0]["loss"]
    alone = execute("compression=topk", *settings, folder="alone")
    monkeypatch.setattr(shared, "build_trainable", lambda *_: pytest.fail("built again"))
    lent = execute("compression=topk", *settings, folder="lent")
    assert lent.rounds == alone.rounds == first.rounds
    assert lent.summary == alone.summary == first.summary
    assert lent.rounds[-1]["loss"] != lent.rounds[0]["loss"]
    another = execute("compression=int8", *settings, folder="another")
    assert another.rounds[0]["loss"] == first.rounds[0]["loss"]


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_tied_weights_travel_once_each_way(execute: Execute, tmp_path: Path, weights: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    record = execute(
        "model=hub", f"model.name_or_path={tmp_path / 'gpt2'}", f"model.weights={weights}"
    )
    assert record.error is None
    assert {row["payload_bytes"] for row in record.messages} == {gpt2_bytes(300, 8, 1, 32)}
    assert record.summary["loss"] < record.summary["initial_loss"]


def test_a_saved_model_starts_where_it_was_saved(execute: Execute, tmp_path: Path) -> None:
    tiny = execute("rounds=0")
    build_model(tiny.config.model, tiny.config.seed).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    loaded = execute("model=hub", f"model.name_or_path={tmp_path / 'saved'}", "rounds=1", "seed=7")
    assert loaded.rounds[0]["loss"] == tiny.rounds[0]["loss"]
    assert {row["payload_bytes"] for row in loaded.messages} == {TINY_BYTES}


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_integer_buffers_run_and_are_sent_exactly(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """A counter of forward passes in training, and a table of ids beyond a float's precision."""
    built: list[nn.Module] = []

    def count_training(model: nn.Module, *_: object) -> None:
        if model.training:
            model.get_buffer("steps").add_(1)

    def with_buffers(*arguments: object) -> nn.Module:
        model = build_model(*arguments)  # type: ignore[arg-type]
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        model.register_buffer("ids", torch.tensor([[2**53 + 1, -1]]))
        model.register_forward_hook(count_training)
        built.append(model)
        return model

    monkeypatch.setattr(run, "build_model", with_buffers)
    monkeypatch.setattr("fedbw_sweep.model.trainable.build_model", with_buffers)
    monkeypatch.setattr(shared, "_spare", {})
    shared._worker_model.cache_clear()
    record = execute(f"compression={compression}")
    shared._worker_model.cache_clear()
    assert record.error is None
    sent = {row["direction"]: row["payload_bytes"] for row in record.messages}
    assert sent["downlink"] == TINY_BYTES + 24
    body = TINY_BYTES if compression == "none" else int8_bytes(1_320_960)
    assert sent["uplink"] == body + 24
    assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    exact = [(row["tensor"], row["bytes"]) for row in record.parts if row["part"] == "exact"]
    assert exact == [("steps", 2 * 8), ("ids", 2 * 16)]  # of two clients
    assert sum(row["bytes"] for row in record.parts) == 2 * sent["uplink"]
    assert built[0].get_buffer("steps").item() == 2 * 2  # rounds x local steps
    assert built[0].get_buffer("ids").tolist() == [[2**53 + 1, -1]]


def int8_bytes(size: int) -> int:
    """A byte for each coordinate, two for each block of 128, four for the frame."""
    return size + 2 * -(-size // 128) + 4
