from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from torch import nn

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.federation import shared
from fedbw_sweep.federation.ledger import METRICS, SENT_PAYLOAD
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.vector import read_arrays
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.sweep import run
from tests.conftest import SMALL, Execute

pytestmark = pytest.mark.slow

TINY_BYTES = 5_283_840


Vector = torch.Tensor
ServerRule = Callable[[int, Vector], Vector]
"""Round and mean update -> what is added to the model."""


def momentum_of(rate: float, decay: float, *, nesterov: bool) -> ServerRule:
    """SGD with momentum, Sutskever et al. 2013 as PyTorch writes it."""
    kept = torch.zeros(())

    def rule(server_round: int, update: Vector) -> Vector:
        nonlocal kept
        kept = decay * kept + update
        return rate * (update + decay * kept if nesterov else kept)

    return rule


def adam_of(rate: float, beta_1: float, beta_2: float, tau: float) -> ServerRule:
    """FedAdam of Algorithm 2 of Reddi et al. 2020: no bias correction, v from tau squared."""
    mean, square = torch.zeros(()), torch.tensor(tau**2)

    def rule(server_round: int, update: Vector) -> Vector:
        nonlocal mean, square
        mean = beta_1 * mean + (1 - beta_1) * update
        square = beta_2 * square + (1 - beta_2) * update**2
        return rate * mean / (square.sqrt() + tau)

    return rule


@pytest.mark.parametrize(
    ("overrides", "rule", "optimizer", "mu"),
    [
        ((), lambda _, update: update, torch.optim.AdamW, 0.0),
        (
            (
                *("server=fedavgm", "server.lr=0.5", "optimizer=sgd", "lr=0.1"),
                *("optimizer.momentum=0.5", "optimizer.nesterov=true"),
            ),
            momentum_of(0.5, 0.9, nesterov=False),
            partial(torch.optim.SGD, momentum=0.5, nesterov=True),
            0.0,
        ),
        (
            ("server=fedadam", "server.lr=0.003", "optimizer.weight_decay=0.3"),
            adam_of(0.003, 0.9, 0.99, 1e-3),
            partial(torch.optim.AdamW, weight_decay=0.3),
            0.0,
        ),
        (
            ("server=diloco", "optimizer=sgd", "lr=0.1", "proximal_mu=5.0"),
            momentum_of(0.7, 0.9, nesterov=True),
            torch.optim.SGD,
            5.0,
        ),
    ],
    ids=["fedavg", "fedavgm", "fedadam", "diloco"],
)
def test_it_is_what_the_papers_say(
    execute: Execute,
    overrides: tuple[str, ...],
    rule: ServerRule,
    optimizer: Callable[..., torch.optim.Optimizer],
    mu: float,
) -> None:
    """Against a plain torch loop that shares nothing but the sampled clients and the batches."""
    record = execute("local_steps=3", "rounds=3", *overrides)
    assert record.error is None
    config = record.config
    text = federated_text(config)
    model = build_model(config.model, config.seed)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    for server_round in (1, 2, 3):
        sampled = [
            row["client"]
            for row in record.messages
            if row["round"] == server_round and row["direction"] == "uplink"
        ]
        updates, counts = [], []
        for client in sampled:
            nn.utils.vector_to_parameters(weights.clone(), model.parameters())
            data = windows(text.clients[client], config.sequence_length)
            rng = run_rng(config.seed, client, server_round)
            stepper = optimizer(model.parameters(), lr=config.lr)
            order = rng.permutation(len(data))
            for start in range(0, 3 * config.batch_size, config.batch_size):
                batch = torch.from_numpy(
                    data[order[start : start + config.batch_size]].astype(np.int64)
                )
                logits = model(batch[:, :-1]).logits.transpose(1, 2)
                moved = nn.utils.parameters_to_vector(model.parameters()) - weights
                loss = nn.functional.cross_entropy(logits, batch[:, 1:])
                stepper.zero_grad()
                (loss + mu / 2 * moved.square().sum()).backward()
                stepper.step()
            trained = nn.utils.parameters_to_vector(model.parameters()).detach()
            updates.append(trained - weights)
            counts.append(len(data))
        shares = [count / sum(counts) for count in counts]
        mean = sum(share * update for share, update in zip(shares, updates, strict=True))
        weights = weights + rule(server_round, torch.as_tensor(mean))
    nn.utils.vector_to_parameters(weights, model.parameters())
    batch = torch.from_numpy(text.heldout.astype(np.int64))
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert record.summary["loss"] == pytest.approx(expected, rel=1e-4)
    assert record.summary["initial_loss"] - expected > 0.05


def test_weights_are_averaged_where_they_are_sent(execute: Execute) -> None:
    updates, weights = execute("upload=update"), execute("upload=weights", folder="weights")
    assert weights.summary["uplink_bytes"] == updates.summary["uplink_bytes"]
    assert weights.summary["loss"] == pytest.approx(updates.summary["loss"], rel=1e-4)
    assert updates.summary["initial_loss"] - weights.summary["loss"] > 0.05


