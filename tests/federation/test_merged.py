"""One update per client: what it rebuilds, what it costs, and what a server that goes on knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.config.groups import ClientsConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.downlink import HEADER, LENGTH
from fedbw_sweep.cost.prediction import predict
from fedbw_sweep.errors import ConfigError, PayloadError
from fedbw_sweep.federation import merged as merged_module
from fedbw_sweep.federation.merged import ENTRY, INITIAL, NONE, Merged, Versions
from fedbw_sweep.federation.rebuild import rebuild
from fedbw_sweep.sweeps import run
from tests.compression.test_contract import NAMES, read_choice
from tests.conftest import SMALL
from tests.local import LocalBackend

from .test_downlink import (
    CONTEXT,
    LITTLE,
    Build,
    configure,
    matrix_layout,
    note_received,
    note_recorded,
)

METHODS = [name for name in NAMES if not read_choice(name).get("unbiased")]
"""Those that may have error feedback; what expands is refused as everywhere."""


def of(name: str, **values: Any) -> RunConfig:
    config = configure(name, True, **values)
    down = config.downlink.model_copy(update={"catch_up": "merged"})
    return config.model_copy(update={"downlink": down})


def fits(name: str) -> bool:
    try:
        of(name).downlink.build()
    except ConfigError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", [*filter(fits, METHODS), CONTEXT])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_a_client_rebuilds_is_the_servers_record(name: str, data: st.DataObject) -> None:
    """Whoever takes part and replies; also of a server that goes on after any round."""
    starts = ["known"] if name == CONTEXT else ["known", "sent"]
    config = of(name, initial_model=data.draw(st.sampled_from(starts)))
    layout, method = matrix_layout(), config.downlink.build()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    initial = model = rng.standard_normal(layout.size).astype(np.float32)
    known = config.initial_model == "known"
    held: dict[int, FloatVector | None] = dict.fromkeys(range(4), initial if known else None)
    some = st.sets(st.sampled_from(range(4)))
    end, made = Merged(config, layout), b""
    goes_on_after = data.draw(st.integers(1, 6))
    for number in range(1, 7):
        end.prepare(number, model, b"")
        replying = data.draw(some)
        for client in sorted(data.draw(some)):
            payload = memoryview(end.payload_for(client))
            rebuilt = rebuild(payload, held[client], initial, method, layout, number - 1)
            if client in replying:
                held[client] = rebuilt
                end.replied(client)
                assert end.received(client).tobytes() == rebuilt.tobytes()
        made += end.made
        if number == goes_on_after:
            state, end = end.state(), Merged(config, layout)
            for vector, clients in end.load(state, initial, made):
                for client in clients:
                    assert vector.tobytes() == held[client].tobytes()  # type: ignore[union-attr]
        model = (model + rng.standard_normal(layout.size)).astype(np.float32)


def test_bytes_and_models_by_hand() -> None:
    """Of 100 coordinates one update is 4 + 2 + 100 bytes, 8 for its length, the model 400."""
    config, layout = of("int8"), Layout((TensorSpec("w", (100,)),))
    end = Merged(config, layout)
    models = np.random.default_rng(1).standard_normal((9, 100)).astype(np.float32).cumsum(0)
    sizes: dict[int, list[int]] = {client: [] for client in range(4)}
    for number, model in enumerate(models, 1):
        end.prepare(number, model, b"")
        clients = {1: [1, 2], 2: [1], 9: [1, 2, 3]}.get(number, [])
        payloads = {client: end.payload_for(client) for client in clients}
        for client, payload in payloads.items():
            sizes[client].append(len(payload))
            end.replied(client)
    assert payloads[2] is payloads[3], "both were at the initial model"
    update = HEADER.size + LENGTH.size + 4 + 2 + 100
    assert sizes == {
        0: [],
        1: [HEADER.size, update, update],
        2: [HEADER.size, update],
        3: [update],
    }
    missed_most = end.received(2)
    whole = np.abs(models[8] - models[0]).max()
    assert np.abs(missed_most - models[8]).max() <= whole / 127, "one update's error, not eight"


@pytest.mark.parametrize("name", ["ecsq", "lowrank_ecsq"])
def test_the_step_is_that_of_the_last_round(name: str) -> None:
    """A client that missed a lot gets no coarser a model than one that missed a little."""
    layout = Layout((TensorSpec("w", (80, 60)),))
    rng = np.random.default_rng(3)
    end = Merged(of(name), layout)
    model = np.zeros(layout.size, np.float32)
    errors: dict[int, float] = {}
    for number in range(1, 42):
        end.prepare(number, model, b"")
        clients = {40: [0], 41: [0, 1]}.get(number, [])
        for client in clients:
            end.payload_for(client)
            end.replied(client)
            errors[client] = float(np.square(end.received(client) - model).mean())
        model = model + rng.standard_normal(layout.size).astype(np.float32)
    # Uniform in a bin of the step would be a twelfth; the dead zone, and what is left out, more.
    step = end.compressor.step  # type: ignore[attr-defined]
    assert errors[0] == pytest.approx(errors[1], rel=0.5)
    assert step**2 / 24 < errors[1] < step**2 / 4


@pytest.mark.parametrize("name", ["sign", "int8"])
@pytest.mark.parametrize("initial_model", ["known", "sent"])
def test_updates_of_one_size_are_predicted_to_the_byte(name: str, initial_model: str) -> None:
    layout = matrix_layout()
    config = of(name, initial_model=initial_model, rounds=8, num_clients=10)
    config = config.model_copy(update={"clients": ClientsConfig(dropout=0.4), "fraction_fit": 0.3})
    rng, end, totals = np.random.default_rng(0), Merged(config, layout), []
    for number in range(1, config.rounds + 1):
        model = rng.standard_normal(layout.size, np.float32)
        end.prepare(number, model, bytes(layout.exact_bytes))
        cohort = config.sampler().cohort(number)
        totals.append(sum(len(end.payload_for(client)) for client in cohort.clients.tolist()))
        for client in cohort.replying.tolist():
            end.replied(client)
    prediction = predict(config, layout)
    assert prediction is not None
    assert list(prediction.model_bytes) == totals
    assert prediction.basis == "exact"


def test_an_estimate_says_that_it_leaves_out_what_was_missed() -> None:
    prediction = predict(of("topk"), matrix_layout())
    assert prediction is not None
    assert prediction.basis.endswith("(the way down, whatever a client has missed)")


def test_an_estimate_of_steps_goes_by_what_clients_miss() -> None:
    """All in every round miss one round; the fewer take part, the more they have missed."""
    layout = matrix_layout()
    sizes = []
    for fraction in (1.0, 0.1):
        config = of("lowrank_ecsq", fraction_fit=fraction, num_clients=20, rounds=30)
        prediction = predict(config, layout)
        assert prediction is not None
        message = max(prediction.model_bytes) / config.clients_per_round
        sizes.append(message - HEADER.size - LENGTH.size - layout.exact_bytes)
        assert "finer by the root of the rounds that a client has missed)" in prediction.basis
        shorter = predict(config.model_copy(update={"rounds": 7}), layout)
        assert shorter is not None  # whose rounds are those of the longer one
        assert shorter.model_bytes == prediction.model_bytes[:7]
        assert shorter.basis == prediction.basis
    assert sizes[1] > 1.5 * sizes[0]


def test_models_that_are_not_at_hand_are_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_module, "CACHE_BYTES", 0)
    config, layout = of("topk"), matrix_layout()
    method, rng = config.downlink.build(), np.random.default_rng(0)
    versions = Versions(method, layout)
    versions.initial = rng.standard_normal(layout.size).astype(np.float32)
    models, parent = {}, INITIAL
    for number in range(1, 7):
        update = method.encode(rng.standard_normal(layout.size).astype(np.float32), layout, rng)
        model = versions.model(parent) + method.decode(update, layout)
        version = versions.add(parent, update)
        assert versions.model(version).tobytes() == model.tobytes()
        models[version] = model
        parent = version if number != 3 else INITIAL  # a second branch
    whole = versions.add(NONE, models[6].tobytes())
    assert versions.model(whole).tobytes() == models[6].tobytes()
    for version in (5, 1, 6, 3):
        assert versions.model(version).tobytes() == models[version].tobytes()


@pytest.mark.parametrize(
    "damage",
    [lambda made: made[:-1], lambda made: made[:-30], lambda made: made + ENTRY.pack(99, 0)],
)
def test_damaged_updates_are_refused(damage: Any) -> None:
    config, layout = of("int8"), Layout((TensorSpec("w", (20,)),))
    end, initial = Merged(config, layout), np.zeros(20, np.float32)
    made = b""
    for number in (1, 2):
        end.prepare(number, initial + number, b"")
        end.payload_for(0)
        end.replied(0)
        made += end.made
    with pytest.raises(PayloadError):
        list(Merged(config, layout).load(end.state(), initial, damage(made)))


def test_merged_updates_need_error_feedback() -> None:
    with pytest.raises(ConfigError, match=r"downlink\.catch_up=merged: needs .*feedback=true"):
        configure("topk", False).downlink.model_copy(update={"catch_up": "merged"}).build()
    with pytest.raises(ConfigError, match=r"downlink\.catch_up=both: .*'chain' or 'merged'"):
        RunConfig.from_dict(
            {**(plain := configure("topk", True).model_dump(by_alias=True)),
             "downlink": {**plain["downlink"], "catch_up": "both"}}
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("initial_model", ["known", "sent"])
def test_clients_train_from_what_the_server_says_they_hold(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initial_model: str
) -> None:
    trained_from = note_received(monkeypatch)
    recorded = note_recorded(monkeypatch)
    monkeypatch.setattr(run, "backend_of", LocalBackend(5))
    record = run.execute(
        run_config(
            *(*SMALL, *LITTLE, "num_clients=6", "rounds=5", "clients.dropout=0.3", "lr=0.01"),
            *("compression@downlink=lowrank_ecsq", "downlink.catch_up=merged"),
            f"initial_model={initial_model}",
        ),
        tmp_path,
    )
    assert record.error is None
    assert sorted(trained_from) == sorted(recorded)
    assert len(set(recorded)) > 4
