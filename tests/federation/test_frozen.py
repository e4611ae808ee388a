"""What is frozen: chosen and checked before a run, sent once or never, the same at both ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.federation import job, shared
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.model.vector import layout_of, read_frozen
from fedbw_sweep.records.collect import collect
from fedbw_sweep.sweeps import run
from fedbw_sweep.training.evaluation import heldout_loss
from tests.conftest import CONF, Execute
from tests.model.architectures import (
    model_of,
)


@pytest.mark.slow
def test_every_choice_is_checked_before_any_run_trains(
    run_config: Callable[..., RunConfig],
) -> None:
    configs = [
        run_config("model=tiny", *more)
        for more in (
            ("trainable=lora",),
            ("trainable=lora", "trainable.targets=[all-linear]"),
            ("trainable=body",),
            ("trainable=last_n", "trainable.blocks=6"),
        )
    ]
    run.check(configs)
    with pytest.raises(ConfigError, match=r"trainable\.blocks=7"):
        run.check([*configs, run_config("model=tiny", "trainable=last_n", "trainable.blocks=7")])


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


@pytest.mark.slow
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
