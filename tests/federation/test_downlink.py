"""What the server says a client holds is what it holds, and the bytes are those that travel."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.config.groups import ClientsConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.cost.prediction import predict
from fedbw_sweep.errors import ConfigError, PayloadError
from fedbw_sweep.federation import client as client_side
from fedbw_sweep.federation.chain import Chain
from fedbw_sweep.federation.downlink import Weights, downlink
from fedbw_sweep.federation.exchange import Exchange
from fedbw_sweep.federation.rebuild import rebuild
from fedbw_sweep.sweeps import run
from tests.compression.test_contract import NAMES, read_choice
from tests.conftest import SMALL
from tests.local import LocalBackend

Build = Callable[..., RunConfig]

settings.register_profile("downlink", deadline=None, derandomize=True)
settings.load_profile("downlink")

LITTLE = (
    "model.architecture.hidden_size=16",
    "model.architecture.intermediate_size=32",
    "model.architecture.num_hidden_layers=1",
    "model.architecture.vocab_size=256",
    "local_steps=1",
)
"""Overrides that cut the tiny model to some ten thousand parameters."""


METHODS = [
    (name, error_feedback)
    for name in NAMES
    for error_feedback in (True, False)
    if not (error_feedback and read_choice(name).get("unbiased"))
]
"""Every method with both settings of error feedback, where it may have them."""

CONTEXT = "lowrank_ecsq context=received"
"""The method that uses what both ends hold."""


@cache
def defaults() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(compose("config")).model_dump(by_alias=True)


def configure(name: str, error_feedback: bool | None = None, **values: Any) -> RunConfig:
    """Build a config with a downlink choice, without the time that composing takes.

    It is named with the parameters that differ from its file's: ``"lowrank_ecsq step=4.0"``.
    """
    name, *parameters = name.split()
    choice = read_choice(name) | dict(parameter.split("=") for parameter in parameters)
    if error_feedback is not None:
        choice["error_feedback"] = error_feedback
    return RunConfig.from_dict({**defaults(), "downlink": choice, **values})


def matrix_layout() -> Layout:
    return Layout(
        (TensorSpec("w", (60, 40)), TensorSpec("b", (37,)), TensorSpec("n", (3,), "int64"))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error_feedback", "initial_model"),
    [
        *((*method, initial) for method in METHODS for initial in ("known", "sent")),
        *((CONTEXT, error_feedback, "known") for error_feedback in (True, False)),
    ],
)
@settings(max_examples=5)
@given(data=st.data())
def test_what_a_client_rebuilds_is_the_exchanges_record(
    name: str, error_feedback: bool, initial_model: str, data: st.DataObject
) -> None:
    """Over rounds in which any clients take part and any of them reply."""
    config = configure(name, error_feedback, initial_model=initial_model)
    layout = matrix_layout()
    end, method = downlink(config, layout), config.downlink.build("downlink")
    assert isinstance(end, Weights) == (method.codes_weights and not error_feedback)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    model = rng.standard_normal(layout.size).astype(np.float32)
    start = model if initial_model == "known" else None
    held: dict[int, FloatVector | None] = dict.fromkeys(range(4), start)
    initial = model
    some = st.sets(st.sampled_from(range(4)))
    for server_round in range(1, 7):
        exact = rng.bytes(layout.exact_bytes)
        end.prepare(server_round, model, exact)
        replying = data.draw(some)
        for client in data.draw(some):
            payload = memoryview(end.payload_for(client))
            assert payload[-24:] == exact
            if isinstance(end, Chain):
                rebuilt = rebuild(
                    payload[:-24], held[client], initial, method, layout, server_round - 1
                )
                assert rebuilt.tobytes() == end.held.tobytes()
                if client in replying:
                    held[client] = rebuilt
                    end.replied(client)
        step = rng.standard_normal(layout.size) * rng.choice([0, 1e-3, 1e-2])
        model = (model + step).astype(np.float32)


def note_received(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that gets each model that a client trains from."""
    received: list[bytes] = []
    write = client_side.write_arrays

    def note(model: Any, vector: FloatVector, exact: bytes) -> None:
        received.append(vector.tobytes())
        write(model, vector, exact)

    monkeypatch.setattr(client_side, "write_arrays", note)
    return received


