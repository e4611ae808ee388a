"""Shared by all tests: composed configs, a grid without Ray, a tiny federation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.sweeps.grid import Composer

Execute = Callable[..., Any]
"""Overrides -> `RunRecord`; see `execute`."""

ROOT = Path(__file__).parent.parent

SMALL = (
    "model=tiny",
    "num_clients=4",
    "fraction_fit=0.5",
    "rounds=2",
    "local_steps=2",
    "batch_size=2",
    "sequence_length=16",
    "data.heldout_tokens=256",
)
"""Overrides that cut a run to seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what waits for Ray first: the rest fills the cores meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(autouse=True)
def _nothing_measured() -> None:
    """Forget initial losses: some tests make them up."""
    if "fedbw_sweep.federation.shared" in sys.modules:
        sys.modules["fedbw_sweep.federation.shared"]._initial_losses.clear()


@pytest.fixture(autouse=True)
def _fresh_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


_composer = Composer("config")


@cache
def config_of(*overrides: str) -> RunConfig:
    """Compose and validate a `RunConfig`, as a sweep does; frozen, so each only once."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(_composer.config(overrides))


def refuses(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Assert that a command ends as it does where the user has to change something: with 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """See `config_of`."""
    return config_of


@pytest.fixture
def execute(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Execute:
    """Do a small run in this process and return its record."""
    from fedbw_sweep.sweeps import run

    from .local import LocalBackend, Tamper

    def do(
        *overrides: str, order: int = 0, tamper: Tamper = lambda reply: reply, folder: str = "s"
    ) -> Any:
        monkeypatch.setattr(run, "backend_of", LocalBackend(order, tamper))
        (tmp_path / folder).mkdir(exist_ok=True)
        return run.execute(run_config(*SMALL, *overrides), tmp_path / folder)

    return do
