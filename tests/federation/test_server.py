from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.serverapp import Grid
from torch import nn

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.errors import ClientError, ConfigError
from fedbw_sweep.federation import server as server_module
from fedbw_sweep.federation.server import connected
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.vector import read_arrays
from fedbw_sweep.sweeps import run
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


class Late:
    """A grid to which clients connect one after the other, each time that it is asked."""

    def __init__(self, most: int) -> None:
        self.nodes, self.most = list[int](), most

    def get_node_ids(self) -> list[int]:
        self.nodes = [*self.nodes, 9 - len(self.nodes)][: self.most]
        return self.nodes


def test_clients_that_are_still_connecting_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower's engine may start the server before it has registered them."""
    assert connected(cast(Grid, Late(3)), 3) == [7, 8, 9]
    monkeypatch.setattr(server_module, "CONNECT_S", 0.2)
    with pytest.raises(ClientError, match="2 of 3 clients are connected"):
        connected(cast(Grid, Late(2)), 3)