def note_recorded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that gets each model that the server takes a client to have trained from."""
    recorded: list[bytes] = []
    receive = Exchange.receive

    def note(self: Exchange, number: int, client: int, reply: Any) -> Any:
        received = receive(self, number, client, reply)
        recorded.append(self.downlink.received(client).tobytes())
        return received

    monkeypatch.setattr(Exchange, "receive", note)
    return recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_clients_train_from_the_exchanges_record(
    run_config: Build,
    name: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In federations with dropout; the bytes booked are those of what both ends saw."""
    trained_from = note_received(monkeypatch)
    recorded: list[bytes] = []
    exchanges: list[Exchange] = []
    send = Exchange.instruct

    def note_record(self: Exchange, *arguments: Any) -> Any:
        messages = send(self, *arguments)
        end = self.downlink
        if isinstance(end, Chain):
            vector = end.held
        else:
            assert isinstance(end, Weights)
            vector = end.compressor.decode(end.payload, self.layout)
        recorded.extend([vector.tobytes()] * len(messages))
        exchanges.append(self)
        return messages

    monkeypatch.setattr(Exchange, "instruct", note_record)
    monkeypatch.setattr(run, "backend_of", LocalBackend(5))
    record = run.execute(
        run_config(
            *(*SMALL, *LITTLE, "num_clients=6", "rounds=5", "clients.dropout=0.3"),
            *("lr=0.01", f"compression@downlink={name}"),
        ),
        tmp_path,
    )
    assert record.error is None
    assert trained_from == recorded
    if name != "sketch":  # which finds nothing heavy in these differences
        assert len(set(recorded)) > 2
    down = [entry for entry in exchanges[0].own.ledger.entries if entry.direction == "downlink"]
    assert len(down) == 5 * 3
    assert record.summary["downlink_bytes"] == sum(entry.payload_bytes for entry in down)
    assert record.summary["downlink_ratio"] == pytest.approx(
        15 * record.summary["dense_message_bytes"] / record.summary["downlink_bytes"]
    )
    if name != "none":
        assert record.summary["downlink_ratio"] > 1


def test_catching_up_by_hand() -> None:
    """100 coordinates are 400 bytes dense; one int8 update is 4 + 2 + 100, and 8 for its length.

    So three missed updates, 342 bytes, are fewer than the model, and four, 456, are more.
    """
    config = configure("int8", True)
    layout = Layout((TensorSpec("w", (100,)), TensorSpec("n", (3,), "int64")))
    end = Chain(config, layout)
    method = config.downlink.build("downlink")
    models = np.random.default_rng(1).standard_normal((9, 100)).astype(np.float32).cumsum(0)
    sizes: dict[int, list[int]] = {client: [] for client in range(9)}
    header, exact = 8, 24
    for server_round, model in enumerate(models, 1):
        end.prepare(server_round, model, bytes(exact))
        for client in {1: [1, 2, 3], 2: [1], 4: [2], 5: [3], 6: [3, 4]}.get(server_round, []):
            sizes[client].append(len(end.payload_for(client)))
            assert rebuilt_size(end, client, method, layout)
            if (client, server_round) != (3, 5):  # of which no reply comes
                end.replied(client)
    update = 4 + 2 + 100 + 8
    assert sizes[1] == [header + exact, header + update + exact]
    assert sizes[2] == [header + exact, header + 3 * update + exact]
    assert sizes[3] == [header + exact, header + 400 + exact, header + 400 + exact]
    assert sizes[4] == [header + 400 + exact]  # never seen: at the initial model, 5 updates ago