def test_what_is_not_sent_of_weights_is_zero(execute: Execute) -> None:
    record = execute(
        *("upload=weights", "local_steps=0", "rounds=1"),
        *("compression=topk", "compression.density=0.1", "compression.error_feedback=false"),
    )
    vector, _ = read_arrays(build_model(record.config.model, record.config.seed))
    kept = np.sort(np.abs(vector))[-round(0.1 * len(vector)) :]
    vector[np.abs(vector) < kept[0]] = 0
    assert record.summary["model_hash"] == hashlib.sha256(vector.tobytes()).hexdigest()


def run_rng(seed: int, client: int, server_round: int) -> np.random.Generator:
    from fedbw_sweep.seeding import rng_for

    rng = rng_for(seed, "train", client, server_round)
    rng.integers(2**63)
    return rng


def test_every_byte_of_the_reference_is_predicted(execute: Execute) -> None:
    record = execute()
    summary = record.summary
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 2 * 2 * TINY_BYTES
    assert summary["predicted_bytes"] == summary["total_bytes"] == 8 * TINY_BYTES
    assert summary["prediction"] == "exact"
    assert summary["uplink_ratio"] == summary["total_ratio"] == 1
    assert summary["bits_per_coordinate"] == 32
    messages = pd.DataFrame(record.messages)
    assert len(messages) == 8
    # payload + the keys "payload", "client" and "round" + two integers of 8 bytes
    down = messages[messages["direction"] == "downlink"]
    assert set(down["message_bytes"]) == {TINY_BYTES + 7 + 6 + 5 + 16}


