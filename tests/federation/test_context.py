"""Updates that are coded in what both ends hold: they hold the same, whatever the way down."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbw_sweep.errors import ConfigError
from fedbw_sweep.sweeps import run
from tests.conftest import SMALL
from tests.local import LocalBackend

from .test_downlink import LITTLE, Build, note_received, note_recorded

CONTEXT = "compression=lowrank_ecsq", "compression.context=received"

WAYS_DOWN = {
    "whole": (),
    "cast": ("compression@downlink=int8",),
    "chain": ("compression@downlink=lowrank_ecsq",),
    "merged": ("compression@downlink=lowrank_ecsq", "downlink.catch_up=merged"),
    "chain in its context": ("compression@downlink=lowrank_ecsq", "downlink.context=received"),
    "merged in its context": (
        "compression@downlink=lowrank_ecsq", "downlink.catch_up=merged",
        "downlink.context=received",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_DOWN)
def test_the_server_knows_what_a_client_trained_from(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    trained_from = note_received(monkeypatch)
    known = note_recorded(monkeypatch)  # a payload of another context is refused
    monkeypatch.setattr(run, "backend_of", LocalBackend(5))
    record = run.execute(
        run_config(
            *(*SMALL, *LITTLE, "num_clients=6", "rounds=4", "clients.dropout=0.3", "lr=0.01"),
            *(*CONTEXT, *WAYS_DOWN[way]),
        ),
        tmp_path,
    )
    assert record.error is None
    assert sorted(trained_from) == sorted(known)
    assert len(set(known)) > 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("initial_model=sent", "initial_model=sent: must be known with compression.context"),
        ("upload=weights", "upload=weights: must be update with compression.context=received"),
    ],
)
def test_what_gives_both_ends_no_context_is_refused(
    run_config: Build, override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(*SMALL, *CONTEXT, override)


def test_both_ends_need_the_initial_model_on_the_way_down(run_config: Build) -> None:
    down = "compression@downlink=lowrank_ecsq", "downlink.context=received"
    with pytest.raises(
        ConfigError, match=r"initial_model=sent: .* with downlink\.context=received"
    ):
        run_config(*SMALL, *down, "initial_model=sent")
    assert run_config(*SMALL, *down, "upload=weights", "compression=none").upload == "weights"