def rebuilt_size(end: Chain, client: int, method: Any, layout: Layout) -> bool:
    """Whether a client that gets the whole model has the server's record, as all others do."""
    payload = memoryview(end.payload_for(client))[:-24]
    if HEADER.unpack_from(payload)[1] >= 0:
        return True
    return rebuild(payload, None, None, method, layout, 0).tobytes() == end.held.tobytes()


def test_only_updates_that_may_be_sent_are_kept() -> None:
    config = configure("topk")
    layout, rng = matrix_layout(), np.random.default_rng(0)
    end = Chain(config, layout)
    for server_round in range(1, 40):
        end.prepare(server_round, rng.standard_normal(layout.size).astype(np.float32), b"")
        kept = sum(map(len, end.updates))
        assert kept <= 4 * layout.size
    assert end.version == 38
    assert 2 < len(end.updates) < 10


@pytest.mark.slow
def test_error_feedback_brings_clients_to_the_model() -> None:
    """Once the global model stands still, what was left unsent follows; without, it is lost."""
    layout, rng = matrix_layout(), np.random.default_rng(0)
    first, last = rng.standard_normal((2, layout.size)).astype(np.float32)

    def distance(name: str, error_feedback: bool) -> float:
        end = Chain(configure(name, error_feedback), layout)
        for server_round in range(1, 60):
            end.prepare(server_round, first if server_round == 1 else last, b"")
        return float(np.linalg.norm(end.held - last) / np.linalg.norm(first - last))

    for name in ("topk", "sign", "int4", "lowrank_ecsq", "eden"):
        assert distance(name, True) < 0.05, name
    assert distance("topk", False) > 0.5


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda sent: sent[:5], "no header"),
        (lambda sent: sent[:-1], "."),
        (lambda sent: sent + b"x", "1 bytes after 2 updates"),
        (lambda sent: sent[: HEADER.size], "fewer than 2 updates"),
        (lambda sent: bytes([sent[0] ^ 1]) + sent[1:], "is not the server's"),
        (lambda sent: HEADER.pack(zlib.crc32(b""), 7) + sent[8:], "fewer than 7 updates"),
        (lambda sent: HEADER.pack(zlib.crc32(b""), 8) + sent[8:], "8 updates, .* at most 7"),
        (lambda sent: HEADER.pack(zlib.crc32(b""), -2) + sent[8:], "-2 updates"),
        (lambda sent: HEADER.pack(0, -1) + sent[8:], "expected 9748 bytes"),
        (lambda sent: sent[:8] + LENGTH.pack(2**63) + sent[16:], "."),
    ],
)
def test_damaged_updates_are_refused(damage: Callable[[bytes], bytes], words: str) -> None:
    config = configure("topk")
    layout = matrix_layout()
    end, method = Chain(config, layout), config.downlink.build("downlink")
    start = np.zeros(layout.size, np.float32)
    for server_round, model in enumerate((start, start + 1, start + 2), 1):
        end.prepare(server_round, model, b"")
    sent = end.payload_for(0)
    assert (
        rebuild(memoryview(sent), start, start, method, layout, 2).tobytes() == end.held.tobytes()
    )
    with pytest.raises(PayloadError, match=words):
        rebuild(memoryview(damage(sent)), start, start, method, layout, 7)
    with pytest.raises(PayloadError, match="2 updates to a model that this client does not hold"):
        rebuild(memoryview(sent), None, start, method, layout, 2)
    with pytest.raises(PayloadError, match="is not the server's"):
        rebuild(memoryview(sent), start + 1, start, method, layout, 2)


FIXED = sorted(
    name for name in ("none", "fp16", "bf16", "fp8", "int8", "int4", "int2") if name in NAMES
)