def test_a_step_of_one_without_momentum_is_the_mean(execute: Execute) -> None:
    mean = execute(folder="mean").rounds[-1]["loss"]
    for server in (
        ("server=fedavgm", "server.momentum=0.0"),
        ("server=diloco", "server.lr=1.0", "server.momentum=0.0", "server.nesterov=false"),
    ):
        assert execute(*server, folder=server[0]).rounds[-1]["loss"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optimizer=sgd", "optimizer.momentum=-0.5"), ["optimizer=sgd", "momentum", "-0.5"]),
        (("optimizer=sgd", "optimizer.nesterov=true"), ["optimizer=sgd", "Nesterov"]),
        (("+optimizer.momentum=0.9",), ["optimizer=adamw", "momentum"]),
        (("optimizer._target_=torch.optim.None_",), ["optimizer._target_=torch.optim.None_"]),
        (("server=diloco", "server.momentum=0.0"), ["server=diloco", "Nesterov"]),
        (("+server.fraction_train=0.5",), ["server=fedavg", "fraction_train"]),
        (("server._target_=collections.Counter",), ["server._target_=", "torch.optim"]),
        (("server._target_=flwr.No",), ["server._target_=flwr.No"]),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_training(
    run_config: Callable[..., RunConfig], overrides: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        run.check([run_config(*SMALL, *overrides)])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("compression", ["fp16", "int8", "topk", "threshold"])
def test_a_compressed_run_trains_and_adds_up(execute: Execute, compression: str) -> None:
    record = execute(f"compression={compression}")
    assert record.error is None
    messages, rounds = pd.DataFrame(record.messages), pd.DataFrame(record.rounds)
    up = messages[messages["direction"] == "uplink"]
    assert (
        rounds["uplink_bytes"].tolist()[1:] == up.groupby("round")["payload_bytes"].sum().tolist()
    )
    assert rounds["cumulative_uplink_bytes"].iloc[-1] == up["payload_bytes"].sum()
    assert record.summary["uplink_bytes"] == up["payload_bytes"].sum()
    parts = pd.DataFrame(record.parts)
    assert parts["bytes"].sum() == rounds["uplink_bytes"].iloc[-1]
    assert not parts.duplicated(["tensor", "part"]).any()
    assert up["payload_bytes"].max() < TINY_BYTES
    assert record.summary["loss"] < record.summary["initial_loss"]
    assert record.summary["uplink_ratio"] == pytest.approx(
        TINY_BYTES * len(up) / up["payload_bytes"].sum()
    )
    if record.config.compression.build().fixed_size:
        assert record.summary["predicted_bytes"] == record.summary["total_bytes"]


@pytest.mark.parametrize("compression", ["none", "topk"])
def test_node_ids_and_reply_order_change_nothing(execute: Execute, compression: str) -> None:
    records = [
        execute(f"compression={compression}", "rounds=3", order=order, folder=str(order))
        for order in (1, 2)
    ]
    first, second = (record.summary for record in records)
    assert first == second
    assert records[0].rounds == records[1].rounds
    assert records[0].messages == records[1].messages


def test_error_feedback_is_the_clients_own(execute: Execute) -> None:
    settings = ("compression=topk", "num_clients=2", "fraction_fit=1.0", "rounds=3")
    kept = execute(*settings)
    dropped = execute(*settings, "compression.error_feedback=false")
    assert kept.rounds[1]["loss"] == dropped.rounds[1]["loss"]  # nothing is held back yet
    assert kept.rounds[3]["loss"] != dropped.rounds[3]["loss"]


def test_no_rounds_and_no_training(execute: Execute) -> None:
    record = execute("rounds=0")
    assert record.status == "done"
    assert record.summary["total_bytes"] == 0
    assert record.messages == []
    still = execute("local_steps=0")
    assert still.summary["loss"] == still.summary["initial_loss"]
    assert still.summary["total_bytes"] == 8 * TINY_BYTES


def test_divergence_fails_the_run_with_its_reason(execute: Execute, tmp_path: Path) -> None:
    record = execute("lr=1e30", "local_steps=4")
    assert record.status == "failed"
    assert record.error is not None
    assert "loss is nan" in record.error
    assert "lower lr" in record.error
    assert "Traceback" not in record.error
    results, _ = collect(tmp_path / "s")
    assert results["status"].tolist() == ["failed"]
    assert results["loss"].isna().all()


def test_a_count_that_differs_fails_the_run(execute: Execute) -> None:
    def lie(reply: Message) -> Message:
        reply.content.metric_records[METRICS][SENT_PAYLOAD] -= 1  # type: ignore[operator]
        return reply

    record = execute(tamper=lie)
    assert record.error == (
        "round 1, client "
        f"{record_first_client(record)}: sent-payload-bytes is {TINY_BYTES - 1} "
        f"by the client's count and {TINY_BYTES} by the server's"
    )


def record_first_client(record: RunRecord) -> int:
    assert record.error is not None
    return int(record.error.split("client ")[1].split(":")[0])


def test_a_damaged_payload_fails_the_run(execute: Execute) -> None:
    def damage(reply: Message) -> Message:
        array = reply.content.array_records["arrays"]["payload"]
        flipped = bytes([array.data[0] ^ 1]) + array.data[1:]
        reply.content["arrays"] = ArrayRecord(
            {"payload": Array(array.dtype, array.shape, array.stype, flipped)}
        )
        return reply

    record = execute("compression=int8", tamper=damage)
    assert record.error is not None
    assert "payload was not made by" in record.error


def test_a_client_that_never_answers_fails_the_run(execute: Execute) -> None:
    record = execute("backend.client_timeout_s=5", tamper=lambda reply: None)
    assert record.error is not None
    assert "no reply within backend.client_timeout_s=5 s" in record.error


def test_a_clients_own_traceback_is_reported(
    execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("fedbw_sweep.federation.client.train", broken)
    record = execute()
    assert record.error is not None
    assert "RuntimeError: disk on fire" in record.error
    assert "test_server.py" in record.error


def test_the_heldout_loss_is_in_three_units(execute: Execute) -> None:
    row = execute("rounds=0").rounds[0]
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))  # byte tokens
    assert row["loss"] == pytest.approx(math.log(512), abs=0.3)


def test_the_model_hash_is_of_the_final_weights(execute: Execute) -> None:
    record = execute("rounds=0")
    vector, _ = read_arrays(build_model(record.config.model, record.config.seed))
    assert (
        record.summary["model_hash"] == hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
    )


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


def test_a_client_that_drops_out_was_still_sent_the_model(execute: Execute) -> None:
    record = execute("num_clients=20", "fraction_fit=1.0", "clients.dropout=0.5", "local_steps=1")
    assert record.error is None
    sent = [row for row in record.messages if row["direction"] == "downlink"]
    received = [row for row in record.messages if row["direction"] == "uplink"]
    assert len(sent) == 2 * 20
    # Binomial(40, 0.5) lies outside in one of 10^4 seeds; this seed is fixed.
    assert 8 < len(received) < 32
    replied = [{row["client"] for row in received if row["round"] == n} for n in (1, 2)]
    assert replied[0] != replied[1]
    assert [row["clients"] for row in record.rounds[1:]] == [len(clients) for clients in replied]
    assert record.summary["downlink_bytes"] == 40 * TINY_BYTES
    assert record.summary["uplink_bytes"] == len(received) * TINY_BYTES
    assert record.summary["prediction"] == "exact"
    assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    again = execute(
        "num_clients=20", "fraction_fit=1.0", "clients.dropout=0.5", "local_steps=1", order=3
    )
    assert again.rounds == record.rounds


def test_a_round_without_replies_leaves_the_model(execute: Execute) -> None:
    record = execute("num_clients=1", "fraction_fit=1.0", "clients.dropout=0.99")
    assert record.error is None
    assert [row["clients"] for row in record.rounds] == [0, 0, 0]
    assert record.parts == []
    assert record.summary["loss"] == record.summary["initial_loss"]
    assert record.summary["downlink_bytes"] == 2 * TINY_BYTES