@settings(max_examples=40)
@given(
    name=st.sampled_from(FIXED),
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=4),
    buffers=st.integers(0, 5),
    rounds=st.integers(0, 4),
)
def test_weights_of_fixed_size_are_predicted_to_the_byte(
    name: str, shapes: list[tuple[int, int]], buffers: int, rounds: int
) -> None:
    config = configure(name, error_feedback=False, rounds=rounds)
    layout = Layout(
        (
            *(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)),
            TensorSpec("n", (buffers,), "int64"),
        )
    )
    end = downlink(config, layout)
    rng = np.random.default_rng(0)
    sent = []
    for server_round in range(1, rounds + 1):
        end.prepare(
            server_round, rng.standard_normal(layout.size, np.float32), bytes(layout.exact_bytes)
        )
        sent.append(config.clients_per_round * len(end.payload_for(0)))
    prediction = predict(config, layout)
    assert prediction is not None
    assert (list(prediction.model_bytes), prediction.basis) == (sent, "exact")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "int8"])
@pytest.mark.parametrize("up", ["fp16", "sign"])
def test_a_run_of_fixed_sizes_is_predicted_in_both_directions(
    run_config: Build, name: str, up: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "backend_of", LocalBackend())
    config = run_config(
        *SMALL, *LITTLE, f"compression@downlink={name}", f"compression={up}", "rounds=3"
    )
    record = run.execute(config, tmp_path)
    assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    assert record.summary["prediction"] == "exact"
    rounds = pd.DataFrame(record.rounds)
    assert (
        rounds["predicted_bytes"].tolist()
        == (rounds["uplink_bytes"] + rounds["downlink_bytes"]).tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("initial_model", ["known", "sent"])
def test_updates_of_one_size_are_predicted_to_the_byte(initial_model: str) -> None:
    """Of fixed size, exactly, whatever clients miss."""
    layout = matrix_layout()
    of = partial(configure, "sign", initial_model=initial_model, rounds=12)

    def measured(config: RunConfig) -> list[int]:
        """Bytes of all messages of each round."""
        rng = np.random.default_rng(config.seed)
        end = Chain(config, layout)
        totals, model = [], rng.standard_normal(layout.size, np.float32)
        for server_round in range(1, config.rounds + 1):
            end.prepare(server_round, model, bytes(layout.exact_bytes))
            cohort = config.sampler().cohort(server_round)
            totals.append(sum(len(end.payload_for(client)) for client in cohort.clients.tolist()))
            for client in cohort.replying.tolist():
                end.replied(client)
                model = rng.standard_normal(layout.size, np.float32)
        return totals

    for clients, fraction, dropout in ((4, 1.0, 0.0), (10, 0.3, 0.4), (10_000, 0.25, 0.1)):
        config = of(num_clients=clients, fraction_fit=fraction)
        config = config.model_copy(update={"clients": ClientsConfig(dropout=dropout)})
        prediction = predict(config, layout)
        assert prediction is not None
        assert list(prediction.model_bytes) == measured(config)
        assert prediction.basis == "exact"


def test_the_way_down_is_checked_before_training(run_config: Build) -> None:
    with pytest.raises(ConfigError, match=r"downlink\.density=2"):
        run_config("compression@downlink=topk", "downlink.density=2")
    with pytest.raises(ConfigError, match=r"downlink\.error_feedback=True: .*would grow"):
        run_config("compression@downlink=randk", "downlink.error_feedback=true")
    with pytest.raises(ConfigError, match=r"initial_model=guessed: .*'known' or 'sent'"):
        run_config("initial_model=guessed")


@pytest.mark.slow
def test_int8_down_costs_little(
    run_config: Build, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "backend_of", LocalBackend())
    losses = {}
    for name in ("none", "int8", "lowrank_ecsq"):
        overrides = (*SMALL, *LITTLE, "local_steps=8", "rounds=4", f"compression@downlink={name}")
        losses[name] = run.execute(run_config(*overrides), tmp_path).summary["loss"]
    assert losses["int8"] == pytest.approx(losses["none"], abs=0.02)
    assert losses["lowrank_ecsq"] == pytest.approx(losses["none"], abs=0.1)
    assert len(set(losses.values())) == 3
